"""Where a merge begins, and which of its steps are kept."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ase_gffmerge import merge
from ase_gffmerge.errors import IncompatibleSpecialistsError
from ase_gffmerge.merging import merge as module
from ase_gffmerge.merging.average import mean_potential
from ase_gffmerge.merging.disagreement import DisagreementMetric, Distance
from ase_gffmerge.merging.recipe import load_recipe
from ase_gffmerge.merging.report import MergeReport
from ase_gffmerge.merging.selection import Selection, split_frames, starting_points
from helpers.toys import relative, toy

pytestmark = pytest.mark.filterwarnings("ignore::ase_gffmerge.errors.MergeWarning")
FAST = {"preset": "fast", "directions": 1}


def distance(*squares: list[float]) -> Distance:
    sizes = tuple(np.full(len(own), 9) for own in squares)
    weights = (1 / len(squares),) * len(squares)
    return Distance(squares=tuple(map(np.array, squares)), sizes=sizes, weights=weights)


def test_a_gain_counts_when_it_is_larger_than_its_error() -> None:
    before = distance([0.04, 0.05, 0.06, 0.05], [0.01, 0.01, 0.02, 0.01])
    assert distance([0.03, 0.04, 0.05, 0.04], [0.01, 0.01, 0.02, 0.01]).below(before)
    assert not distance([0.01, 0.10, 0.01, 0.075], [0.01, 0.01, 0.02, 0.01]).below(before), (
        "one frame decides"
    )
    assert not before.below(before)
    broken = distance([np.nan] * 4, [0.01] * 4)
    assert before.below(broken)
    assert not broken.below(before)


@given(st.lists(st.floats(1e-4, 1.0), min_size=2, max_size=8), st.floats(0.5, 0.99))
def test_a_gain_on_every_frame_alike_counts(errors: list[float], factor: float) -> None:
    """Errors that all shrink by one factor differ by frame only as much as they do themselves."""
    mean, spread = np.mean(errors), np.std(errors, ddof=1) / len(errors) ** 0.5
    smaller, before = distance([factor * e for e in errors]), distance(errors)
    assert not before.below(smaller)
    if mean > 1.01 * spread:
        assert smaller.below(before)


def test_frames_to_choose_by_are_not_fitted(family) -> None:
    (specialist, *_) = family("painn", 1, frames=23)
    fitted, held_out = split_frames(specialist, 7)
    assert len(fitted) == 7
    assert held_out == [specialist.calibration[9], specialist.calibration[19]]
    assert not any(atoms in fitted for atoms in held_out)
    few = specialist.with_calibration(specialist.calibration[:3])
    fitted, held_out = split_frames(few, None)
    assert fitted == list(few.calibration)
    assert 10 <= len(held_out) <= 12
    assert not any(atoms in fitted for atoms in held_out)


@pytest.mark.parametrize("conditioning", ["shared", "per-specialist"])
def test_starting_points(family, conditioning) -> None:
    pair = family("painn", 2)
    base = toy("painn", None, (1, 6, 8))
    mean = mean_potential(pair, load_recipe("mean", conditioning=conditioning))
    found = dict(starting_points(mean, pair, base))
    assert next(iter(found)) == "mean"
    assert [name for name in found if "base" in name or name in ("s0", "s1")] == [
        f"base {base.name}",
        "s0",
        "s1",
    ]
    assert sum("task arithmetic" in name for name in found) == 7
    half, whole = (
        found[f"task arithmetic, λ {x}"].get_parameter("stages.0.hidden.weight") for x in ("0.25", "0.75")
    )
    expected = mean.get_parameter("stages.0.hidden.weight")
    torch.testing.assert_close((half + whole) / 2, expected)
    tables = {name: potential.embedding.shape[0] for name, potential in found.items()}
    assert set(tables.values()) == {1 if conditioning == "shared" else 2}
    assert list(dict(starting_points(mean, pair, None))) == ["mean", "s0", "s1"]


def test_the_best_start_is_kept(family) -> None:
    """One specialist that is its base over again, many others: only the base or it serves all."""
    pair = family("painn", 2, size=0.3)
    pair[1] = replace(pair[1], potential=pair[0].potential, name="twin")
    selection = Selection(pair, [list(s.calibration) for s in pair], load_recipe("fast"))
    mean = mean_potential(family("painn", 2, size=0.3), load_recipe("mean"))
    best = selection.best_start(starting_points(mean, pair, None))
    assert [trial.name for trial in selection.trials if trial.kept] == ["s0"]
    assert selection.held_out < 1e-5
    assert DisagreementMetric.of(pair).disagreement(best) < 1e-5


def test_a_step_that_loses_is_not_kept(family, monkeypatch) -> None:
    pair = family("painn", 2, frames=12)

    align = module._align_readout

    def spoil(merged, *arguments) -> list:
        reports = align(merged, *arguments)
        for parameter in merged.parameters():
            parameter.mul_(1.5)
        return reports

    monkeypatch.setattr(module, "_align_readout", spoil)
    _, report = merge(pair, FAST, device="cpu")
    kept = [trial.name for trial in report.trials if trial.kept]
    assert len(kept) == 1
    assert "closed form" not in kept
    assert "closed form" in [trial.name for trial in report.trials]
    assert report.held_out == max(next(t for t in report.trials if t.kept).disagreements)
    assert MergeReport.from_dict(report.to_dict()) == report
    assert "(kept)" in report.summary()


def test_never_worse_than_what_needs_no_fit(family) -> None:
    """On held-out frames, for relatives of every size of difference."""
    for size in (1e-4, 0.05, 0.4):
        base = toy("painn", None, (1, 6, 8))
        pair = family("painn", 2, size=size, frames=12)
        _, report = merge(pair, FAST, base=base, device="cpu")
        last = [trial for trial in report.trials if trial.kept][-1]
        assert last.overall <= 1.05 * min(trial.overall for trial in report.trials)
        assert report.trials[-1].name == "closed form"
        if size == 0.05:
            assert report.trials[-1].kept


def test_the_base_is_found_by_name_or_given(family) -> None:
    base = toy("painn", None, (1, 6, 8))
    pair = [
        relative(base, f"s{i}", s.calibration, seed=i + 1, size=0.05)
        for i, s in enumerate(family("painn", 2))
    ]
    _, without = merge(pair, FAST, device="cpu")
    _, told = merge(pair, FAST, base=base, device="cpu")
    assert not any("base" in trial.name for trial in without.trials)
    assert any("base" in trial.name for trial in told.trials)
    with pytest.raises(IncompatibleSpecialistsError, match="is not the base of s0, s1"):
        merge(pair, FAST, base=toy("painn", {"n_radial": 5}, (1, 6, 8)), device="cpu")


def test_few_frames_are_fitted_without_a_choice_too(family) -> None:
    pair = family("painn", 2, frames=12)
    fewer = [s.with_calibration([s.calibration[i] for i in (0, 6, 11)]) for s in pair]
    options = {"preset": "fast", "directions": 1, "select": False}
    few, told = (
        merge(specialists, {**options, "frames": n}, device="cpu")[1]
        for specialists, n in ((fewer, 3), (pair, 3))
    )
    assert [row.rows for row in told.layers] == [row.rows for row in few.layers]
