"""Specialists whose forces vanish by symmetry: errors are not divided by nothing."""

from dataclasses import replace

import pytest
import torch
from ase.build import bulk

from ase_gffmerge import merge
from ase_gffmerge.inference.errors import FORCE_FLOOR
from ase_gffmerge.merging.calibration import build_calibration
from ase_gffmerge.merging.disagreement import DisagreementMetric
from helpers.toys import family, rattled


def crystals() -> tuple:
    """An equation of state: perfect crystals have no forces."""
    return tuple(bulk("Cu", "fcc", a=a, cubic=True) for a in (3.4, 3.5, 3.6, 3.7, 3.8, 3.9))


@pytest.fixture
def pair():
    normal, silent = family("painn", 2, species=(1, 6, 8, 29))
    return [normal, replace(silent, calibration=crystals())]


def test_a_merge_that_is_right_where_forces_vanish_is_not_called_failed(pair) -> None:
    copies = [replace(pair[1], name="a"), replace(pair[1], name="b")]
    _, report = merge(copies, {"preset": "mean", "allow_identical": True}, device="cpu")
    silent = [d for d in report.disagreements if d.model == "merged"]
    assert all(d.force_rms < 1e-3 for d in silent)
    assert report.relative_disagreement < 1e-6
    assert report.verdict == "good"


@pytest.mark.parametrize("architecture", ["painn", pytest.param("nequip", marks=pytest.mark.slow)])
def test_silent_frames_do_not_ruin_the_layers_of_a_normal_specialist(architecture: str) -> None:
    """Vectors vanish in perfect crystals; their round-off, scaled to the size of values, would count like values."""
    normal, silent = family(architecture, 2, species=(1, 6, 8, 29), frames=20)
    moved = [rattled(atoms, 1, seed=k)[0] for k, atoms in enumerate(crystals())]
    errors = []
    for frames in (crystals(), moved):
        pair = [normal, replace(silent, calibration=tuple(frames))]
        report = merge(pair, {"readout": None}, device="cpu")[1]
        errors += [d.force_mae for d in report.disagreements if (d.specialist, d.model) == ("s0", "merged")]
    assert errors[0] < 2.5 * errors[1]  # without the floor 17 and 3 times


def test_what_is_divided_by_has_a_floor(pair) -> None:
    sets = build_calibration(pair, pair[0].potential, (1.0, 1.0), directions=0)
    assert sets[0].mean_square_force > FORCE_FLOOR**2
    assert sets[1].mean_square_force == FORCE_FLOOR**2
    metric = DisagreementMetric.of(pair)
    with torch.no_grad():
        assert metric.disagreement(pair[1].potential) < 1e3
