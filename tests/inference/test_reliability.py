"""Reliability of standard deviations: against distributions that are known."""

import numpy as np
import pytest
from scipy.stats import norm, spearmanr

from ase_gffmerge.evaluation.plots import plot_reliability
from ase_gffmerge.inference.errors import keys_of_models, with_predictions
from ase_gffmerge.inference.predict import FramePredictions
from ase_gffmerge.inference.reliability import LEVELS, Deviations, Reliability, reliability
from helpers.toys import labelled, rattled


@pytest.fixture
def deviations(rng) -> np.ndarray:
    return rng.uniform(0.1, 2.0, size=(4000, 3))


@pytest.mark.parametrize("factor", [0.5, 1.0, 3.0])
def test_normal_errors_of_a_known_size(deviations, rng, factor: float) -> None:
    """Errors ``factor`` times as large as foretold: shares and calibration error of the normal distribution."""
    found = Reliability.of(factor * deviations * rng.standard_normal(deviations.shape), deviations)
    expected = 2 * norm.cdf(norm.ppf((1 + LEVELS) / 2) / factor) - 1
    np.testing.assert_allclose(found.observed, expected, atol=0.015)
    assert found.calibration_error == pytest.approx(np.abs(expected - LEVELS).mean(), abs=0.01)
    assert found.ratio == pytest.approx(factor, rel=0.02)
    assert found.n == deviations.size


def test_rank_correlation_is_that_of_lengths(deviations, rng) -> None:
    errors = deviations * rng.standard_normal(deviations.shape)
    expected = spearmanr(np.linalg.norm(errors, axis=1), np.linalg.norm(deviations, axis=1)).statistic
    assert Reliability.of(errors, deviations).rank_correlation == pytest.approx(expected)
    single = Reliability.of(errors[:, 0], deviations[:, 0])
    assert single.rank_correlation == pytest.approx(spearmanr(abs(errors[:, 0]), deviations[:, 0]).statistic)
    assert np.isnan(Reliability.of(errors, np.ones_like(errors)).rank_correlation)


def test_what_is_infinitely_uncertain_does_not_count(deviations, rng) -> None:
    errors = deviations * rng.standard_normal(deviations.shape)
    expected = Reliability.of(errors[10:], deviations[10:])
    deviations[:10, 1] = np.inf
    assert Reliability.of(errors, deviations) == expected


def test_of_frames_and_in_their_files(rng, tmp_path) -> None:
    frames = [labelled(atoms) for atoms in rattled("CH3OH", 3)]
    forces = [rng.standard_normal((len(a), 3)) for a in frames]
    error = FramePredictions(
        numbers=[a.numbers for a in frames],
        energies=np.array([1.0, 2.0, 3.0]),
        forces=forces,
        stresses=[None] * 3,
    )
    spread = Deviations(np.array([1.0, 1.0, 2.0]), [np.full((len(a), 3), 0.5) for a in frames])
    found = reliability(error, spread)
    assert found["energies"] == Reliability.of(error.energies, spread.energies)
    assert found["forces"].n == 3 * sum(map(len, frames))
    (name,) = keys_of_models(["a+b"])
    copies = with_predictions(frames, {"a+b": error}, {"a+b": spread})
    assert [copy.info[f"{name}_energy_std"] for copy in copies] == [1.0, 1.0, 2.0]
    np.testing.assert_array_equal(copies[1].arrays[f"{name}_forces_std"], spread.forces[1])
    path = plot_reliability({"forces": {"all": found["forces"]}, "energies": found}, tmp_path / "r.png")
    assert path.stat().st_size > 5000
