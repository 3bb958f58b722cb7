"""Closed-loop calibration: visited frames come back as calibration frames."""

import numpy as np
import pytest
import torch
import yaml

from ase_gffmerge import ForceField, GFFMergeCalculator, merge
from ase_gffmerge.data.frames import bare, evenly
from ase_gffmerge.errors import RecipeError
from ase_gffmerge.inference.errors import Errors
from ase_gffmerge.inference.predict import predict_frames
from ase_gffmerge.merging.recipe import ClosedLoopOptions, TrajectoryOptions, load_recipe
from ase_gffmerge.merging.report import MergeReport
from ase_gffmerge.storage.documents import validated
from ase_gffmerge.workflows.active_learning import ClosedLoopResult, RolloutReport, closed_loop, run_rollouts

pytestmark = pytest.mark.filterwarnings("ignore::ase_gffmerge.errors.MergeWarning")

RECIPE = {
    "preset": "closed-form",
    "select": False,
    "readout": {"width": 8, "blocks": 1, "copies": 0},
    "directions": 0,
    "core_repulsion": "none",
}
SHORT = {"temperature": 50.0, "replicas": 2, "time": 0.04, "max_grade": None}


def run(pair: list[ForceField], recipe: dict | None = None, **options) -> ClosedLoopResult:
    return closed_loop(
        pair, {**RECIPE, **(recipe or {})}, ClosedLoopOptions(**SHORT, **options), device="cpu"
    )


def weights(specialist: ForceField) -> torch.Tensor:
    return torch.cat([value.flatten() for value in specialist.potential.state_dict().values()])


def test_each_round_merges_with_the_frames_visited_in_the_one_before(pair):
    result = run(pair, rounds=1, frames=3)
    assert [entry.n_frames for entry in result.rounds] == [(6, 6), (9, 9)]
    assert [len(specialist.calibration) for specialist in pair] == [6, 6]
    grown = pair
    for k in range(result.chosen):
        visited = [trajectory.visited for trajectory in result.rounds[k].trajectories]
        grown = [
            s.with_calibration((*s.calibration, *(bare(v[i], wrap=True) for i in evenly(len(v), 3))))
            for s, v in zip(grown, visited, strict=True)
        ]
    expected, _ = merge(grown, RECIPE, device="cpu")
    torch.testing.assert_close(weights(result.merged), weights(expected), rtol=0, atol=0)


def test_follow_compares_merged_potential_and_specialist_where_it_went(pair):
    merged, _ = merge(pair, RECIPE, device="cpu")
    for specialist, trajectory in zip(
        pair, run_rollouts(merged, pair, TrajectoryOptions(**SHORT)), strict=True
    ):
        assert len(trajectory.visited) == 2 * 2
        assert trajectory.stable
        assert trajectory.mean_time == pytest.approx(0.04)
        ours = predict_frames(merged.potential, trajectory.visited)
        theirs = predict_frames(specialist.potential, trajectory.visited)
        difference = np.concatenate(ours.forces) - np.concatenate(theirs.forces)
        assert trajectory.disagreement is not None
        assert trajectory.disagreement.force_mae == pytest.approx(np.abs(difference).mean(), rel=1e-6)
        numbers = specialist.calibration[0].numbers
        assert all((atoms.numbers == numbers).all() for atoms in trajectory.visited)


@pytest.mark.parametrize("architecture", ["painn"])
def test_rounds_start_elsewhere(pair):
    merged, _ = merge(pair, RECIPE, device="cpu")
    first, second = (run_rollouts(merged, pair, TrajectoryOptions(**SHORT), seed=seed)[0] for seed in (0, 1))
    assert not np.allclose(first.visited[0].positions, second.visited[0].positions)


def test_conditioned_potentials_move_as_their_specialist(pair):
    result = run(pair, {"conditioning": "per-specialist"}, rounds=1, frames=2)
    merged, second = result.merged, result.rounds[result.chosen].trajectories[1]
    energies = [atoms.get_potential_energy() for atoms in second.visited]
    as_second = predict_frames(merged.potential, second.visited, specialist=1).energies
    np.testing.assert_allclose(energies, as_second, atol=1e-6)
    assert (
        np.abs(energies - predict_frames(merged.potential, second.visited, specialist=0).energies).max()
        > 1e-5
    )


@pytest.mark.parametrize("architecture", ["painn"])
def test_what_breaks_is_neither_followed_nor_labelled(pair):
    merged, _ = merge(pair, RECIPE, device="cpu")
    hot = TrajectoryOptions(**{**SHORT, "temperature": 50000.0, "time": 0.2})
    for trajectory in run_rollouts(merged, pair, hot):
        assert not trajectory.stable
        assert sum(trajectory.stopped.values()) == 2
        assert trajectory.mean_time < 0.2
        assert len(trajectory.visited) < 2 * 10
    unknown = TrajectoryOptions(**{**SHORT, "max_grade": 1e-9})
    for trajectory in run_rollouts(merged, pair, unknown):
        assert trajectory.stopped == {"extrapolation": 2}
        assert trajectory.visited == ()
        assert trajectory.disagreement is None


def trajectory(error: float, broken: int) -> RolloutReport:
    return RolloutReport(
        specialist="s",
        visited=(),
        disagreement=Errors(error, error, error, 1),
        n_replicas=4,
        stopped={"bond broken": broken} if broken else {},
        mean_time=1.0,
    )


@pytest.mark.parametrize("architecture", ["painn"])
@pytest.mark.parametrize(
    ("history", "n_rounds", "chosen"),
    [
        ([(0.05, 0), (0.03, 0), (0.0299, 0), (0.01, 0)], 3, 2),  # stable, and falls no more
        ([(0.05, 0), (0.06, 0), (0.01, 0), (0.01, 0)], 2, 0),
        (
            [(0.05, 0), (0.06, 1), (0.04, 0), (0.01, 2)],
            4,
            2,
        ),  # goes on while replicas break, and prefers those that hold
        ([(0.05, 3), (0.06, 2), (0.06, 1), (0.07, 1)], 4, 2),
    ],
)
def test_when_the_loop_ends_and_what_it_chooses(pair, monkeypatch, history, n_rounds, chosen):
    once = merge(pair, RECIPE, device="cpu")
    monkeypatch.setattr("ase_gffmerge.workflows.active_learning.closed_form_merge", lambda *_, **__: once)
    told = iter(history)
    monkeypatch.setattr(
        "ase_gffmerge.workflows.active_learning.run_rollouts", lambda *_, **__: (trajectory(*next(told)),) * 2
    )
    result = closed_loop(pair, RECIPE, ClosedLoopOptions(rounds=3, tolerance=0.02), device="cpu")
    assert (len(result.rounds), result.chosen) == (n_rounds, chosen)


@pytest.mark.parametrize("architecture", ["painn"])
def test_the_loop_is_on_record_and_in_words(pair, tmp_path):
    told: list[float] = []
    options = ClosedLoopOptions(**SHORT, rounds=1, frames=2)
    result = closed_loop(
        pair,
        {"preset": "paper", "ridge": 1e6},
        options,
        device="cpu",
        progress=lambda fraction, _: told.append(fraction),
    )
    assert told == sorted(told)
    assert told[-1] == 1.0
    loaded = ForceField.load(result.merged.save(tmp_path / "merged.safetensors"))
    assert loaded.merged is not None
    assert load_recipe(loaded.merged.recipe).closed_loop == options
    assert "(chosen)" in result.report.summary()
    assert "round 1: differs by methanol" in result.report.summary()
    assert result.report.closed_loop["rounds"][1]["n_frames"] == [8, 8]
    assert MergeReport.from_dict(loaded.merged.report) == result.report


def test_unknown_options_get_a_suggestion():
    with pytest.raises(RecipeError, match="did you mean 'rounds'"):
        validated(ClosedLoopOptions, {"round": 3}, source="closed loop")


# -- closed_loop in recipes --


@pytest.mark.parametrize("architecture", ["painn"])
def test_a_recipe_with_a_loop_is_loaded_through_the_calculator_and_cached(pair, tmp_path):
    paths = [specialist.save(tmp_path / f"{specialist.name}.safetensors") for specialist in pair]
    written = tmp_path / "loop.yaml"
    written.write_text(yaml.safe_dump({**RECIPE, "closed_loop": {**SHORT, "rounds": 1, "frames": 2}}))
    made, cached = (
        GFFMergeCalculator(paths, recipe=str(written), cache_dir=tmp_path, device="cpu") for _ in range(2)
    )
    assert (made.cache_hit, cached.cache_hit) == (False, True)
    loaded = [ForceField.load(path) for path in paths]
    by_hand = closed_loop(loaded, load_recipe(written), device="cpu").merged
    for calculator in (made, cached):
        torch.testing.assert_close(
            weights(calculator.force_field).double(), weights(by_hand).double(), rtol=1e-6, atol=1e-6
        )
    again = GFFMergeCalculator(
        paths, recipe=cached.force_field.merged.recipe, cache_dir=tmp_path, device="cpu"
    )
    assert again.cache_hit, "the recipe on record is the one that was asked for"


@pytest.mark.parametrize("architecture", ["painn"])
def test_a_loop_comes_before_a_distillation(pair):
    recipe = {
        **RECIPE,
        "closed_loop": {**SHORT, "rounds": 1, "frames": 2},
        "refine": {"epochs": 1, "copies": 0, "threshold": 0.0},
    }
    merged, report = merge(pair, recipe, device="cpu")
    assert "distillation" in report.seconds
    assert load_recipe(merged.merged.recipe) == load_recipe(recipe)


@pytest.mark.parametrize("architecture", ["painn"])
def test_a_merge_does_the_loop_of_its_recipe(pair):
    recipe = {**RECIPE, "closed_loop": {**SHORT, "rounds": 1, "frames": 2}}
    (merged, report), by_hand = merge(pair, recipe, device="cpu"), closed_loop(pair, recipe, device="cpu")
    assert merged.fingerprint == by_hand.merged.fingerprint
    assert len(report.closed_loop["rounds"]) == 2
    with pytest.raises(RecipeError, match="did you mean 'rounds'"):
        load_recipe({"closed_loop": {"round": 1}})
