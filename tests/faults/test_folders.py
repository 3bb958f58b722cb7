"""Folders and names that are not as they should be: missing, not writable, files, links, long, strange."""

import os
import shutil
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path

import pytest

from ase_gffmerge import GFFMergeCalculator
from ase_gffmerge.errors import CacheError, CacheWarning, FileFormatError, GFFMergeError, RecipeError
from ase_gffmerge.forcefield.force_field import ForceField
from ase_gffmerge.merging.recipe import load_recipe
from ase_gffmerge.workflows.cache import MergeCache
from helpers import workers
from helpers.faults import RECIPE, key_of, run, same_content


@pytest.fixture
def build(merged):
    """Hand out the merge, counting how often."""

    def made() -> ForceField:
        made.count += 1
        return merged

    made.count = 0
    return made


# -- the folder --


def test_missing_folder_is_made(specialists, build, tmp_path):
    cache = MergeCache(tmp_path / "a" / "b" / "c")
    assert cache.entries() == []
    assert not cache.get_or_build(specialists, RECIPE, build)[1]
    assert cache.get_or_build(specialists, RECIPE, build)[1]


@pytest.mark.parametrize(
    ("folder", "reason"),
    [
        ("file", "File exists"),
        ("file/cache", "Not a directory"),
        ("x" * 300, "File name too long"),
        ("nul\0byte", "null byte"),
        ("link to itself", "File exists"),
        ("dangling", "File exists"),
        ("~nobody-of-this-name/cache", "home directory"),
    ],
)
def test_no_folder(files, tmp_path, monkeypatch, folder, reason):
    (tmp_path / "file").write_text("somebody's")
    (tmp_path / "link to itself").symlink_to("link to itself")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere" / "at all")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        CacheError, match=f"(?s)cannot write to the cache folder .*{reason}.*cache_dir="
    ) as info:
        GFFMergeCalculator(files, recipe=RECIPE, cache_dir=folder, device="cpu")
    assert folder.split("/")[0].strip("~") in str(info.value)
    assert (tmp_path / "file").read_text() == "somebody's"


@pytest.fixture
def public_folder():
    """A folder that everybody may enter; those of pytest are private."""
    folder = Path(tempfile.mkdtemp(prefix="gffmerge-test-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def test_read_only_folder(processes, specialists, public_folder):
    if os.name != "posix":
        pytest.skip("permissions of folders are POSIX")
    files = [s.save(public_folder / f"{s.name}.safetensors") for s in specialists]
    cache = public_folder / "cache"

    def ask(folder: Path) -> tuple:
        answers = processes.SimpleQueue()
        assert run(processes, workers.as_nobody, answers, workers.energy_of, files, RECIPE, folder) == 0
        answer = answers.get()
        if "ModuleNotFoundError" in answer[1]:
            pytest.skip("another user cannot read the packages of this environment")
        return answer

    cache.mkdir()
    cache.chmod(0o555)
    for folder in (cache, cache / "below"):
        _, errors, message, _ = ask(folder)
        assert "CacheError" in errors
        assert f"{folder} (Permission denied)" in message
        assert "cache_dir=" in message
    cache.chmod(0o755)
    expected = workers.energy_of(files, RECIPE, cache)[0]
    cache.chmod(0o555)
    outcome, errors, _, warned = ask(cache)
    assert (outcome, errors, warned) == ((expected, True), [], []), "what is there can be used"
    for path in cache.iterdir():
        path.chmod(0)
    _, errors, message, _ = ask(cache)
    assert "CacheError" in errors
    assert "Permission denied" in message


# -- entries that are links --


def test_link_to_the_right_entry_is_served(specialists, build, entry):
    entry.rename(entry.parent.parent / "moved")
    entry.symlink_to(entry.parent.parent / "moved")
    assert MergeCache(entry.parent).get_or_build(specialists, RECIPE, build)[1]


def outside_file(entry: Path) -> Path:
    return ForceField.load(entry).with_calibration(()).save(entry.parent.parent / "mine.safetensors")


def link_elsewhere(entry: Path) -> Path:
    """To an intact file of another merge of the same specialists."""
    loaded = ForceField.load(entry)
    path = entry.parent.parent / "mine.safetensors"
    replace(loaded, merged=replace(loaded.merged, cache_key="0" * 64)).save(path)
    return path


def link_to_specialist(entry: Path) -> Path:
    return replace(ForceField.load(entry), merged=None).save(entry.parent.parent / "mine.safetensors")


def link_to_text(entry: Path) -> Path:
    path = entry.parent.parent / "thesis.txt"
    path.write_text("ten years of work")
    return path


@pytest.mark.parametrize("target", [link_elsewhere, link_to_specialist, link_to_text])
def test_link_to_something_else_is_replaced(specialists, build, entry, target):
    outside, cache = target(entry), MergeCache(entry.parent)
    before = outside.read_bytes()
    entry.unlink()
    entry.symlink_to(outside)
    assert [check.ok for check in cache.verify()] == [False]
    with pytest.warns(CacheWarning, match=entry.name):
        cache.get_or_build(specialists, RECIPE, build)
    assert build.count == 1
    assert not entry.is_symlink()
    assert outside.read_bytes() == before
    assert cache.get_or_build(specialists, RECIPE, build)[1]


@pytest.mark.parametrize("target", ["nowhere", "itself"])
def test_link_to_nothing_is_replaced(specialists, build, entry, target):
    entry.unlink()
    entry.symlink_to(entry if target == "itself" else entry.parent / target)
    cache = MergeCache(entry.parent)
    assert [found.name for found in cache.entries()] == [""]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not cache.get_or_build(specialists, RECIPE, build)[1]
        assert cache.get_or_build(specialists, RECIPE, build)[1]


def test_folder_in_place_of_an_entry(specialists, build, entry):
    entry.unlink()
    (entry / "inside").mkdir(parents=True)
    with pytest.warns(
        CacheWarning, match=f"could not be cached: cannot write .*{entry.name}: it is a folder"
    ):
        found, hit = MergeCache(entry.parent).get_or_build(specialists, RECIPE, build)
    assert not hit
    assert found.merged.specialists == ("a", "b")
    assert (entry / "inside").is_dir()


def test_clearing_removes_links_and_not_what_they_lead_to(entry):
    outside = link_to_text(entry)
    entry.unlink()
    entry.symlink_to(outside)
    assert len(MergeCache(entry.parent).clear()) == 1
    assert not entry.is_symlink()
    assert outside.exists()


def test_clearing_leaves_what_is_not_the_caches(specialists, entry, tmp_path):
    """Somebody's cache folder is the folder of somebody's models."""
    cache = entry.parent
    kept = [specialists[0].save(cache / "a.safetensors"), cache / ".uv.lock", cache / ".draft.tmp"]
    for path in kept[1:]:
        path.touch()
    assert [found.path for found in MergeCache(cache).clear()] == [entry]
    assert sorted(cache.iterdir()) == sorted(kept)


def test_entry_that_vanishes_before_it_is_read_back(specialists, merged, tmp_path, monkeypatch):
    save = ForceField.save

    def save_and_lose(self: ForceField, path: Path) -> Path:
        save(self, path).unlink()
        return path

    monkeypatch.setattr(ForceField, "save", save_and_lose)
    with pytest.warns(CacheWarning, match="could not be cached: .*does not exist"):
        found, _ = MergeCache(tmp_path).get_or_build(specialists, RECIPE, lambda: merged)
    assert found.fingerprint == merged.fingerprint


# -- names --


@pytest.mark.parametrize(
    "name",
    ["with space", "ünïcödé 力場 🧪", "two\nlines\tand a tab", "-rf *", "'quoted\"", "a" * 243, "力" * 81],
    ids=["space", "unicode", "newline", "option", "quotes", "long", "long in bytes"],
)
def test_names_of_files_and_folders(specialists, build, tmp_path, name):
    assert len(f"{name}.safetensors".encode()) <= 255
    folder = tmp_path / name
    files = [s.save(folder / str(i) / f"{name}.safetensors") for i, s in enumerate(specialists)]
    for i, (path, original) in enumerate(zip(files, specialists, strict=True)):
        assert same_content(ForceField.load(path), original)
        assert list((folder / str(i)).iterdir()) == [path]
    calc = GFFMergeCalculator(files, recipe=RECIPE, cache_dir=folder / "cache", device="cpu")
    again = GFFMergeCalculator(files, recipe=RECIPE, cache_dir=folder / "cache", device="cpu")
    assert (calc.cache_hit, again.cache_hit) == (False, True)
    assert [check.ok for check in MergeCache(folder / "cache").verify()] == [True]
    files[0].write_bytes(b"damage")
    with pytest.raises(FileFormatError) as info:
        ForceField.load(files[0])
    assert str(files[0]) in str(info.value)


def test_names_of_undecodable_bytes(specialists, tmp_path):
    try:
        folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
        folder.mkdir()
    except OSError:
        pytest.skip("this file system takes no such names")
    path = specialists[0].save(folder / os.fsdecode(b"mod\xffl.safetensors"))
    assert same_content(ForceField.load(path), specialists[0])
    assert list(folder.iterdir()) == [path]


@pytest.mark.parametrize("name", ["a" * 300, "nul\0byte", "file/below", ""])
def test_names_that_cannot_be(specialists, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("somebody's")
    for attempt, kind in (
        (lambda: specialists[0].save(name), FileFormatError),
        (lambda: ForceField.load(name), FileFormatError),
        (lambda: GFFMergeCalculator(name), FileFormatError),
        (lambda: GFFMergeCalculator([name, name]), FileFormatError),
        (lambda: load_recipe(name), RecipeError),
        (lambda: load_recipe(Path(name)), RecipeError),
    ):
        with pytest.raises(GFFMergeError) as info:
            attempt()
        assert isinstance(info.value, kind)
    assert (tmp_path / "file").read_text() == "somebody's"


@pytest.mark.skipif(not os.path.exists("/dev/zero"), reason="this platform has no /dev/zero")
def test_endless_files(tmp_path):
    with pytest.raises(FileFormatError, match="/dev/zero is not a file"):
        ForceField.load("/dev/zero")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileFormatError, match="pipe is not a file"):
        ForceField.load(tmp_path / "pipe")


# -- specialists --


def test_key_in_the_entry(specialists, entry):
    assert ForceField.load(entry).merged.cache_key == key_of(specialists, RECIPE) == entry.stem
