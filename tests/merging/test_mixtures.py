"""Harder mixtures: many specialists, elements only one of them knows, unequal calibration sets, other zeros of energy."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule

from ase_gffmerge import ForceField, merge
from ase_gffmerge.errors import IncompatibleSpecialistsError
from ase_gffmerge.inference.errors import compare
from ase_gffmerge.inference.predict import predict_frames
from ase_gffmerge.merging.recipe import Recipe, load_recipe
from ase_gffmerge.models import Potential, build_potential
from helpers.toys import rattled

pytestmark = pytest.mark.filterwarnings("ignore::ase_gffmerge.errors.MergeWarning")

MOLECULES = ("CH3CH2OH", "CH3CHO", "CH3OCH3", "HCOOH", "CH3OH", "H2CO")
# made-up specialists agree on no zero of energy, so forces alone are matched closely; their dynamics tears molecules
SMALL = {
    "select": False,
    "readout": {"width": 96, "blocks": 2, "copies": 1, "temperature": 0, "energy_weight": 0.1},
    "directions": 1,
    "messages": False,
}


def recipe(name: str = "closed-form", **options) -> Recipe:
    return load_recipe({"preset": name, **(SMALL if name == "closed-form" else {}), **options})


def disagreement(potential: Potential, specialist: ForceField, frames: Sequence[Atoms] = ()) -> float:
    """Force MAE against the specialist, relative to its own mean force; default: on its calibration frames."""
    frames = frames or specialist.calibration
    own = predict_frames(specialist.potential, frames)
    return (
        compare(predict_frames(potential, frames), own).force_mae / np.abs(np.concatenate(own.forces)).mean()
    )


@pytest.fixture
def merge_inputs(family, architecture):
    """``mixture(k)``: k relatives, each with a molecule of its own."""

    def make(k: int, *, frames: int = 5) -> list[ForceField]:
        specialists = family(architecture, k, size=0.1, frames=1)
        sets = [rattled(name, frames, seed=seed) for seed, name in enumerate(MOLECULES[:k])]
        return [s.with_calibration(frames) for s, frames in zip(specialists, sets)]

    return make


@pytest.mark.parametrize(
    ("architecture", "k"),
    [
        ("painn", 2),
        ("painn", 4),
        pytest.param("painn", 6, marks=pytest.mark.slow),
        ("nequip", 2),
        pytest.param("nequip", 4, marks=pytest.mark.slow),
    ],
)
def test_any_number_of_specialists_merges(merge_inputs, k) -> None:
    """On average over the specialists, the merged potential is nearer to them than the mean of the weights is."""
    specialists = merge_inputs(k)
    (merged, report), (mean, _) = (
        merge(specialists, recipe(name, messages=name != "mean")) for name in ("closed-form", "mean")
    )
    assert merged.merged.specialists == report.specialists == tuple(f"s{i}" for i in range(k))
    assert merged.potential.hyper.n_embeddings == 1
    ours, theirs = (np.mean([disagreement(m.potential, s) for s in specialists]) for m in (merged, mean))
    assert ours < 0.85 * theirs


def restricted(specialist: ForceField, species: tuple[int, ...], frames: Sequence[Atoms]) -> ForceField:
    """The same specialist without what it knows of other elements."""
    whole = specialist.potential
    part = build_potential(whole.architecture, whole.hyper.to_dict(), species).double()
    rows = [whole.species.index(z) for z in species]
    state = dict(whole.state_dict())
    state |= {"embedding": state["embedding"][:, rows], "references": state["references"][rows]}
    part.load_state_dict(state)
    return replace(specialist, potential=part.eval().requires_grad_(False), calibration=tuple(frames))


def test_a_pair_sharing_only_some_elements(family, architecture) -> None:
    """H and C are shared; one specialist knows O besides, the other N."""
    pair = family(architecture, 2, size=0.1, frames=1, species=(1, 6, 7, 8))
    pair = [
        restricted(pair[0], (1, 6, 8), rattled("CH3CHO", 5, seed=0)),
        restricted(pair[1], (1, 6, 7), rattled("CH3CN", 5, seed=1)),
    ]
    (merged, _), (mean, _) = (merge(pair, recipe(name)) for name in ("closed-form", "mean"))
    assert merged.species == (1, 6, 7, 8)
    for specialist in pair:
        assert disagreement(merged.potential, specialist) < 0.9 * disagreement(mean.potential, specialist)
    together = molecule("CH3CHO") + molecule("CH3CN")
    assert np.isfinite(predict_frames(merged.potential, [together]).forces[0]).all()
    for owner, z in ((0, 8), (1, 7)):
        own = pair[owner].potential
        torch.testing.assert_close(
            merged.potential.embedding[0, merged.species.index(z)], own.embedding[0, own.species.index(z)]
        )


def test_repeating_frames_of_one_specialist_changes_nothing(merge_inputs) -> None:
    """Ten times the rows with the same content: normalised statistics are the same, the paper's are not."""
    first, second = merge_inputs(2, frames=4)
    repeated = first.with_calibration(first.calibration * 10)
    frames = [*first.calibration, *second.calibration]

    def forces(specialists: list[ForceField], **options) -> np.ndarray:
        plain = load_recipe(
            {
                "preset": "closed-form",
                "readout": None,
                "directions": 0,
                "messages": False,
                "ridge": 1e-3,
                **options,
            }
        )
        return np.concatenate(predict_frames(merge(specialists, plain)[0].potential, frames).forces)

    scale = np.abs(forces([first, second])).max()
    np.testing.assert_allclose(
        forces([repeated, second]), forces([first, second]), atol=1e-6 * scale, rtol=1e-6
    )
    tilted = forces([repeated, second], preset="paper") - forces([first, second], preset="paper")
    assert np.abs(tilted).max() > 1e-3 * scale


@pytest.mark.parametrize(
    ("architecture", "large"),
    [
        ("painn", 0),
        pytest.param("painn", 1, marks=pytest.mark.slow),
        pytest.param("nequip", 0, marks=pytest.mark.slow),
    ],
)
def test_a_large_calibration_set_does_not_push_the_small_one_aside(merge_inputs, large) -> None:
    """30 frames against 3: on new frames the small one loses nothing that it had at 3 against 3."""
    pair = merge_inputs(2, frames=3)
    small = 1 - large
    unequal = list(pair)
    unequal[large] = pair[large].with_calibration(rattled(MOLECULES[large], 30, seed=7))
    new = rattled(MOLECULES[small], 8, seed=8)
    errors = [
        disagreement(merge(specialists, recipe())[0].potential, pair[small], new)
        for specialists in (pair, unequal)
    ]
    assert errors[1] < 1.15 * errors[0]


def test_other_zeros_of_energy_are_aligned_and_reported(merge_inputs) -> None:
    """Three specialists of one theory, each counting from a zero of its own."""
    plain = merge_inputs(3, frames=2)
    tables = {"s1": (3.0, 500.0, 800.0), "s2": (-2.0, 40.0, 7.0)}
    shifted = merge_inputs(3, frames=2)
    for specialist, table in zip(shifted[1:], tables.values()):
        specialist.potential.references += torch.tensor(table, dtype=torch.float64)
    (reference, unshifted), (merged, report) = (merge(s, recipe(directions=0)) for s in (plain, shifted))
    assert not unshifted.energy_shifts
    assert report.energy_shifts == {
        name: pytest.approx(dict(zip("HCO", table))) for name, table in tables.items()
    }
    frames = [atoms for specialist in plain for atoms in specialist.calibration]
    ours, theirs = (predict_frames(m.potential, frames) for m in (merged, reference))
    np.testing.assert_allclose(ours.energies, theirs.energies, atol=1e-6)
    np.testing.assert_allclose(np.concatenate(ours.forces), np.concatenate(theirs.forces), atol=1e-8)


def test_another_theory_among_many_is_refused_unless_allowed(merge_inputs) -> None:
    *same, last = merge_inputs(4, frames=1)
    specialists = [*same, replace(last, level_of_theory="GFN2-xTB")]
    for others in pairwise(specialists[:3]):
        merge(others, recipe("mean"))
    with pytest.raises(
        IncompatibleSpecialistsError, match=r"'s0' and 's3' .*'toy', 'GFN2-xTB'.*allow_mixed_theory"
    ):
        merge(specialists, recipe("mean"))
    merged, _ = merge(specialists, recipe("mean", allow_mixed_theory=True))
    assert merged.level_of_theory == "toy + GFN2-xTB"
