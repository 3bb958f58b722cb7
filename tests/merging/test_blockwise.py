"""Step 4: the linearisation against finite differences, the outcome on real blocks."""

from copy import deepcopy

import pytest
import torch

from ase_gffmerge.least_squares.gauss_newton import dot
from ase_gffmerge.merging.average import mean_potential, working_copies
from ase_gffmerge.merging.blockwise import BlockMismatch, LinearizedBlock, align_block
from ase_gffmerge.merging.calibration import build_calibration
from ase_gffmerge.merging.recipe import Recipe
from ase_gffmerge.models.affine_maps import adjustable_maps


@pytest.fixture(params=["painn", "nequip"])
def scene_of_merge(request, family):
    """The mean of two specialists in float64, its parents, and their frames before the first stage."""
    parents = working_copies(family(request.param, 2), torch.device("cpu"))
    for parent in parents:
        parent.potential.double()
    mean = mean_potential(parents, Recipe())
    return mean, parents, build_calibration(parents, mean, (1.0, 1.0), directions=2)


def test_products_are_those_of_the_jacobian(scene_of_merge) -> None:
    """Jv against central differences of the output, and uᵀ(Jv) = (Jᵀu)ᵀv."""
    mean, parents, calibration_sets = scene_of_merge
    name, stage = next(mean.named_stages())
    linear = LinearizedBlock(
        stage, [p.potential.get_submodule(name) for p in parents], calibration_sets, Recipe(directions=2)
    )
    generator = torch.Generator().manual_seed(1)
    v = {
        key: torch.randn(theta.shape, generator=generator, dtype=theta.dtype)
        for key, theta in linear.thetas.items()
    }
    u = [torch.randn(r.shape, generator=generator, dtype=r.dtype) for r in linear.residual]
    jv = linear.forward(v)
    back = sum(dot(linear.vjp(k, vector), v) for k, vector in enumerate(u))
    assert sum(float(a @ b) for a, b in zip(u, jv, strict=True)) == pytest.approx(back)
    h = 1e-5
    with torch.no_grad():
        for k, column in enumerate(jv):
            ahead, behind = (
                linear.output(k, {key: theta + s * h * v[key] for key, theta in linear.thetas.items()})
                for s in (1, -1)
            )
            torch.testing.assert_close((ahead - behind) / (2 * h), column, rtol=1e-5, atol=1e-7)
    assert linear.mismatch(linear.thetas) == pytest.approx(
        sum(float(r.square().sum()) for r in linear.residual)
    )


@pytest.mark.parametrize("keep_graphs", [True, False])
def test_parts_of_a_batch_give_the_same_correction(scene_of_merge, keep_graphs: bool) -> None:
    mean, parents, calibration_sets = scene_of_merge
    parts = build_calibration(parents, mean, (1.0, 1.0), directions=2, max_edges=1)
    assert all(len(one.batches) == len(one.specialist.calibration) > 1 for one in parts)
    name, stage = next(mean.named_stages())
    originals = [p.potential.get_submodule(name) for p in parents]
    recipe, other = Recipe(directions=2), deepcopy(stage)
    expected = align_block(name, stage, originals, calibration_sets, recipe)
    found = align_block(name, other, originals, parts, recipe, keep_graphs=keep_graphs)
    assert found.residual_after == pytest.approx(expected.residual_after, rel=1e-8)
    assert found.rows == expected.rows
    for ours, theirs in zip(other.parameters(), stage.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_the_mismatch_falls_and_is_what_the_report_says(scene_of_merge) -> None:
    mean, parents, calibration_sets = scene_of_merge
    name, stage = next(mean.named_stages())
    originals = [p.potential.get_submodule(name) for p in parents]
    before = deepcopy(stage)
    report = align_block(name, stage, originals, calibration_sets, Recipe(directions=2))
    assert report.residual_after < report.residual_before
    old, new = (
        LinearizedBlock(s, originals, calibration_sets, Recipe(directions=2)) for s in (before, stage)
    )
    assert report.residual_before == pytest.approx(old.mismatch(old.thetas) / old.target_norm)
    assert report.residual_after == pytest.approx(new.mismatch(new.thetas) / new.target_norm)


def test_the_mismatch_at_the_start_is_known_from_the_linearisation(scene_of_merge, monkeypatch) -> None:
    """Only the full step, which succeeds here, is evaluated."""
    mean, parents, calibration_sets = scene_of_merge
    name, stage = next(mean.named_stages())
    evaluated, plain = [], LinearizedBlock.mismatch
    monkeypatch.setattr(
        LinearizedBlock, "mismatch", lambda self, thetas: evaluated.append(thetas) or plain(self, thetas)
    )
    align_block(
        name,
        stage,
        [p.potential.get_submodule(name) for p in parents],
        calibration_sets,
        Recipe(directions=2),
    )
    assert len(evaluated) == 1


def test_a_stage_that_agrees_stays(family) -> None:
    (parent,) = working_copies(family("painn", 2)[:1], torch.device("cpu"))
    calibration_sets = build_calibration([parent], parent.potential, (1.0,), directions=2)
    name, stage = next(parent.potential.named_stages())
    weights = deepcopy(stage.state_dict())
    report = align_block(name, stage, [deepcopy(stage)], calibration_sets, Recipe(directions=2))
    assert report.residual_after < 1e-10
    for key, value in stage.state_dict().items():
        torch.testing.assert_close(value, weights[key], rtol=1e-5, atol=1e-6)


def test_held_out_frames_end_the_iterations(family, monkeypatch) -> None:
    """Two batches per specialist: what is fitted to the first one must not lose on the second."""
    monkeypatch.setattr("ase_gffmerge.merging.calibration.MAX_EDGES", 250)
    parents = working_copies(family("painn", 2), torch.device("cpu"))
    mean = mean_potential(parents, Recipe())
    calibration_sets = build_calibration(parents, mean, (1.0, 1.0), directions=2)
    assert all(len(calibration_set.batches) > 1 for calibration_set in calibration_sets)
    name, stage = next(mean.named_stages())
    originals = [p.potential.get_submodule(name) for p in parents]
    held_out, fitted = (
        BlockMismatch(stage, originals, calibration_sets, Recipe(directions=2), batch=batch)
        for batch in (1, 0)
    )

    def mismatches() -> list[float]:
        maps = {key: linear.read().clone() for key, linear in adjustable_maps(stage).items()}
        return [one.mismatch(maps) for one in (held_out, fitted)]

    before = mismatches()
    report = align_block(name, stage, originals, calibration_sets, Recipe(directions=2))
    after = mismatches()
    assert after[0] < before[0]
    assert report.residual_after == pytest.approx(after[1] / fitted.target_norm)
    align_block(name, stage, originals, calibration_sets, Recipe(directions=2))
    again = mismatches()
    assert again[0] <= after[0]
