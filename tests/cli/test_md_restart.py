"""``gffmerge md --restart``, ``--append``, ``--log``, ``--fix`` and what happens to a run that explodes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule
from ase.io import read, write

from ase_gffmerge import ForceField
from ase_gffmerge.models import build_potential

HYPER = {"channels": 8, "n_blocks": 1, "n_radial": 4, "cutoff": 4.0}


@pytest.fixture
def run(gffmerge, tmp_path: Path):
    torch.manual_seed(0)
    potential = build_potential("painn", HYPER, (1, 8)).eval().requires_grad_(False)
    for parameter in potential.readout.parameters():
        parameter *= 0.02  # forces that are gentle enough for dynamics
    ForceField(name="water", potential=potential).save(tmp_path / "water.safetensors")
    for parameter in potential.readout.parameters():
        parameter *= 1000
    ForceField(name="stiff", potential=potential).save(tmp_path / "stiff.safetensors")
    write(tmp_path / "water.xyz", molecule("H2O"))
    options = ["water.xyz", "--temperature", 300]
    return lambda *more, model="water": gffmerge("md", f"{model}.safetensors", *options, *more)


def frames(path: str) -> list[Atoms]:
    return read(path, ":")


@pytest.mark.parametrize("way", [(), ("--thermostat", "bussi"), ("--thermostat", "nose-hoover")])
def test_a_run_is_continued_as_if_it_had_not_stopped(run, way: tuple[str, ...]) -> None:
    nvt = ("--ensemble", "nvt", "--interval", 5, *way)
    assert run(*nvt, "--steps", 20, "--out", "whole.traj").code == 0
    assert run(*nvt, "--steps", 10, "--out", "run.traj", "--log", "run.log").code == 0
    assert "run.traj exists" in run(*nvt, "--steps", 20, "--out", "run.traj").error()
    done = run(*nvt, "--steps", 20, "--out", "run.traj", "--log", "run.log", "--restart", "--json").json()
    assert done["steps"] == 20
    for one, other in zip(frames("run.traj"), frames("whole.traj"), strict=True):
        np.testing.assert_array_equal(one.positions, other.positions)
        np.testing.assert_array_equal(one.get_momenta(), other.get_momenta())
    assert len(Path("run.log").read_text().splitlines()) == 6
    refused = run(*nvt, "--steps", 20, "--out", "run.traj", "--restart", "--seed", 3).error()
    assert "seed was 0, now 3" in refused
    refused = run(*nvt, "--steps", 20, "--out", "run.traj", "--restart", model="stiff").error()
    assert "force field was water (" in refused
    assert "now stiff (" in refused


def test_without_a_run_there_is_nothing_to_continue(run) -> None:
    refused = run("--ensemble", "nve", "--steps", 5, "--out", "run.traj", "--restart").error()
    assert "there is no restart file run.traj.restart" in refused


def test_frames_are_appended_or_replaced(run) -> None:
    nve = ("--ensemble", "nve", "--steps", 5, "--out", "run.xyz")
    for option, n_frames in ((), 2), (("--append",), 4), (("--overwrite",), 2):
        assert run(*nve, *option).code == 0
        assert len(frames("run.xyz")) == n_frames


def test_fixed_atoms_do_not_move(run) -> None:
    assert run("--ensemble", "nvt", "--steps", 10, "--out", "run.traj", "--fix", "0").code == 0
    first, *_, last = frames("run.traj")
    np.testing.assert_array_equal(first.positions[0], last.positions[0])
    assert (first.positions[1:] != last.positions[1:]).all()
    refused = run("--ensemble", "nvt", "--steps", 10, "--out", "other.traj", "--fix", "1-7").error()
    assert "--fix 1-7" in refused


def test_a_run_that_explodes_keeps_what_came_before(run) -> None:
    ended = run(
        "--ensemble",
        "nve",
        "--steps",
        200,
        "--interval",
        1,
        "--timestep",
        5,
        "--out",
        "run.traj",
        model="stiff",
    )
    assert ended.code == 1, ended.err
    assert "stopped: after" in ended.err
    assert "shorter time step" in ended.err
    assert 1 < len(frames("run.traj")) < 200
