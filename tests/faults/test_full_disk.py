"""A disk that fills up: a clear error that names the file, nothing lost, and no merge lost to its cache."""

import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from ase.io import read

from ase_gffmerge import GFFMergeCalculator
from ase_gffmerge.forcefield.force_field import ForceField
from ase_gffmerge.training.checkpoint import checkpoint_path
from ase_gffmerge.workflows.cache import MergeCache
from helpers import workers
from helpers.faults import RECIPE, labelled_water, run, same_content

pytest.importorskip("resource", reason="this platform cannot limit the size of files")


@pytest.fixture
def limited(processes):
    """Do something where no file may grow beyond some bytes: (outcome, names of error classes, message, warnings)."""

    def do(size: int, work, *arguments):
        answers = processes.SimpleQueue()
        assert run(processes, workers.limited, size, answers, work, *arguments) == 0
        return answers.get()

    return do


@pytest.mark.parametrize("size", [0, pytest.param(100, marks=pytest.mark.slow), 5000])
def test_the_cache_cannot_be_written(limited, files, tmp_path, size):
    cache = tmp_path / "cache"
    expected = workers.energy_of(files, RECIPE, tmp_path / "elsewhere")[0]
    outcome, errors, message, warned = limited(size, workers.energy_of, files, RECIPE, cache)
    assert (errors, message) == ([], "")
    assert outcome == (expected, False)
    ((category, text),) = warned
    assert category == "CacheWarning"
    assert re.search(r"could not be cached: cannot write .*safetensors: File too large", text)
    assert MergeCache(cache).entries() == []
    assert not list(cache.glob(".*.tmp"))
    assert limited(10**6, workers.energy_of, files, RECIPE, cache)[0] == (expected, False)
    assert limited(0, workers.energy_of, files, RECIPE, cache)[::3] == ((expected, True), []), (
        "a hit needs no room"
    )


@pytest.mark.parametrize("size", [0, 1000])
def test_a_specialist_cannot_be_saved(limited, specialists, tmp_path, size):
    old, new = (replace(s, name="model") for s in specialists)
    path = old.save(tmp_path / "models" / "model.safetensors")
    _, errors, message, _ = limited(size, new.save, path)
    assert "FileFormatError" in errors
    assert message == f"cannot write {path}: File too large; free some space, or choose another folder"
    assert same_content(ForceField.load(path), old)
    assert list(path.parent.iterdir()) == [path]


def test_training_keeps_its_checkpoint(limited, tmp_path):
    options = {"hyper": {"channels": 4, "n_blocks": 1, "n_radial": 3}, "batch_size": 2, "validation": 2}
    frames, folder = labelled_water(tmp_path / "water.xyz"), tmp_path / "models"
    out = folder / "model.safetensors"
    size = 1000
    _, errors, message, _ = limited(size, workers.train_to, frames, out, options | {"epochs": 2}, None)
    assert "FileFormatError" in errors
    assert (
        message
        == f"cannot write {checkpoint_path(out)}: File too large; free some space, or choose another folder"
    )
    assert list(folder.iterdir()) == []
    _, errors, message, _ = limited(
        workers.UNLIMITED, workers.train_to, frames, out, options | {"epochs": 2}, None
    )
    assert not errors, message
    before = out.read_bytes()
    _, errors, message, _ = limited(size, workers.train_to, frames, out, options | {"epochs": 3}, None)
    assert "FileFormatError" in errors
    assert out.read_bytes() == before, "the specialist of the last training is still there"


@pytest.mark.parametrize("suffix", [".traj", ".extxyz"])
def test_frames_of_a_trajectory_stay_readable(limited, files, tmp_path, suffix):
    trajectory = tmp_path / f"run{suffix}"
    _, errors, message, _ = limited(6000, workers.dynamics, files[0], trajectory, 100)
    assert "GFFMergeError" in errors
    n_frames = len(read(trajectory, ":"))
    assert n_frames > 1
    assert message.startswith(
        f"cannot write frame {n_frames} to {trajectory}: File too large; the {n_frames} frames"
    )
    assert "go on from the last" in message


@pytest.fixture
def tiny_disk(tmp_path):
    """A file system with room for one block."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    if mount is None:
        pytest.skip("no mount command")
    made = subprocess.run(
        [mount, "-t", "tmpfs", "-o", "size=4k,nr_inodes=4", "tmpfs", folder], capture_output=True, text=True
    )
    if made.returncode:
        pytest.skip(f"this user may not mount a tmpfs: {made.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def fill_with_names(folder: Path) -> None:
    """Until there is no room for another."""
    for i in range(100):
        try:
            (folder / f"taken {i}").touch()
        except OSError:
            return
    pytest.fail(f"{folder} does not get full")


def test_a_full_file_system(tiny_disk, files, specialists, tmp_path):
    with pytest.warns(match=r"could not be cached: cannot write .*No space left on device"):
        calc = GFFMergeCalculator(files, recipe=RECIPE, cache_dir=tiny_disk / "cache", device="cpu")
    assert calc.cache_hit is False
    fill_with_names(tiny_disk)
    with pytest.warns(match=r"could not be cached: cannot write .*No space left on device"):
        GFFMergeCalculator(files, recipe=RECIPE, cache_dir=tiny_disk / "another" / "cache", device="cpu")
    with pytest.raises(
        Exception, match=r"cannot write .*model\.safetensors: No space left on device"
    ) as caught:
        specialists[0].save(tiny_disk / "model.safetensors")
    assert type(caught.value).__name__ == "FileFormatError"
