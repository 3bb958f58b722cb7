"""Structures of what a foundation model knows, and merges that keep it."""

from dataclasses import replace

import numpy as np
import pytest
from ase.data import covalent_radii
from ase.neighborlist import neighbor_list

from ase_gffmerge import merge
from ase_gffmerge.errors import RecipeError
from ase_gffmerge.inference.predict import predict_frames
from ase_gffmerge.merging.recipe import load_recipe
from ase_gffmerge.sampling.generic_frames import MAX_ATOMS, generic_frames
from helpers.toys import family, toy

pytestmark = pytest.mark.filterwarnings("ignore::ase_gffmerge.errors.MergeWarning")
MANY = (1, 3, 6, 7, 8, 9, 13, 14, 16, 29, 47, 78)


@pytest.mark.parametrize("periodic", [None, True, False])
def test_structures_of_many_compounds(periodic) -> None:
    frames = generic_frames(MANY, 20, periodic=periodic)
    assert len(frames) == 20
    assert frames == generic_frames(MANY, 20, periodic=periodic)
    assert {bool(atoms.pbc.all()) for atoms in frames} == ({True, False} if periodic is None else {periodic})
    assert len({atoms.get_chemical_formula("reduce") for atoms in frames}) > 12
    for atoms in frames:
        assert set(atoms.numbers.tolist()) <= set(MANY)
        assert len(atoms) <= MAX_ATOMS
        first, second, distance = neighbor_list("ijd", atoms, 3.0)
        bonds = covalent_radii[atoms.numbers[first]] + covalent_radii[atoms.numbers[second]]
        assert (distance > 0.6 * bonds).all()


@pytest.mark.parametrize("species", [(29,), (8,), (2,), (6, 8)])
def test_few_elements_have_structures_too(species) -> None:
    assert len(generic_frames(species, 6)) == 6


def test_what_the_base_knew_is_kept() -> None:
    """Of compounds that no specialist and no fit has seen."""
    base = replace(toy("painn", None, (1, 6, 8)), name="old")
    pair = family("painn", 2, size=0.2, frames=12)
    new = generic_frames(base.species, 10, periodic=False, seed=99)
    known = base.with_calibration(generic_frames(base.species, 3, periodic=False, seed=5))

    def forgotten(recipe: dict[str, object]) -> float:
        merged, report = merge(pair, {"preset": "fast", "select": False, **recipe}, base=known, device="cpu")
        assert report.specialists == (("s0", "s1", "old (base)") if "keep_base" in recipe else ("s0", "s1"))
        assert merged.merged is not None
        assert merged.merged.specialists == ("s0", "s1")
        assert load_recipe(merged.merged.recipe).keep_base == recipe.get("keep_base", 0)
        ours, theirs = (
            np.concatenate(predict_frames(p, new).forces) for p in (merged.potential, base.potential)
        )
        return float(np.abs(ours - theirs).mean())

    assert forgotten({"keep_base": 20}) < 0.7 * forgotten({})


def test_a_base_that_is_not_at_hand() -> None:
    with pytest.raises(RecipeError, match="--base FILE"):
        merge(family("painn", 2), {"preset": "fast", "keep_base": 4}, device="cpu")
    with pytest.raises(RecipeError, match=r"^recipe: keep_base makes one surface .* or keep_base to 0$"):
        load_recipe({"keep_base": 4, "conditioning": "per-specialist"})
