"""Specialists whose forces vanish by symmetry: errors are not divided by nothing, and energies and stresses speak."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from hypothesis import given, settings
from hypothesis import strategies as st

from ase_gffmerge import merge
from ase_gffmerge.evaluation.comparison.compare import _ratio
from ase_gffmerge.inference.errors import (
    ENERGY_FLOOR,
    FORCE_FLOOR,
    STRESS_FLOOR,
    Errors,
    Scales,
    relative_error,
    relative_squares,
)
from ase_gffmerge.inference.predict import FramePredictions, predict_frames
from ase_gffmerge.merging.calibration import build_calibration
from ase_gffmerge.merging.disagreement import DisagreementMetric, diagnose
from ase_gffmerge.merging.recipe import DistillOptions, ReadoutOptions
from ase_gffmerge.merging.report import MergeReport
from ase_gffmerge.merging.report_plot import report_figure, report_html
from ase_gffmerge.training.distill import distill
from ase_gffmerge.training.loss import relative_error_on
from ase_gffmerge.training.teachers import prepare_teachers
from helpers.toys import family, rattled

PLAIN = {"preset": "closed-form", "readout": None, "refine": None}


def crystals() -> tuple[Atoms, ...]:
    """An equation of state: perfect crystals have no forces."""
    return tuple(bulk("Cu", "fcc", a=a, cubic=True) for a in (3.4, 3.5, 3.6, 3.7, 3.8, 3.9))


@pytest.fixture
def pair():
    normal, silent = family("painn", 2, species=(1, 6, 8, 29))
    return [normal, replace(silent, calibration=crystals())]


def made_up(*, forces: float, seed: int = 0, n: int = 8) -> FramePredictions:
    """Predictions for frames of two elements in several compositions, with forces of this size."""
    rng = np.random.default_rng(seed)
    numbers = [rng.choice([1, 29], size=4) for _ in range(n)]
    stresses = [rng.normal(size=(3, 3)) for _ in range(n)]
    return FramePredictions(
        numbers=numbers,
        energies=rng.normal(size=n),
        forces=[forces * rng.normal(size=(4, 3)) for _ in range(n)],
        stresses=[0.1 * (s + s.T) for s in stresses],
    )


def scaled(
    predictions: FramePredictions, *, forces: float, energies: float, stresses: float
) -> FramePredictions:
    """The same predictions times factors."""
    return replace(
        predictions,
        energies=energies * predictions.energies,
        forces=[forces * f for f in predictions.forces],
        stresses=[stresses * s for s in predictions.stresses],
    )


@given(st.floats(0.001, 0.5), st.integers(0, 100))
@settings(max_examples=30, deadline=None)
def test_forces_speak_where_there_are_any_and_the_worst_of_all_where_not(error: float, seed: int) -> None:
    loud, silent = (made_up(forces=f, seed=seed) for f in (1.0, 1e-6))
    wrong = {"forces": 1 + error, "energies": 1 + 3 * error, "stresses": 1 + 2 * error}
    for reference, expected in ((loud, error), (silent, 3 * error)):
        predicted = scaled(reference, **wrong)
        assert relative_error(predicted, reference) == pytest.approx(expected)
        assert np.sqrt(relative_squares(predicted, reference).mean()) == pytest.approx(expected)
    wrong["energies"] = 1.0
    assert relative_error(scaled(silent, **wrong), silent) == pytest.approx(2 * error)


@given(st.floats(-10, 10), st.floats(-10, 10))
@settings(max_examples=30, deadline=None)
def test_shifts_of_the_elements_are_no_errors(hydrogen: float, copper: float) -> None:
    reference = made_up(forces=0.0)
    shifts = np.array([np.where(z == 1, hydrogen, copper).sum() for z in reference.numbers])
    assert relative_error(replace(reference, energies=reference.energies + shifts), reference) < 1e-9


def test_floors() -> None:
    """A quantity that does not vary is not divided by nothing, and what is not finite is infinitely wrong."""
    nothing = scaled(made_up(forces=1.0), forces=0.0, energies=0.0, stresses=0.0)
    size = Scales.of(nothing)
    assert size == Scales(force=0.0, energy=0.0, stress=0.0)
    assert Scales(force=FORCE_FLOOR, energy=0.0).relative(size) == (1.0, "forces")
    assert Scales(force=0.0, energy=ENERGY_FLOOR).relative(size) == (1.0, "energies")
    assert Scales(force=0.0, energy=0.0, stress=STRESS_FLOOR).relative(size) == (1.0, "stresses")
    broken = replace(nothing, energies=np.full(8, np.nan))
    assert np.isnan(relative_error(broken, nothing))


def test_a_merge_that_is_right_where_forces_vanish_is_not_called_failed(pair) -> None:
    copies = [replace(pair[1], name="a"), replace(pair[1], name="b")]
    _, report = merge(copies, {"preset": "mean", "allow_identical": True}, device="cpu")
    silent = [d for d in report.disagreements if d.model == "merged"]
    assert all(d.force_rms < 1e-3 for d in silent)
    assert report.relative_disagreement < 1e-6
    assert report.verdict == "good"


def test_energies_and_stresses_decide_where_forces_are_silent(pair) -> None:
    """A potential without forces on perfect crystals, as all have none, but with wrong energies."""
    normal, silent = pair
    other = family("painn", 1, species=(1, 6, 8, 29), size=1.0)[0].potential
    rows, parity = diagnose([silent], normal.potential, other)
    report = MergeReport(
        specialists=("s1",), layers=(), disagreements=rows, held_out=None, energy_shifts={}, seconds={}
    )
    merged = next(row for row in rows if row.model == "merged")
    assert merged.force_rmse < 1e-6
    assert report.verdict == "failed"
    assert report.relative_disagreement == pytest.approx(
        max(merged.energy_rmse / merged.energy_rms, merged.stress_rmse / merged.stress_rms)
    )
    assert report.missed.startswith(f"it misses a specialist's {merged.relative[1]} by")
    assert merged.relative[1] in ("energies", "stresses")
    assert MergeReport.from_dict(report.to_dict()) == report
    assert parity[0].quantity == "energies"
    assert len(parity[0].reference) == 6
    assert np.ptp(parity[0].reference) > 1e-3


def test_silent_frames_do_not_ruin_the_layers_of_a_normal_specialist() -> None:
    """Vectors vanish in perfect crystals; their round-off, scaled to the size of values, would count like values."""
    normal, silent = family("painn", 2, species=(1, 6, 8, 29), frames=10)
    moved = [rattled(atoms, 1, seed=k)[0] for k, atoms in enumerate(crystals())]
    errors = []
    for frames in (crystals(), moved):
        pair = [normal, replace(silent, calibration=tuple(frames))]
        report = merge(pair, PLAIN, device="cpu")[1]
        errors += [d.force_mae for d in report.disagreements if (d.specialist, d.model) == ("s0", "merged")]
    assert errors[0] < 2.5 * errors[1]  # it was 17 times


def test_a_readout_beside_silent_frames(pair) -> None:
    """The verdict is good, and right: of forces, and of the equation of state."""
    recipe = {"preset": "closed-form", "readout": {"width": 128, "copies": 1}}
    merged, report = merge(pair, recipe, device="cpu")
    assert report.verdict == "good"
    assert all(len(trial.disagreements) == 2 for trial in report.trials)
    assert "<h2>What was tried</h2>" in report_html(merged)
    for index, specialist in enumerate(pair):
        own, found = (
            predict_frames(potential, specialist.calibration, specialist=index)
            for potential in (specialist.potential, merged.potential)
        )
        assert relative_error(found, own) < 0.05


def test_what_is_divided_by_has_a_floor(pair) -> None:
    sets = build_calibration(pair, pair[0].potential, (1.0, 1.0), directions=0)
    assert sets[0].mean_square_force > FORCE_FLOOR**2
    assert sets[1].mean_square_force == FORCE_FLOOR**2
    options = ReadoutOptions(energy_weight=0.0)
    own = predict_frames(pair[1].potential, pair[1].calibration)
    strain = np.mean(
        [
            np.square(stress * atoms.get_volume()).sum() / 12
            for stress, atoms in zip(own.stresses, crystals(), strict=True)
        ]
    )
    assert sets[1].mean_square_target(options) == pytest.approx(0.3**2 * strain, rel=1e-6)
    nothing = ReadoutOptions(energy_weight=0.0, stress_weight=0.0)
    assert sets[1].mean_square_target(nothing) == FORCE_FLOOR**2


def test_tuning_hears_energies_and_stresses(pair) -> None:
    metric = DisagreementMetric.of([pair[1]])
    with torch.no_grad():
        assert metric.disagreement(pair[1].potential) < 1e-9
        own, other = (predict_frames(p.potential, crystals()) for p in reversed(pair))
        assert metric.disagreement(pair[0].potential) == pytest.approx(relative_error(other, own))
    assert relative_error(other, own) > 0.01


def test_ratios_of_errors_have_a_floor() -> None:
    own, worse = (
        Errors(force_mae=f, force_rmse=f, energy_mae=e, n_frames=1) for f, e in ((0, 0.01), (1e-6, 0.02))
    )
    assert _ratio(worse, own) == pytest.approx(2.0)
    loud = replace(own, force_mae=0.05)
    assert _ratio(replace(loud, force_mae=0.1), loud) == pytest.approx(2.0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ase_gffmerge.errors.MergeWarning")
def test_distillation_beside_silent_frames(pair) -> None:
    start = merge(pair, {"preset": "mean"}, device="cpu")[0]
    options = DistillOptions(epochs=2, copies=1)
    distilled, _ = distill(start, pair, options, device="cpu")
    teachers = prepare_teachers(start.potential, pair, options, frames=[(), ()], weights=(1.0, 1.0))
    weights = [float(graphs[0].weight) for graphs in teachers.training]
    assert 0.05 < weights[0] / weights[1] < 20
    before, after = (
        [relative_error_on(p, graphs) for graphs in teachers.held_out]
        for p in (start.potential, distilled.potential)
    )
    assert sum(after) < sum(before)
    assert all(new < 1.01 * old for new, old in zip(after, before, strict=True)), "neither is ruined"


def test_the_figure_of_a_report_with_nothing_to_show(pair) -> None:
    """No frames, no numbers: a figure all the same, and a page only of what was merged."""
    blank = MergeReport(
        specialists=("a", "b"), layers=(), disagreements=(), held_out=None, energy_shifts={}, seconds={}
    )
    texts = [t.get_text() for panel in report_figure(blank).subfigs for a in panel.axes for t in a.texts]
    assert "no calibration frames" in texts
    with pytest.raises(ValueError, match="is no merge"):
        report_html(pair[0])
