"""The store of merged potentials."""

import errno
import json
import os
import subprocess
import sys
import tempfile
import warnings
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ase.build import molecule

import ase_gffmerge.workflows.cache as cache_module
from ase_gffmerge.errors import CacheError, CacheWarning
from ase_gffmerge.forcefield.force_field import ForceField
from ase_gffmerge.merging import recipe as recipe_module
from ase_gffmerge.merging.recipe import load_recipe
from ase_gffmerge.workflows.cache import MergeCache
from ase_gffmerge.workflows.merge import merge
from helpers.faults import key_of, tiny_specialists

RECIPE = load_recipe("mean")


@pytest.fixture
def specialists() -> list[ForceField]:
    return tiny_specialists()


@pytest.fixture
def build(specialists):
    """Merge, counting how often."""

    def run():
        run.count += 1
        return merge(specialists, RECIPE, device="cpu")[0]

    run.count = 0
    return run


def same_bits(first: ForceField, second: ForceField) -> bool:
    ours, theirs = first.potential.state_dict(), second.potential.state_dict()
    return (
        ours.keys() == theirs.keys()
        and all(torch.equal(ours[name], theirs[name]) for name in ours)
        and first.fingerprint == second.fingerprint
        and first.merged == second.merged
        and first.name == second.name
    )


@pytest.mark.parametrize("folder", ["cache", "with space/ünïcödé 力場"])
def test_a_hit_equals_a_miss_bitwise(specialists, build, tmp_path, folder):
    cache = MergeCache(tmp_path / folder)
    fresh = build()
    missed, first = cache.get_or_build(specialists, RECIPE, build)
    found, second = cache.get_or_build(specialists, RECIPE, build)
    assert (first, second, build.count) == (False, True, 2)
    assert same_bits(missed, found)
    assert all(torch.equal(a, b) for a, b in zip(fresh.potential.parameters(), found.potential.parameters()))


def test_symlinked_folder(specialists, build, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    MergeCache(tmp_path / "link").get_or_build(specialists, RECIPE, build)
    assert MergeCache(tmp_path / "real").get_or_build(specialists, RECIPE, build)[1]


def test_where_the_folder_is(tmp_path, monkeypatch):
    monkeypatch.setenv("GFFMERGE_CACHE", str(tmp_path / "by variable"))
    assert MergeCache().directory == tmp_path / "by variable"
    assert MergeCache(tmp_path / "given").directory == tmp_path / "given"
    monkeypatch.setenv("GFFMERGE_CACHE", "")
    monkeypatch.setattr(cache_module.platformdirs, "user_cache_path", lambda name: tmp_path / name)
    assert MergeCache().directory == tmp_path / "ase-gffmerge" / "merged"


# -- the key --


def test_key_is_stable(specialists):
    key = key_of(specialists, RECIPE)
    again = [replace(s, potential=deepcopy(s.potential)) for s in specialists]
    assert key == key_of(again, load_recipe({"preset": "mean"}))
    assert len(key) == 64
    assert key == key_of([s.to(device="cpu") for s in specialists], RECIPE)


def test_key_survives_a_file_round_trip(specialists, tmp_path):
    loaded = [ForceField.load(s.save(tmp_path / f"{s.name}.safetensors")) for s in specialists]
    assert key_of(loaded, RECIPE) == key_of(specialists, RECIPE)


def test_key_depends_on_everything_that_matters(specialists, monkeypatch):
    a, b = specialists
    other = deepcopy(a.potential)
    other.embedding[0, 0, 0] += 1e-6
    moved = molecule("CH3OH")
    moved.positions[0, 0] += 1e-9
    variants = [
        ([a, b], RECIPE),
        ([b, a], RECIPE),
        ([a, b, b], RECIPE),
        ([a, b], load_recipe("gffmerge")),
        ([a, b], load_recipe("mean", weights=(1.0, 2.0))),
        ([replace(a, name="c"), b], RECIPE),
        ([replace(a, potential=other), b], RECIPE),
        ([replace(a, calibration=(moved,)), b], RECIPE),
        ([replace(a, level_of_theory="PBE"), b], RECIPE),
        ([replace(a, provenance=replace(a.provenance, lineage=("x",))), b], RECIPE),
    ]
    keys = {key_of(specialists, recipe) for specialists, recipe in variants}
    assert len(keys) == len(variants)
    monkeypatch.setattr(recipe_module, "MERGE_VERSION", -1)
    assert key_of([a, b], RECIPE) not in keys


# -- what can go wrong --


def damage_by_flipping(path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 0xFF
    path.write_bytes(data)


def damage_by_swapping(path):
    ForceField.load(path).with_calibration(()).save(path)
    merged = ForceField.load(path)
    replace(merged, merged=replace(merged.merged, fingerprints=("x", "y"))).save(path)


@pytest.mark.parametrize(
    "damage",
    [
        damage_by_flipping,
        damage_by_swapping,
        lambda path: path.write_bytes(path.read_bytes()[:100]),
        lambda path: path.write_bytes(b""),
    ],
    ids=["flipped", "swapped", "truncated", "empty"],
)
def test_corrupt_entry_is_rebuilt_with_a_warning(specialists, build, tmp_path, damage):
    cache = MergeCache(tmp_path)
    good, _ = cache.get_or_build(specialists, RECIPE, build)
    path = cache.path(key_of(specialists, RECIPE))
    damage(path)
    with pytest.warns(CacheWarning, match=path.name):
        rebuilt, hit = cache.get_or_build(specialists, RECIPE, build)
    assert not hit
    assert build.count == 2
    assert (rebuilt.fingerprint, rebuilt.merged.fingerprints) == (good.fingerprint, good.merged.fingerprints)
    assert cache.get_or_build(specialists, RECIPE, build)[1]


def test_unwritable_folder_is_told_before_the_merge(specialists, build, tmp_path):
    (tmp_path / "file").write_text("in the way")
    cache = MergeCache(tmp_path / "file" / "cache")
    with pytest.raises(
        CacheError, match=r"file/cache \(Not a directory\).*cache_dir=.*GFFMERGE_CACHE"
    ) as info:
        cache.get_or_build(specialists, RECIPE, build)
    assert "\n" not in str(info.value)
    assert build.count == 0


def test_read_only_folder(specialists, build, tmp_path, monkeypatch):
    cache = MergeCache(tmp_path)

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(cache_module.tempfile, "TemporaryFile", refuse)
        with pytest.raises(CacheError, match="Permission denied"):
            cache.get_or_build(specialists, RECIPE, build)
        assert build.count == 0
        assert list(tmp_path.iterdir()) == []
    cache.get_or_build(specialists, RECIPE, build)
    monkeypatch.setattr(cache_module.tempfile, "TemporaryFile", refuse)
    assert cache.get_or_build(specialists, RECIPE, build)[1], "what is there can be used"


def test_full_disk_costs_the_entry_but_not_the_merge(specialists, build, tmp_path, monkeypatch):
    cache = MergeCache(tmp_path)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.warns(CacheWarning, match="No space left"):
            merged, hit = cache.get_or_build(specialists, RECIPE, build)
    assert not hit
    assert merged.merged.specialists == ("a", "b")
    assert cache.entries() == []
    assert not list(tmp_path.glob("*.tmp")) + list(tmp_path.glob(".*.tmp"))


def test_failed_merge_leaves_nothing_and_releases_the_lock(specialists, build, tmp_path):
    cache = MergeCache(tmp_path)

    def fail():
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        cache.get_or_build(specialists, RECIPE, fail)
    assert cache.entries() == []
    assert not cache.get_or_build(specialists, RECIPE, build)[1]


CONTEST = """
import multiprocessing, os, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from ase_gffmerge.workflows.cache import MergeCache
from ase_gffmerge.workflows.merge import merge
from ase_gffmerge.merging.recipe import load_recipe
from ase_gffmerge.forcefield.force_field import ForceField

folder = Path(sys.argv[1])
specialists = [ForceField.load(folder / f"{name}.safetensors") for name in "ab"]
recipe = load_recipe("mean")

def build():
    (folder / f"built by {os.getpid()}").touch()
    time.sleep(0.3)
    return merge(specialists, recipe, device="cpu")[0]

def work(start):
    start.wait()
    merged, hit = MergeCache(folder / "cache").get_or_build(specialists, recipe, build)
    (folder / f"done by {os.getpid()}").write_text(f"{merged.fingerprint} {hit}")

if __name__ == "__main__":
    context = multiprocessing.get_context("fork")
    start = context.Event()
    workers = [context.Process(target=work, args=(start,)) for _ in range(8)]
    for worker in workers: worker.start()
    start.set()
    for worker in workers: worker.join(60)
    sys.exit(sum(worker.exitcode != 0 for worker in workers))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="forks")
def test_eight_processes_build_once(specialists, tmp_path):
    for specialist in specialists:
        specialist.save(tmp_path / f"{specialist.name}.safetensors")
    script = tmp_path / "contest.py"
    script.write_text(CONTEST)
    run = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, timeout=120, check=False
    )
    assert run.returncode == 0, run.stderr
    done = [path.read_text().split() for path in tmp_path.glob("done by *")]
    assert len(done) == 8
    assert len({fingerprint for fingerprint, _ in done}) == 1
    assert [hit for _, hit in done].count("False") == 1
    assert len(list(tmp_path.glob("built by *"))) == 1


# -- several users, no users, no locks --

USERS = """
import multiprocessing, os, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from ase_gffmerge.errors import CacheError
from ase_gffmerge.workflows.cache import MergeCache
from ase_gffmerge.workflows.merge import merge
from ase_gffmerge.merging.recipe import load_recipe
from ase_gffmerge.forcefield.force_field import ForceField

private, shared = map(Path, sys.argv[1:])
specialists = [ForceField.load(private / f"{name}.safetensors") for name in "ab"]
recipe = load_recipe("mean")
merged = merge(specialists, recipe, device="cpu")[0]
for _ in range(2):  # whatever is imported on first use: these users cannot read where the package is installed
    MergeCache(private / "cache").get_or_build(specialists, recipe, lambda: merged)

def become(user):
    os.setgroups([])
    os.setgid(user)
    os.setuid(user)
    os.umask(0o077)

def build():
    (shared / f"built by {os.getuid()}").touch()
    time.sleep(0.3)
    return merged

def work(user, start):
    become(user)
    os.environ.pop("HOME", None)
    os.environ.pop("XDG_CACHE_HOME", None)
    os.environ.pop("GFFMERGE_CACHE", None)
    try:
        MergeCache()
    except CacheError as error:
        assert "home" in str(error) and "cache_dir=" in str(error), error
    else:
        raise AssertionError("a user without a home has no cache folder of their own")
    start.wait()
    for _ in range(2):
        _, hit = MergeCache(shared / "cache").get_or_build(specialists, recipe, build)
    assert hit

if __name__ == "__main__":
    context = multiprocessing.get_context("fork")
    start = context.Event()
    workers = [context.Process(target=work, args=(4240 + k, start)) for k in range(4)]
    for worker in workers: worker.start()
    start.set()
    for worker in workers: worker.join(60)
    sys.exit(sum(worker.exitcode != 0 for worker in workers))
"""


@pytest.fixture
def shared():
    """A folder that every user can reach and write to."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "cache").mkdir()
        for path in (folder, folder / "cache"):
            path.chmod(0o777)
        yield folder


@pytest.fixture
def strict_umask():
    before = os.umask(0o077)
    yield
    os.umask(before)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root becomes other users")
def test_users_share_a_folder_whatever_their_umask_and_without_a_home(specialists, tmp_path, shared):
    for specialist in specialists:
        specialist.save(tmp_path / f"{specialist.name}.safetensors")
    script = tmp_path / "users.py"
    script.write_text(USERS)
    command = [sys.executable, str(script), str(tmp_path), str(shared)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
    assert len(list(shared.glob("built by *"))) == 1


@pytest.mark.skipif(sys.platform == "win32", reason="permissions")
@pytest.mark.parametrize(("folder", "lock", "entry"), [(0o777, 0o666, 0o644), (0o700, 0o600, 0o600)])
def test_locks_and_entries_are_as_open_as_the_folder(
    specialists, build, tmp_path, strict_umask, folder, lock, entry
):
    tmp_path.chmod(folder)
    MergeCache(tmp_path).get_or_build(specialists, RECIPE, build)
    key = key_of(specialists, RECIPE)
    modes = [(tmp_path / name).stat().st_mode & 0o777 for name in (f".{key}.lock", f"{key}.safetensors")]
    assert modes == [lock, entry]


def test_a_lock_that_cannot_be_opened_is_named(specialists, build, tmp_path, monkeypatch):
    def refuse(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(cache_module.FileLock, "acquire", refuse)
    name = f".{key_of(specialists, RECIPE)}.lock"
    with pytest.raises(CacheError, match=rf"cannot open the lock .*{name} \(Permission denied\).*cache_dir="):
        MergeCache(tmp_path).get_or_build(specialists, RECIPE, build)
    assert build.count == 0


@pytest.mark.skipif(sys.platform == "win32", reason="flock")
@pytest.mark.parametrize("code", ["ENOLCK", "EOPNOTSUPP", "EBADF", "EIO", "ENOSYS"])
def test_without_locks_the_merge_is_not_cached(specialists, build, tmp_path, monkeypatch, code):
    def refuse(descriptor, operation):
        raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)))

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.warns(CacheWarning, match=r"file system of .* has no locks .*not cached") as caught:
        merged, hit = MergeCache(tmp_path).get_or_build(specialists, RECIPE, build)
    assert len(caught) == 1
    assert (hit, build.count, merged.merged.specialists) == (False, 1, ("a", "b"))
    assert list(tmp_path.iterdir()) == []


def test_a_home_is_only_needed_where_no_folder_is_given(tmp_path, monkeypatch):
    def homeless(name):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(cache_module.platformdirs, "user_cache_path", homeless)
    assert MergeCache(tmp_path).directory == tmp_path
    monkeypatch.setenv("GFFMERGE_CACHE", str(tmp_path / "variable"))
    assert MergeCache().directory == tmp_path / "variable"
    monkeypatch.delenv("GFFMERGE_CACHE")
    with pytest.raises(CacheError, match=r"home directory.*cache_dir="):
        MergeCache()


# -- list, verify, clear --


def test_entries_verify_and_clear(specialists, build, tmp_path):
    cache = MergeCache(tmp_path)
    assert cache.entries() == cache.verify() == cache.clear() == []
    cache.get_or_build(specialists, RECIPE, build)
    (entry,) = cache.entries()
    assert (entry.name, entry.specialists) == ("a+b", ("a", "b"))
    assert entry.key == key_of(specialists, RECIPE)
    assert entry.size == entry.path.stat().st_size > 0
    assert entry.modified.tzinfo is not None
    assert [check.ok for check in cache.verify()] == [True]
    damage_by_flipping(entry.path)
    bad = tmp_path / ("0" * 64 + ".safetensors")
    bad.write_text("garbage")
    checks = {check.entry.path: check for check in cache.verify()}
    assert not checks[entry.path].ok
    assert "altered" in checks[entry.path].problem
    assert bad.name in checks[bad].problem
    assert checks[bad].entry.specialists == ()
    (tmp_path / f".{entry.path.name}.abc.tmp").touch()
    (tmp_path / "README").touch()
    assert {removed.path for removed in cache.clear()} == {entry.path, bad}
    assert [path.name for path in tmp_path.iterdir()] == ["README"]


def test_nothing_is_written_beside_the_entries(specialists, build, tmp_path):
    cache = MergeCache(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache.get_or_build(specialists, RECIPE, build)
    visible = [path for path in tmp_path.iterdir() if not path.name.startswith(".")]
    assert visible == [cache.entries()[0].path]
    assert json.loads(json.dumps(cache.entries()[0].specialists)) == ["a", "b"]
