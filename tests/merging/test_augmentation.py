"""Copies of calibration frames: how many, how far, and that nothing else moves."""

import numpy as np
import pytest

from ase_gffmerge.forcefield.force_field import ForceField
from ase_gffmerge.integrations.load import load_force_field
from ase_gffmerge.merging.augmentation import copies_per_frame, with_copies
from ase_gffmerge.merging.recipe import ReadoutOptions


@pytest.fixture(scope="module")
def ethanol() -> ForceField:
    return load_force_field("rmd17-ethanol")


def spread(copies, frames) -> float:
    """Root mean square displacement in Å of copies from the frames they start at, copy by copy in turn."""
    shifts = [copy.positions - frames[i % len(frames)].positions for i, copy in enumerate(copies)]
    return float(np.sqrt(np.square(shifts).mean()))


def test_without_temperature_copies_are_displaced_at_random(family) -> None:
    specialist = family("painn", 1)[0]
    frames = specialist.calibration
    before = [atoms.positions.copy() for atoms in frames]
    options = ReadoutOptions(temperature=0, displacement=0.05)
    copies = with_copies(specialist, frames, options, n_copies=30)[len(frames) :]
    assert len(copies) == 30 * len(frames)
    shifts = np.concatenate([c.positions - frames[i % len(frames)].positions for i, c in enumerate(copies)])
    assert shifts.std() == pytest.approx(0.05, rel=0.05)
    assert all(np.array_equal(atoms.positions, old) for atoms, old in zip(frames, before))


def test_dynamics_visits_further_structures_with_time_and_temperature(ethanol: ForceField) -> None:
    frames = ethanol.calibration[:3]

    def visited(temperature: float, interval: float) -> float:
        options = ReadoutOptions(temperature=temperature, interval=interval)
        result = with_copies(ethanol, frames, options, n_copies=1)
        assert [atoms.positions.tolist() for atoms in result[:3]] == [a.positions.tolist() for a in frames]
        assert all((atoms.numbers == ethanol.calibration[0].numbers).all() for atoms in result)
        return spread(result[3:], frames)

    assert 0 < visited(300, 4) < visited(300, 20) < visited(1500, 20) < 0.5


def test_copies_are_reproducible_and_keep_real_masses(ethanol: ForceField) -> None:
    first, again = (
        with_copies(ethanol, ethanol.calibration[:2], ReadoutOptions(interval=4), n_copies=2)
        for _ in range(2)
    )
    assert all(np.array_equal(a.positions, b.positions) for a, b in zip(first, again, strict=True))
    assert len(first) == 6
    assert all(not atoms.has("masses") and atoms.calc is None for atoms in first)


def test_broken_structures_are_not_copied(ethanol: ForceField) -> None:
    torn = ethanol.calibration[0].copy()
    hot = with_copies(ethanol, [torn], ReadoutOptions(temperature=60_000, interval=40), n_copies=5)
    assert 1 <= len(hot) < 6


def test_groups_of_frames_visit_what_all_together_visit(ethanol: ForceField, monkeypatch) -> None:
    together = with_copies(ethanol, ethanol.calibration[:3], ReadoutOptions(interval=4), n_copies=1)
    monkeypatch.setattr("ase_gffmerge.merging.augmentation.MAX_EDGES", 150)  # two molecules
    apart = with_copies(ethanol, ethanol.calibration[:3], ReadoutOptions(interval=4), n_copies=1)
    assert len(apart) == 6
    for one, other in zip(together, apart, strict=True):
        np.testing.assert_allclose(one.positions, other.positions, rtol=0, atol=1e-4)


def test_large_structures_get_fewer_copies(ethanol: ForceField) -> None:
    frames = ethanol.calibration[:10]
    n_edges = sum(len(atoms) * (len(atoms) - 1) for atoms in frames)  # all atoms are within the cutoff
    for expected, options in (
        (8, {"copies": 8}),
        (3, {"copies": 8, "max_copied_edges": 3 * n_edges}),
        (2, {"copies": 8, "max_copied_edges": 3 * n_edges - 1}),
        (1, {"copies": 8, "max_copied_edges": 1}),
        (0, {"copies": 0}),
    ):
        assert copies_per_frame(ethanol, frames, ReadoutOptions(**options)) == expected
