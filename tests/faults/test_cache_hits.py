"""Hits that load no specialist: never a stale or mistaken merge, and whoever needs a specialist notices what is wrong."""

import pickle

import numpy as np
import pytest
from ase.build import molecule

from ase_gffmerge import GFFMergeCalculator
from ase_gffmerge.errors import CacheWarning, FileFormatError
from ase_gffmerge.forcefield.force_field import ForceField
from ase_gffmerge.workflows import load_or_merge as sources
from ase_gffmerge.workflows.cache import MergeCache
from helpers.faults import RECIPE, same_content


@pytest.fixture
def calculator(files, tmp_path):
    """Makes a calculator of the two files, or of others, with a cache of this test."""

    def make(specialists=files, **options) -> GFFMergeCalculator:
        fixed = {"recipe": RECIPE, "cache_dir": tmp_path / "cache", "device": "cpu"}
        return GFFMergeCalculator(specialists, **fixed | options)

    return make


@pytest.fixture
def entry(calculator, tmp_path):
    """The merge of the two files in the cache."""
    assert not calculator().cache_hit
    (path,) = (tmp_path / "cache").glob("*.safetensors")
    return path


@pytest.fixture
def loads(monkeypatch) -> list:
    """Sources that are loaded one by one."""
    loaded, plain = [], sources.as_force_field
    monkeypatch.setattr(sources, "as_force_field", lambda source: loaded.append(source) or plain(source))
    return loaded


def flip(path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 0xFF
    path.write_bytes(data)


def test_a_hit_loads_no_specialist(calculator, loads):
    missed = calculator()
    assert len(loads) == 2
    found = calculator()
    assert len(loads) == 2
    assert (missed.cache_hit, found.cache_hit) == (False, True)
    assert same_content(missed.force_field, found.force_field)
    assert missed.parameters == found.parameters
    assert found.report.to_dict() == missed.report.to_dict()


def test_what_decides_a_merge_decides_the_way(calculator, files, entry, loads):
    copies = [path.rename(path.with_name(f"renamed {path.name}")) for path in files]
    assert calculator(copies).cache_hit
    assert loads == [], "where a file lies does not matter"
    assert not calculator(copies[::-1]).cache_hit
    assert not calculator(copies, weights=(1, 2)).cache_hit
    assert len(loads) == 4


def test_objects_are_looked_up_by_what_they_are(calculator, files, entry, loads):
    objects = [ForceField.load(path) for path in files]
    assert calculator([objects[0], files[1]]).cache_hit
    objects[0].potential.readout.out.bias += 1.0
    assert not calculator([objects[0], files[1]]).cache_hit


def test_a_damaged_specialist_is_noticed(calculator, files, entry):
    flip(files[1])
    with pytest.raises(FileFormatError, match=r"b\.safetensors was altered"):
        calculator()


def test_the_merge_of_others_is_not_taken(calculator, files, entry, loads):
    calculator(files[::-1])
    (other,) = set(entry.parent.glob("*.safetensors")) - {entry}
    entry.write_bytes(other.read_bytes())
    with pytest.warns(CacheWarning, match="does not hold the merge that its name stands for"):
        assert calculator().force_field.merged.specialists == ("a", "b")
    assert len(loads) == 4
    assert calculator().cache_hit


def test_files_that_change_while_they_are_read_are_merged_as_they_were_loaded(
    calculator, files, monkeypatch, tmp_path
):
    """What is stored has the name of what was loaded, not of what was there a moment before."""
    plain, swapped = sources.read_digest, files[0].read_bytes()
    monkeypatch.setattr(
        sources,
        "read_digest",
        lambda path: (plain(path), new_bias(files[0]))[0] if path == files[1] else plain(path),
    )
    changed = calculator()
    monkeypatch.undo()
    assert calculator().cache_hit
    files[0].write_bytes(swapped)
    before = calculator()
    assert (changed.cache_hit, before.cache_hit) == (False, False)
    assert not same_content(changed.force_field, before.force_field)


def new_bias(path) -> None:
    specialist = ForceField.load(path)
    specialist.potential.readout.out.bias += 1.0
    specialist.save(path)


def test_the_cache_forgets_it(calculator, entry, tmp_path):
    assert len(MergeCache(tmp_path / "cache").clear()) == 1
    assert list((tmp_path / "cache").iterdir()) == []
    assert not calculator().cache_hit


def test_who_disagrees_is_loaded_then(calculator, files, entry, loads):
    atoms, fresh = molecule("CH3OH"), calculator([ForceField.load(path) for path in files])
    calc = calculator()
    copies = [calc, calc.spawn(), pickle.loads(pickle.dumps(calc))]
    for found in copies:
        np.testing.assert_array_equal(found.disagreement(atoms), fresh.disagreement(atoms))
    late = calculator()
    files[0].write_bytes(files[1].read_bytes())
    with pytest.raises(
        FileFormatError, match=r"a\.safetensors holds another specialist than the one that was merged"
    ):
        late.disagreement(atoms)
    files[0].unlink()
    with pytest.raises(FileFormatError, match="does not exist"):
        late.disagreement(atoms)
    np.testing.assert_array_equal(calc.disagreement(atoms), fresh.disagreement(atoms))
