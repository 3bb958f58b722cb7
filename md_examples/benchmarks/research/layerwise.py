r"""Families ``weights`` and ``low rank``: other ways to solve one layer from its rows.

* ``sensitivity``: a row counts by how much the specialist's energy depends on the layer's output there,
  :math:`w=|\partial E/\partial y|^2` divided by its mean, a tenth of the mean added so that no row is lost.
* ``low rank``: every specialist gets its own correction :math:`\Theta+\Delta_k` of every layer with
  :math:`\mathrm{rank}\,\Delta_k\le r`, by reduced-rank regression: the full correction Δ projected onto the leading r
  eigenvectors of :math:`\Delta^\top G\,\Delta` (Izenman, doi:10.1016/0047-259X(75)90042-1). One then has to know whose
  territory a structure is on; added to Θ beforehand, the corrections cost nothing per step.
"""

import time
from collections.abc import Callable, Sequence
from copy import deepcopy

import torch
from torch import Tensor, nn

from ase_gffmerge.graphs.graph import AtomGraph, edge_vectors
from ase_gffmerge.least_squares.gram import Gram, normalized_sum
from ase_gffmerge.least_squares.ridge import ridge_solve
from ase_gffmerge.merging.calibration import (
    CalibrationSet,
    affine_layers,
    build_calibration,
    entering,
    run_stage,
    stage_inputs,
)
from ase_gffmerge.merging.recipe import Recipe
from ase_gffmerge.models import Potential
from ase_gffmerge.models.affine_maps import AffineMap, layer_maps
from ase_gffmerge.models.base import Stage
from research.bench import Bench, MergeOutput, Trial
from research.closing_maps import align_messages
from research.readout_fit import Setting, fit_potentials, fitted
from research.trunk import SolveStage, build_trunk, go_on

RowWeights = Callable[[CalibrationSet, int, str], Tensor | None]
"""Weights (n_rows,) of a layer's rows in one scene of a territory, or ``None`` for ones."""

Correct = Callable[[Gram, Tensor, Tensor], Tensor]
"""``correct(gram, prior, theta)`` turns the solution of a layer into what is written."""


def solve_layers(
    name: str,
    merged: Stage,
    originals: Sequence[Stage],
    calibration_sets: Sequence[CalibrationSet],
    recipe: Recipe,
    *,
    row_weights: RowWeights = lambda calibration_set, scene, layer: None,
    correct: Correct = lambda gram, prior, theta: theta,
) -> None:
    """Solve the layers of a stage in execution order, as the product does, with weighted rows or corrected solutions."""
    first = calibration_sets[0].batches[0]
    values = stage_inputs(first, True).value
    for layer in affine_layers(merged, lambda: run_stage(merged, first, values)):
        for i, problem in enumerate(layer_maps(layer, merged.get_submodule(layer))):
            grams = []
            for original, calibration_set in zip(originals, calibration_sets, strict=True):
                their = layer_maps(layer, original.get_submodule(layer))[i]
                weights = [
                    row_weights(calibration_set, s, f"{name}.{layer}")
                    for s in range(len(calibration_set.batches))
                ]
                grams.append(_gram(problem, their, layer, merged, original, calibration_set, recipe, weights))
            gram = normalized_sum(grams, [calibration_set.weight for calibration_set in calibration_sets])
            prior = problem.read().double()
            theta = ridge_solve(gram, prior, ridge=recipe.ridge).theta
            problem.write(correct(gram, prior, theta).to(problem.read()))


def _gram(
    problem: AffineMap,
    their: AffineMap,
    layer: str,
    merged: Stage,
    original: Stage,
    calibration_set: CalibrationSet,
    recipe: Recipe,
    weights: Sequence[Tensor | None],
) -> Gram:
    """Statistics of values and slopes of one territory."""
    theta = their.read()
    values = slopes = Gram.zero(*problem.read().shape)
    for scene, weight in zip(calibration_set.batches, weights, strict=True):
        x, own = (
            entering(stage, layer, scene, stage_inputs(scene, ours), run=run_stage)
            for stage, ours in ((merged, True), (original, False))
        )
        design = problem.design(x.value[0])
        root = torch.ones(len(design), 1) if weight is None else weight.sqrt()[:, None]
        values += Gram.of(design * root, (their.design(own.value[0]) @ theta) * root)
        if x.tangent:
            rows, target = problem.rows(x.tangent[0]), their.rows(own.tangent[0])
            root = root.repeat(len(rows) // len(root), 1)
            padded = torch.cat([rows, rows.new_zeros(len(rows), design.shape[1] - rows.shape[1])], dim=1)
            slopes += Gram.of(padded * root, (target @ theta[: target.shape[1]]) * root)
    return values.balanced(slopes, recipe.derivative_weight)


def sensitivities(potential: Potential, graph: AtomGraph) -> dict[str, Tensor]:
    """|∂E/∂y|² (n_rows,) of every ``nn.Linear`` by qualified name."""
    added: dict[str, Tensor] = {}

    def perturb(name: str) -> Callable[[nn.Module, object, Tensor], Tensor]:
        def hook(_: nn.Module, __: object, output: Tensor) -> Tensor:
            added[name] = torch.zeros_like(output, requires_grad=True)
            return output + added[name]

        return hook

    linear = [(n, m) for n, m in potential.named_modules() if isinstance(m, nn.Linear)]
    handles = [module.register_forward_hook(perturb(name)) for name, module in linear]
    try:
        with torch.enable_grad():
            gradients = torch.autograd.grad(
                potential(edge_vectors(graph), graph)[0].sum(), list(added.values())
            )
    finally:
        for handle in handles:
            handle.remove()
    return {n: g.square().sum(-1).flatten().detach() for n, g in zip(added, gradients, strict=True)}


def by_sensitivity() -> SolveStage:
    """Layers with rows weighted by sensitivity, then the usual message-level solves."""
    known: dict[tuple[int, int], dict[str, Tensor]] = {}

    def weights(calibration_set: CalibrationSet, scene: int, layer: str) -> Tensor | None:
        key = (calibration_set.index, scene)
        if key not in known:
            known[key] = sensitivities(
                calibration_set.specialist.potential, calibration_set.batches[scene].graph
            )
        square = known[key].get(layer)
        return None if square is None else square / square.mean().clamp(min=1e-30) + 0.1

    def solve(
        name: str,
        stage: Stage,
        originals: Sequence[Stage],
        calibration_sets: Sequence[CalibrationSet],
        recipe: Recipe,
    ) -> Stage:
        solve_layers(name, stage, originals, calibration_sets, recipe, row_weights=weights)
        align_messages(name, stage, originals, calibration_sets, recipe)
        return stage

    return solve


def truncated(rank: int) -> Correct:
    """Reduced-rank regression of the correction."""

    def correct(gram: Gram, prior: Tensor, theta: Tensor) -> Tensor:
        full = theta - prior
        _, vectors = torch.linalg.eigh(full.T @ gram.xx @ full)
        leading = vectors[:, -rank:]
        return prior + full @ leading @ leading.T

    return correct


@torch.no_grad()
def corrected(potential: Potential, calibration_set: CalibrationSet, recipe: Recipe, rank: int) -> Potential:
    """Copy of the merged potential with low-rank corrections of every stage's layers for one specialist."""
    own = deepcopy(potential)
    parent = calibration_set.specialist
    alone = build_calibration([parent], own, [1.0], directions=recipe.directions)
    for name, stage in own.named_stages():
        originals: list[Stage] = [parent.potential.get_submodule(name)]  # type: ignore[list-item]
        solve_layers(name, stage, originals, alone, recipe, correct=truncated(rank))
        go_on(own, stage, originals, alone)
    return own


def low_rank(rank: int) -> Callable[[Bench], MergeOutput]:
    """Corrections of every specialist, then one readout for all of them."""

    def run(bench: Bench) -> MergeOutput:
        trunk, start = bench.trunk, time.process_time()
        models = [corrected(trunk.potential, t, Recipe(), rank) for t in trunk.calibration_sets]
        potentials, _ = fit_potentials(models, trunk.calibration_sets, Setting())
        seconds = trunk.seconds + time.process_time() - start
        stages = trunk.potential.stages
        extra = sum(rank * sum(m.weight.shape) for m in stages.modules() if isinstance(m, nn.Linear))
        share = extra / sum(p.numel() for p in stages.parameters())
        return MergeOutput(
            potentials=tuple(potentials),
            seconds=seconds,
            note=f"must know the specialist; {100 * share:.0f} % more weights per specialist",
        )

    return run


def trials() -> list[Trial]:
    """All trials of these families."""
    weighted = Trial(
        name="sensitivity",
        family="trunk",
        changes="rows of every layer weighted by |dE/dy|² of the specialist",
        run=lambda bench: fitted(
            build_trunk(bench.specialists, Recipe(), solve_stage=by_sensitivity()), Setting()
        ),
        order=27,
    )
    return [weighted] + [
        Trial(
            name=f"low rank {rank}",
            family="low rank",
            changes=f"corrections of rank {rank} in every layer for each specialist",
            run=low_rank(rank),
            order=order,
        )
        for rank, order in ((4, 26), (1, 61), (16, 61))
    ]
