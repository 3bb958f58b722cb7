"""NaN and infinity in weights and frames: refused where they would do harm, by the name of what holds them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule

from ase_gffmerge import GFFMergeCalculator
from ase_gffmerge.errors import (
    FileFormatError,
    FramesError,
    GFFMergeError,
    IncompatibleSpecialistsError,
    RecipeError,
)
from ase_gffmerge.forcefield.force_field import ForceField
from ase_gffmerge.merging.recipe import PRESETS, load_recipe
from ase_gffmerge.workflows.cache import MergeCache
from ase_gffmerge.workflows.merge import merge
from helpers.faults import RECIPE, same_content

VALUES = [float("nan"), float("inf"), -float("inf")]


def names_of_weights(specialist: ForceField) -> list[str]:
    return list(specialist.potential.state_dict())


@pytest.mark.parametrize("value", VALUES)
def test_any_weight_at_a_merge(specialists, tmp_path, value):
    for name in names_of_weights(specialists[1]):
        tensor = specialists[1].potential.state_dict()[name].view(-1)
        kept = tensor[-1].clone()
        tensor[-1] = value
        with pytest.raises(IncompatibleSpecialistsError, match=f"the parameter '{name}' of 'b' contains NaN"):
            merge(specialists, RECIPE, device="cpu")
        tensor[-1] = kept
    specialists[1].potential.embedding[0, 0, 0] = value
    with pytest.raises(GFFMergeError, match="contains NaN or infinity"):
        GFFMergeCalculator(specialists, recipe=RECIPE, cache_dir=tmp_path / "cache", device="cpu")
    assert MergeCache(tmp_path / "cache").entries() == []


def test_a_spoilt_model_replaces_no_good_file(specialists, tmp_path):
    path = specialists[0].save(tmp_path / "model.safetensors")
    spoilt = replace(specialists[1], name="spoilt")
    spoilt.potential.readout.out.bias[:] = torch.nan
    with pytest.raises(
        FileFormatError, match=r"'spoilt' is not written to .*'readout\.out\.bias' contains NaN"
    ):
        spoilt.save(path)
    assert same_content(ForceField.load(path), specialists[0])


def spoilt_frame(where: str, value: float) -> Atoms:
    atoms = molecule("CH3OH", cell=[9, 9, 9], pbc=True)
    if where == "positions":
        atoms.positions[2, 1] = value
    else:
        atoms.cell[1, 2] = value
    return atoms


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("where", ["positions", "cell"])
@pytest.mark.parametrize("recipe", sorted(PRESETS))
def test_calibration_frames(specialists, tmp_path, where, value, recipe):
    frames = (molecule("CH3OH"), spoilt_frame(where, value))
    pair = [specialists[0], specialists[1].with_calibration(frames)]
    with pytest.raises(
        FramesError, match=r"calibration frame 1 of 'b' \(CH4O\).*NaN or inf.*leave that frame out"
    ):
        merge(pair, recipe, device="cpu")
    with pytest.raises(FramesError, match="calibration frame 1 of 'b'"):
        pair[1].save(tmp_path / "b.safetensors")
    assert not (tmp_path / "b.safetensors").exists()


def test_frames_without_atoms_are_not_written(specialists, tmp_path):
    with pytest.raises(FramesError, match="calibration frame 0 of 'a' is empty"):
        specialists[0].with_calibration([Atoms()]).save(tmp_path / "a.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", VALUES)
def test_recipes(value):
    for options in ({"ridge": value}, {"weights": [1.0, value]}, {"readout": {"energy_weight": value}}):
        with pytest.raises(RecipeError, match=f"{next(iter(options))}.*(finite|greater)"):
            load_recipe(options)


def test_the_calculator_works_after_a_structure_that_is_not_finite(specialists):
    calc = GFFMergeCalculator(specialists[0], device="cpu", dtype="float64")
    atoms = molecule("CH3OH")
    atoms.calc = calc
    expected = atoms.get_forces()
    for value in VALUES:
        spoilt = atoms.copy()
        spoilt.positions[1] = value
        spoilt.calc = calc
        with pytest.raises(GFFMergeError, match=r"positions \[1\] of CH4O"):
            spoilt.get_forces()
        np.testing.assert_array_equal(atoms.get_forces(), expected)
