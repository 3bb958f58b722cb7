"""Hyper-parameters are chosen by disagreement with the specialists."""

import numpy as np
import pytest
import torch

from ase_gffmerge.errors import FramesError
from ase_gffmerge.inference.predict import predict_frames
from ase_gffmerge.merging.disagreement import DisagreementMetric
from ase_gffmerge.methods.weight_space import grid_of, tune, weight_space


def silent(fraction: float, text: str) -> None:
    pass


def test_disagreement_is_the_root_mean_square_relative_force_error(make_merge_inputs, architecture) -> None:
    merge_inputs = make_merge_inputs(architecture, 2)
    first, second = merge_inputs.specialists
    ours, theirs = (
        np.concatenate(predict_frames(s.potential, second.calibration).forces) for s in (first, second)
    )
    expected = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs) / 2**0.5
    assert DisagreementMetric.of((first, second)).disagreement(first.potential) == pytest.approx(expected)


def test_at_most_so_many_frames_are_used_evenly(make_merge_inputs) -> None:
    merge_inputs = make_merge_inputs("painn", 2, frames=9)
    specialist = merge_inputs.specialists[0]
    few = DisagreementMetric.of([specialist], n_frames=3)
    chosen = [specialist.calibration[i] for i in (0, 4, 8)]
    np.testing.assert_allclose(few.batches[0][0].positions, np.concatenate([a.positions for a in chosen]))
    assert len(DisagreementMetric.of([specialist]).batches[0][0].cell) == 9


def test_tuning_keeps_the_best_of_all_trials(make_merge_inputs, architecture) -> None:
    merge_inputs = make_merge_inputs(architecture, 2)
    space, metric = weight_space(merge_inputs), DisagreementMetric.of(merge_inputs.specialists)
    grid = grid_of(scale=(2.0, 0.0, 0.5, 1.0))
    trials = []

    def build(scale: float):
        potential = space.potential(space.task_arithmetic(scale))
        trials.append(metric.disagreement(potential))
        return potential

    best = tune(build, grid, metric, progress=silent)
    assert len(set(trials)) == len(grid)
    assert best.disagreement == min(trials)
    assert best.settings == grid[trials.index(min(trials))]
    assert metric.disagreement(best.potential) == best.disagreement
    assert best.merge_output().settings == best.settings


def test_specialists_are_evaluated_once(make_merge_inputs) -> None:
    merge_inputs = make_merge_inputs("painn", 2)
    calls = []
    for specialist in merge_inputs.specialists:
        specialist.potential.register_forward_hook(lambda *args: calls.append(1))
    metric = DisagreementMetric.of(merge_inputs.specialists)
    space = weight_space(make_merge_inputs("painn", 2))
    tune(
        lambda scale: space.potential(scale * space.origin),
        grid_of(scale=(1.0, 2.0)),
        metric,
        progress=silent,
    )
    assert len(calls) == 2


def test_forces_that_are_not_finite_never_win(make_merge_inputs) -> None:
    merge_inputs = make_merge_inputs("painn", 2)
    space, metric = weight_space(merge_inputs), DisagreementMetric.of(merge_inputs.specialists)
    best = tune(
        lambda scale: space.potential(scale * space.origin),
        grid_of(scale=(float("nan"), 5.0)),
        metric,
        progress=silent,
    )
    assert best.settings == {"scale": 5.0}
    assert metric.disagreement(space.potential(torch.nan * space.origin)) == np.inf


def test_a_grid_holds_all_combinations_and_the_first_of_equals_wins(make_merge_inputs) -> None:
    merge_inputs = make_merge_inputs("painn", 2)
    grid = grid_of(a=(1, 2), b=(3.0, 4.0))
    assert grid == [{"a": 1, "b": 3.0}, {"a": 1, "b": 4.0}, {"a": 2, "b": 3.0}, {"a": 2, "b": 4.0}]
    steps = []
    best = tune(
        lambda a, b: merge_inputs.specialists[0].potential,
        grid,
        DisagreementMetric.of(merge_inputs.specialists),
        progress=lambda fraction, text: steps.append((fraction, text)),
    )
    assert best.settings == grid[0]
    assert steps[2] == (0.5, "a 2, b 3")


def test_specialists_without_frames_cannot_judge(make_merge_inputs) -> None:
    merge_inputs = make_merge_inputs("painn", 2)
    with pytest.raises(FramesError, match="no frames"):
        DisagreementMetric.of([s.with_calibration(()) for s in merge_inputs.specialists])
