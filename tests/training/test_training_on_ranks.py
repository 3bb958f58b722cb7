"""Trainings that several processes share equal those of one, and go on after a kill."""

import ast
import json
from pathlib import Path

import numpy as np
import pytest
from ase.io import write
from typer.testing import CliRunner

from ase_gffmerge.cli import app
from ase_gffmerge.forcefield.force_field import ForceField
from ase_gffmerge.runtime import distributed
from helpers import ranks
from helpers.faults import same_content
from helpers.toys import family, labelled, rattled, toy


def sources(folder: Path) -> list[ForceField]:
    """Write two specialists, of molecules and of crystals of molecules, and labelled frames of the first."""
    specialists = family("painn", 2, frames=9)
    for atoms in specialists[1].calibration:
        atoms.set_cell(5.5 * np.eye(3))
        atoms.pbc = True
    for k, specialist in enumerate(specialists):
        specialist.save(folder / f"specialist-{k}.safetensors")
    toy("painn").save(folder / "base.safetensors")
    for name, n, seed in (("frames", 16, 9), ("tests", 4, 10)):
        frames = [labelled(atoms) for atoms in rattled("CH3CH2OH", n, seed=seed)]
        write(folder / f"{name}.xyz", frames, format="extxyz")
    return specialists


def difference(one: ForceField, other: ForceField) -> float:
    """Largest relative difference of a tensor."""
    theirs = other.potential.state_dict()
    return max(
        float((a - theirs[name]).norm() / a.norm().clamp(min=1e-300))
        for name, a in one.potential.state_dict().items()
        if a.is_floating_point()
    )


def test_parts_are_dealt_out_by_size(monkeypatch):
    sizes, own = [5, 1, 9, 4, 4, 7, 2], []
    for rank in range(3):
        token = distributed._ranks.set((rank, 3))
        own.append(distributed.dealt(sizes, size=float))
        distributed._ranks.reset(token)
    assert sorted(size for part in own for size in part) == sorted(sizes)
    assert [sum(part) for part in own] == [11, 11, 10]
    assert distributed.dealt(sizes, size=float) == sizes


def test_a_command_that_is_not_shared_says_so_under_torchrun(monkeypatch):
    for name, value in {"TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "2", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    answer = CliRunner().invoke(app, ["info", "rmd17-ethanol"])
    assert answer.exit_code == 2
    assert "gffmerge info would run 2 times" in answer.stderr
    answer = CliRunner().invoke(app, ["compare", "rmd17-ethanol", "rmd17-malonaldehyde", "--workers=2"])
    assert answer.exit_code == 2
    assert "leave --workers and --executor out" in answer.stderr


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, pytest.param(3, marks=pytest.mark.nightly)])
def test_ranks_train_as_one_process_does(tmp_path, n):
    sources(tmp_path)
    done = ranks.torchrun("train", tmp_path, n)
    assert done.returncode == 0, done.stderr[-3000:]
    (tmp_path / "distilled.checkpoint").unlink()
    for name, (alone, history) in ranks.trained(tmp_path).items():
        rows = ast.literal_eval((tmp_path / f"{name}.txt").read_text())
        most = 1e-12 if name == "joint" else 1e-9
        assert len(rows) == 4
        for ours, theirs in zip(history.rows, rows, strict=True):
            assert theirs == pytest.approx(ours, rel=most)
        assert difference(alone, ForceField.load(tmp_path / f"{name}.safetensors")) < most, name
    assert difference(ForceField.load(tmp_path / "specialist-0.safetensors"), alone) > 1e-3


@pytest.mark.slow
@pytest.mark.nightly
def test_commands_share_their_work(tmp_path):
    found = []
    for n in (1, 2):
        folder = tmp_path / str(n)
        folder.mkdir()
        sources(folder)
        done = ranks.torchrun("commands", folder, n)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stderr.count("epoch 2/2") == 2, "the first process alone talks"
        assert not list(folder.glob("*.checkpoint*"))
        errors = json.loads(done.stdout[done.stdout.rindex("\n{\n") :])["force_mae"]
        found.append((ForceField.load(folder / "trained.safetensors"), errors))
        assert ForceField.load(folder / "student.safetensors").potential.hyper.channels == 4
    (ours, errors), (theirs, shared) = found
    assert difference(ours, theirs) < 1e-9
    for name in ("mean", "joint"):
        assert shared[name] == pytest.approx(errors[name], rel=1e-9), name


@pytest.mark.slow
@pytest.mark.nightly
def test_a_killed_rank_costs_an_epoch_and_nothing_else(tmp_path):
    models = []
    for name in ("undisturbed", "killed"):
        folder = tmp_path / name
        folder.mkdir()
        sources(folder)
        if name == "killed":
            (folder / "fatal").touch()
        done = ranks.torchrun("kill", folder, 2, "--max-restarts=1")
        assert done.returncode == 0, done.stderr[-3000:]
        killed = any(words in done.stderr for words in ("Signal 9 (SIGKILL)", "exitcode: -9"))
        assert killed == (name == "killed")
        models.append(ForceField.load(folder / "model.safetensors"))
        first = ast.literal_eval((folder / "epochs.txt").read_text())[0]
        assert first == (3 if name == "killed" else 1), "continued from the checkpoint"
    assert same_content(*models)
