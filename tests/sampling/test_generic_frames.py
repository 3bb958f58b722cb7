"""Structures of what a foundation model knows, and merges that keep it."""

from dataclasses import replace

import numpy as np
import pytest
from ase.data import covalent_radii
from ase.neighborlist import neighbor_list

from ase_gffmerge import GFFMergeCalculator, merge
from ase_gffmerge.errors import ArgumentError, IncompatibleSpecialistsError, RecipeError
from ase_gffmerge.forcefield.provenance import Provenance
from ase_gffmerge.inference.predict import predict_frames
from ase_gffmerge.merging import selection
from ase_gffmerge.merging.recipe import BASE_FRAMES, load_recipe
from ase_gffmerge.merging.report import MergeReport
from ase_gffmerge.merging.report_plot import report_html
from ase_gffmerge.merging.selection import known_ancestor
from ase_gffmerge.models.affine_maps import affine_maps
from ase_gffmerge.sampling.generic_frames import DENSEST, MAX_ATOMS, STRAIN, compound, generic_frames
from helpers.toys import SHALLOW, family, rattled, relative, toy

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
        assert len(atoms) <= MAX_ATOMS or not atoms.pbc.any()
        first, second, distance = neighbor_list("ijd", atoms, 3.0)
        bonds = covalent_radii[atoms.numbers[first]] + covalent_radii[atoms.numbers[second]]
        assert (distance > 0.6 * bonds).all()


def test_no_crystal_is_denser_than_diamond() -> None:
    """Of all elements; helium by its covalent radius would have 900 neighbors within 3 Å, a million angles per atom."""
    for atoms in generic_frames(range(1, 95), 200, periodic=True):
        assert len(atoms) / atoms.get_volume() < DENSEST * (1 + STRAIN) ** 3
        assert len(neighbor_list("i", atoms, 3.0)) < 50 * len(atoms)


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


def test_a_base_that_joins_is_tried_as_a_start_once() -> None:
    base = toy("painn", SHALLOW["painn"], MANY)
    pair = [relative(base, f"s{k}", rattled("CH3OH", 2, seed=k), seed=k) for k in range(2)]
    recipe = {"preset": "fast", "messages": False, "keep_base": 6}
    _, report = merge(pair, recipe, base=base, device="cpu")
    assert [trial.name for trial in report.trials if "base" in trial.name] == ["base base"]


def test_a_base_that_is_not_at_hand() -> None:
    with pytest.raises(RecipeError, match="--base FILE"):
        merge(family("painn", 2), {"preset": "fast", "keep_base": 4}, device="cpu")
    with pytest.raises(RecipeError, match=r"^recipe: keep_base makes one surface .* or keep_base to 0$"):
        load_recipe({"keep_base": 4, "conditioning": "per-specialist"})


def test_the_switch() -> None:
    assert load_recipe({"keep_base": True}).keep_base == load_recipe(keep_base=True).keep_base == BASE_FRAMES
    assert (
        load_recipe({"keep_base": False}).keep_base
        == load_recipe({"keep_base": 9}, keep_base=False).keep_base
        == 0
    )
    assert load_recipe({"keep_base": 9}).keep_base == 9
    with pytest.raises(RecipeError, match="keep_base"):
        load_recipe({"keep_base": "yes"})


def test_where_frames_say_nothing_the_base_stays() -> None:
    """No atom has the first feature, so that nothing is known of the weights that it meets in the first layer."""
    base = toy("painn", SHALLOW["painn"])
    specialists = [
        replace(s, provenance=Provenance()) for s in family("painn", 2, hyper=SHALLOW["painn"], frames=2)
    ]
    for model in (base, *specialists):
        model.potential.embedding[..., 0] = 0.0
    recipe = {"preset": "fast", "select": False, "core_repulsion": "none"}
    kept, _ = merge(specialists, recipe, base=base, keep_base=2, device="cpu")
    plain, _ = merge(specialists, recipe, device="cpu")

    def weights(model) -> np.ndarray:
        return affine_maps(model.potential.stages[0])["hidden"].read().numpy()

    np.testing.assert_allclose(weights(kept)[0], weights(base)[0], rtol=1e-12)
    assert np.abs(weights(plain)[0] - weights(base)[0]).max() > 1e-3
    assert (np.abs(weights(kept)[1:] - weights(base)[1:]).max(axis=1) > 1e-4).all()


def test_the_report_tells_what_was_forgotten() -> None:
    base, pair = replace(toy("painn"), name="old"), family("painn", 2, frames=2)
    merged, report = merge(
        pair, {"preset": "fast", "select": False, "messages": False}, base=base, keep_base=6, device="cpu"
    )
    assert [row.model for row in report.forgetting] == ["merged", "s0", "s1"]
    first = report.forgetting[0]
    assert first.base == "old"
    assert first.median <= first.worst
    assert f"from old, on {first.n_compounds} compounds that were not in the merge" in report.summary()
    assert merged.merged is not None
    assert MergeReport.from_dict(merged.merged.report) == report
    assert "compounds that were not in the merge" in report_html(merged)
    worse = replace(report, forgetting=(replace(first, relative=5.0),))
    assert worse.verdict == "failed"
    assert (
        "misses on new compounds its base's forces by 500 %; keep_base with more structures, or"
        in worse.warning
    )
    assert "500 %; merge with keep_base, or" in replace(worse, specialists=("s0", "s1")).warning
    shown = {compound(atoms) for atoms in generic_frames(base.species, 6)}
    assert first.worst_compound not in shown


def test_what_does_not_go_with_a_base_that_is_kept() -> None:
    base, pair = toy("painn"), family("painn", 2, frames=2)
    with pytest.raises(RecipeError, match=r"weights \[1.0, 2.0, 3.0\] must be 2 positive numbers"):
        merge(pair, {"preset": "fast", "weights": [1, 2, 3]}, base=base, keep_base=2, device="cpu")
    own = [pair[0], base.with_calibration(pair[1].calibration)]
    with pytest.raises(IncompatibleSpecialistsError, match="joins by itself; leave it out"):
        merge(own, "fast", base=base, keep_base=2, device="cpu")


def test_a_base_is_found_by_its_fingerprint(monkeypatch) -> None:
    base, pair = replace(toy("painn"), provenance=Provenance(origin="Package 1.0")), family("painn", 2)
    vendors = [replace(s, provenance=replace(s.provenance, origin="Package 1.0")) for s in pair]
    assert known_ancestor(vendors) is None
    monkeypatch.setattr(selection, "shipped", lambda architecture: iter([toy("painn", seed=1), base]))
    assert known_ancestor(pair) is None
    assert known_ancestor(vendors) is base
    alike = [replace(s, name="best") for s in vendors]  # files of one name in two folders
    _, report = merge(alike, "mean", device="cpu")
    assert [row.model for row in report.forgetting] == ["merged", "best", "best-2"]


def test_the_calculator_keeps_a_base_that_it_is_given(tmp_path) -> None:
    files = [s.save(tmp_path / f"{s.name}.safetensors") for s in family("painn", 2, frames=2)]
    base = toy("painn").save(tmp_path / "old.safetensors")
    recipe = {"preset": "fast", "select": False, "messages": False, "keep_base": 4}
    options = {"recipe": recipe, "cache_dir": tmp_path / "cache", "device": "cpu"}
    with pytest.raises(RecipeError, match="--base FILE"):
        GFFMergeCalculator(files, **options)
    calc = GFFMergeCalculator(files, keep_base=base, **options)
    assert not calc.cache_hit
    assert calc.report is not None
    assert calc.report.specialists[-1] == "base (base)"
    again = GFFMergeCalculator(**calc.todict())
    assert again.cache_hit
    assert again.force_field.fingerprint == calc.force_field.fingerprint
    with pytest.raises(ArgumentError, match="only one force field"):
        GFFMergeCalculator(files[0], keep_base=True)
