"""``gffmerge md --extrapolation``: what happens at the edge of the calibration frames."""

from pathlib import Path

import pytest
import torch
from ase.build import molecule
from ase.io import read, write

from ase_gffmerge import ForceField
from ase_gffmerge.models import build_potential

HYPER = {"channels": 8, "n_blocks": 1, "n_radial": 4, "cutoff": 4.0}
MD = ["--ensemble", "nve", "--temperature", 50, "--steps", 4, "--interval", 2, "--timestep", 0.1]


@pytest.fixture
def run(gffmerge, tmp_path: Path):
    """A force field calibrated on water near equilibrium, a whole molecule and a torn one."""
    frames = [molecule("H2O") for _ in range(8)]
    for seed, atoms in enumerate(frames):
        atoms.rattle(0.03, seed=seed)
    torch.manual_seed(0)
    potential = build_potential("painn", HYPER, (1, 8)).eval().requires_grad_(False)
    plain = ForceField(name="water", potential=potential, calibration=tuple(frames))
    plain.save(tmp_path / "plain.safetensors")
    plain.with_extrapolation_grade().save(tmp_path / "graded.safetensors")
    torn = molecule("H2O")
    torn.positions[1] *= 2.5
    write(tmp_path / "whole.xyz", molecule("H2O"))
    write(tmp_path / "torn.xyz", torn)
    return lambda model, structure, *more: gffmerge(
        "md", f"{model}.safetensors", f"{structure}.xyz", *MD, "--out", "out.traj", "--overwrite", *more
    )


def test_warns_by_default_where_the_model_can_tell(run) -> None:
    torn = run("graded", "torn", "--json")
    assert "warning: atom " in torn.err
    document = torn.json()
    assert document["extrapolation_beyond"] == 3
    assert document["extrapolation_largest"] > 2
    whole = run("graded", "whole")
    assert "warning" not in whole.err
    assert "largest extrapolation grade" in whole.out
    assert "warning" not in run("graded", "torn", "--extrapolation", "off").err
    silent = run("plain", "torn", "--json")
    assert silent.err == ""
    assert "extrapolation_largest" not in silent.json()


def test_a_continued_run_speaks_of_what_it_saw(run) -> None:
    assert run("graded", "whole").code == 0
    longer = run("graded", "whole", "--restart", "--steps", 6)
    assert "largest extrapolation grade since the restart" in longer.out
    nothing = run("graded", "whole", "--restart", "--steps", 6)  # is left to do
    assert nothing.code == 0
    assert "extrapolation" not in nothing.out


def test_stop_keeps_the_trajectory_so_far(run, tmp_path: Path) -> None:
    assert "extrapolation grade" in run("graded", "torn", "--extrapolation", "stop").error()
    assert len(read(tmp_path / "out.traj", ":")) == 1
    assert run("graded", "torn", "--extrapolation", "stop", "--threshold", 1e6).code == 0


def test_record_writes_beside_the_trajectory(run, tmp_path: Path) -> None:
    recorded = run("graded", "torn", "--extrapolation", "record")
    assert recorded.code == 0, recorded.err
    assert len(read(tmp_path / "out-extrapolation.extxyz", ":")) == 3


def test_asking_a_model_that_cannot_tell(run) -> None:
    assert "has no extrapolation grade" in run("plain", "whole", "--extrapolation", "warn").error()
    assert "threshold" in run("graded", "whole", "--threshold", 0).error()
