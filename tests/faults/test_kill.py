"""kill -9 at any moment: the next run succeeds, no half file is served, nothing is lost."""

import os
import random
import signal
import time
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
from ase.io import read

from ase_gffmerge import GFFMergeCalculator
from ase_gffmerge.forcefield.force_field import ForceField
from ase_gffmerge.merging.recipe import load_recipe
from ase_gffmerge.training.checkpoint import checkpoint_path
from ase_gffmerge.training.config import TrainConfig
from ase_gffmerge.training.train import train
from ase_gffmerge.workflows.cache import MergeCache
from helpers import workers
from helpers.faults import RECIPE, labelled_water, run, same_content

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this platform has no SIGKILL")


def moments(context, target, *arguments, folder: Path) -> int:
    """How many moments a process that survives has."""
    assert run(context, target, *arguments, None) == 0
    count = int((folder / "moments").read_text())
    (folder / "moments").unlink()
    return count


@pytest.mark.parametrize("stride", [3, pytest.param(1, marks=[pytest.mark.slow, pytest.mark.nightly])])
def test_merge_and_cache_writing(processes, files, specialists, tmp_path, stride):
    healthy = tmp_path / "healthy"
    healthy.mkdir()
    count = moments(processes, workers.merge_into_cache, files, RECIPE, healthy, folder=healthy)
    (expected,) = MergeCache(healthy).entries()
    assert count > 10
    for fatal in range(0, count, stride):
        cache = MergeCache(tmp_path / f"killed at {fatal}")
        died = run(processes, workers.merge_into_cache, files, RECIPE, cache.directory, fatal)
        assert died == -signal.SIGKILL
        assert all(check.ok for check in cache.verify()), "a half file has the name of an entry"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            calc = GFFMergeCalculator(files, recipe=RECIPE, cache_dir=cache.directory, device="cpu")
        (entry,) = cache.entries()
        assert entry.key == expected.key
        assert calc.force_field.fingerprint == ForceField.load(expected.path).fingerprint
        assert not list(cache.directory.glob(".*.tmp")), "what the killed process left is gone"
        assert GFFMergeCalculator(files, recipe=RECIPE, cache_dir=cache.directory, device="cpu").cache_hit


@pytest.mark.filterwarnings("ignore::ase_gffmerge.errors.MergeWarning")
def test_at_random_times_of_a_closed_form_merge(processes, files, tmp_path):
    recipe = load_recipe({"preset": "paper"})
    cache, clock = tmp_path / "cache", random.Random(0)
    for _ in range(4):
        process = processes.Process(target=workers.merge_into_cache, args=(files, recipe, cache, None))
        process.start()
        time.sleep(clock.uniform(0.05, 0.8))
        process.kill()
        process.join(30)
        assert process.exitcode in (0, -signal.SIGKILL)
        assert all(check.ok for check in MergeCache(cache).verify())
    first = GFFMergeCalculator(files, recipe=recipe, cache_dir=cache, device="cpu")
    second = GFFMergeCalculator(files, recipe=recipe, cache_dir=cache, device="cpu")
    assert second.cache_hit
    assert first.force_field.fingerprint == second.force_field.fingerprint


def test_saving_over_a_specialist(processes, specialists, tmp_path):
    folder = tmp_path / "models"
    old, new = (replace(s, name=name) for s, name in zip(specialists, ("old", "new"), strict=True))
    source, path = new.save(tmp_path / "new.safetensors"), folder / "model.safetensors"
    old.save(path)
    count = moments(processes, workers.save_again, source, path, folder=folder)
    assert count >= 4
    survivors = []
    for fatal in range(count):
        old.save(path)
        assert run(processes, workers.save_again, source, path, fatal) == -signal.SIGKILL
        survivors.append(ForceField.load(path).name)
        assert same_content(ForceField.load(path), {"old": old, "new": new}[survivors[-1]])
        assert {p.name for p in folder.iterdir() if not p.name.startswith(".")} == {path.name}
    assert survivors == sorted(survivors, reverse=True), "the old file until the new one is complete"
    assert set(survivors) == {"old", "new"}


def test_training_goes_on_after_a_kill(processes, tmp_path):
    options = {
        "hyper": {"channels": 4, "n_blocks": 1, "n_radial": 3},
        "epochs": 3,
        "batch_size": 2,
        "validation": 2,
    }
    frames, folder = labelled_water(tmp_path / "water.xyz"), tmp_path / "models"
    out = folder / "model.safetensors"
    count = moments(processes, workers.train_to, frames, out, options, folder=folder)
    uninterrupted = ForceField.load(out)
    for fatal in range(2, count, max(1, count // 6)):
        out.unlink(missing_ok=True)
        assert run(processes, workers.train_to, frames, out, options, fatal) == -signal.SIGKILL
        assert not out.exists() or same_content(ForceField.load(out), uninterrupted)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            train([frames], out, TrainConfig(**options), n_calibration=2, device="cpu")
        assert same_content(ForceField.load(out), uninterrupted)
        assert not checkpoint_path(out).exists()


@pytest.mark.parametrize("suffix", [".traj", ".extxyz"])
def test_trajectory_is_readable_up_to_the_kill(processes, files, tmp_path, suffix):
    trajectory = tmp_path / f"run{suffix}"
    assert run(processes, workers.dynamics, files[0], trajectory, 7) == -signal.SIGKILL
    frames = read(trajectory, ":")
    assert len(frames) == 8
    assert all(atoms.get_forces().shape == (3, 3) for atoms in frames)


def test_lock_of_a_killed_process_is_free(processes, files, tmp_path):
    """A process that is stopped in the middle of a merge makes others wait; once it is killed they go on."""
    cache = tmp_path / "cache"
    context = processes
    holding = context.Event()
    process = context.Process(target=workers.hold_lock, args=(files, RECIPE, cache, holding))
    process.start()
    assert holding.wait(30)
    waiting = context.Process(target=workers.merge_into_cache, args=(files, RECIPE, cache, None))
    waiting.start()
    waiting.join(1)
    assert waiting.exitcode is None, "the second process waits for the first"
    os.kill(process.pid, signal.SIGKILL)
    waiting.join(30)
    assert waiting.exitcode == 0
    assert [check.ok for check in MergeCache(cache).verify()] == [True]
