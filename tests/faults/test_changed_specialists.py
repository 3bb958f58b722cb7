"""A specialist that changed between two runs, or has the name of another: never a stale or mistaken merge."""

import os
from dataclasses import replace

import pytest
from ase.build import molecule

from ase_gffmerge import GFFMergeCalculator
from ase_gffmerge.errors import GFFMergeError
from ase_gffmerge.forcefield.force_field import ForceField
from ase_gffmerge.merging.average import distinct
from ase_gffmerge.merging.recipe import load_recipe
from ase_gffmerge.workflows.cache import MergeCache
from helpers.faults import RECIPE, run
from helpers.workers import merge_into_cache


def calculator(files, tmp_path, **options) -> GFFMergeCalculator:
    return GFFMergeCalculator(
        files,
        **{"recipe": RECIPE, "cache_dir": tmp_path / "cache", "device": "cpu", "dtype": "float64"} | options,
    )


def energy(calc: GFFMergeCalculator) -> float:
    atoms = molecule("CH3OH")
    atoms.calc = calc
    return atoms.get_potential_energy()


def new_weight(specialist: ForceField) -> ForceField:
    specialist.potential.readout.out.bias += 1.0
    return specialist


def new_frames(specialist: ForceField) -> ForceField:
    return specialist.with_calibration(specialist.calibration[:1])


def new_name(specialist: ForceField) -> ForceField:
    return replace(specialist, name="another")


def new_lineage(specialist: ForceField) -> ForceField:
    return replace(specialist, provenance=replace(specialist.provenance, lineage=("base", "child")))


@pytest.mark.parametrize("change", [new_weight, new_frames, new_name, new_lineage])
def test_changed_on_disk(files, tmp_path, change):
    first = calculator(files, tmp_path)
    before = os.stat(files[0])
    change(ForceField.load(files[0])).save(files[0])
    os.utime(files[0], ns=(before.st_atime_ns, before.st_mtime_ns))  # times of files do not count
    second = calculator(files, tmp_path)
    assert (first.cache_hit, second.cache_hit) == (False, False)
    assert len(MergeCache(tmp_path / "cache").entries()) == 2
    if change is new_weight:
        assert energy(second) - energy(first) == pytest.approx(6 * 0.5), "half of 1 eV per atom"
    assert calculator(files, tmp_path).cache_hit


def test_changed_by_another_process(processes, files, tmp_path):
    assert run(processes, merge_into_cache, files, RECIPE, tmp_path / "cache", None) == 0
    assert calculator(files, tmp_path).cache_hit
    new_weight(ForceField.load(files[1])).save(files[1])
    assert not calculator(files, tmp_path).cache_hit


def test_changed_while_it_is_served(files, tmp_path):
    calc = calculator(files[0], tmp_path)
    expected = energy(calc)
    files[0].write_bytes(files[1].read_bytes())
    calc.reset()
    assert energy(calc) == expected
    files[0].unlink()
    assert energy(calc.spawn()) == expected


def test_two_specialists_of_one_name(specialists, tmp_path):
    pair = [replace(s, name="same") for s in specialists]
    files = [s.save(tmp_path / f"{i}.safetensors") for i, s in enumerate(pair)]
    recipe = load_recipe({"preset": "mean", "conditioning": "per-specialist"})
    forward = calculator(files, tmp_path, recipe=recipe, specialist="same")
    backward = calculator(files[::-1], tmp_path, recipe=recipe, specialist="same")
    assert forward.specialist_names == backward.specialist_names == ("same", "same-2")
    assert backward.cache_hit is False
    by_name = {
        name: energy(calculator(files, tmp_path, recipe=recipe, specialist=name))
        for name in forward.specialist_names
    }
    assert by_name["same"] == energy(forward) != by_name["same-2"]
    assert energy(calculator(files, tmp_path, recipe=recipe, specialist=1)) == by_name["same-2"]
    assert [row["specialist"] for row in forward.force_field.merged.report["parity"]] == ["same", "same-2"]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a", "b"], ["a", "b"]),
        (["a", "a", "a"], ["a", "a-2", "a-3"]),
        (["a", "a", "a-2"], ["a", "a-2", "a-2-2"]),
        (["a-2", "a", "a"], ["a-2", "a", "a-3"]),
    ],
)
def test_distinct_names(names, expected):
    assert distinct(names) == expected


def test_the_same_file_twice(files, tmp_path):
    with pytest.raises(GFFMergeError, match="the same specialist was given twice"):
        calculator([files[0], files[0]], tmp_path)
    assert MergeCache(tmp_path / "cache").entries() == []
