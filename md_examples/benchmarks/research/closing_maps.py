"""Step 4 with one map at a time: align the output of a stage by solving its closing maps, in which it is affine, again."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.func import functional_call

from ase_gffmerge.merging.calibration import CalibrationBatch, CalibrationSet, advance, layer_input, run_stage
from ase_gffmerge.merging.recipe import Recipe
from ase_gffmerge.merging.report import LayerReport
from ase_gffmerge.merging.tangents import Dual, differentiable_pushforward
from ase_gffmerge.models.affine_maps import AffineMap, layer_maps
from ase_gffmerge.models.base import Stage, State
from research.messages import MessageSolution, MessageTerm, solve_messages

CLOSING = {"Message": ("out",), "Update": ("out",), "Interaction": ("linear_down", "skip")}
"""Affine layers in which a stage's output is linear, by stage."""


def closing_maps(stage: Stage) -> Sequence[str]:
    """Affine layers in which a stage's output is linear; those of what it descends from."""
    return next(CLOSING[kind.__name__] for kind in type(stage).__mro__ if kind.__name__ in CLOSING)


def align_messages(
    name: str,
    merged: Stage,
    originals: Sequence[Stage],
    calibration_sets: Sequence[CalibrationSet],
    recipe: Recipe,
    *,
    closing: Sequence[str] = (),
) -> list[LayerReport]:
    """Solve the closing maps of a stage again so that its output matches every specialist's stage output.

    One batch of frames per specialist is used: it already has far more rows than the map has coefficients.

    Parameters
    ----------
    name
        Qualified name of the stage, for the report.
    merged, originals
        The stage in the merged model (written in place) and in every specialist.
    territories
        Calibration scenes, in the order of ``originals``.
    recipe
        Options.
    closing
        Other layers than those of ``CLOSING``.
    """
    scenes = [calibration_set.batches[0] for calibration_set in calibration_sets]
    targets = [
        advance(original, scene.target, scene) for original, scene in zip(originals, scenes, strict=True)
    ]
    scales = [_part_scales(dual, t.weight, recipe) for dual, t in zip(targets, calibration_sets, strict=True)]
    reports = []
    for layer in closing or closing_maps(merged):
        for problem in layer_maps(layer, merged.get_submodule(layer)):
            terms = [
                MessageTerm(_output_of(merged, layer, problem, scene), dual.value + dual.tangent, scale)
                for scene, dual, scale in zip(scenes, targets, scales, strict=True)
            ]
            metric = _closing_metric(merged, layer, problem, scenes)
            solution = solve_messages(terms, problem.read(), metric=metric, ridge=recipe.ridge)
            problem.write(solution.theta)
            reports.append(_message_report(f"{name}.{problem.name}", problem, solution, terms))
    return reports


def _output_of(
    stage: Stage, layer: str, problem: AffineMap, scene: CalibrationBatch
) -> Callable[[Tensor], State]:
    """Stage output and its slopes as a function of the closing map, on the merged model's state."""
    inputs = scene.merged + scene.geometry

    def output(theta: Tensor) -> State:
        parameters = {f"{layer}.{key}": value for key, value in problem.parameters(theta).items()}

        def stage_of(*x: Tensor) -> State:
            return tuple(functional_call(stage, parameters, scene.split(x)))

        return differentiable_pushforward(stage_of, inputs)

    return output


def _part_scales(state: Dual, weight: float, recipe: Recipe) -> tuple[float, ...]:
    """Weights a_k / (N_k s_kc) of the parts of a state and of their slopes."""
    squares = [float(part.double().square().sum()) for part in state.value + state.tangent]
    weights = [weight] * len(state.value) + [weight * recipe.derivative_weight] * len(state.tangent)
    return tuple(w / square if square > 0 else 0.0 for w, square in zip(weights, squares, strict=True))


def _closing_metric(
    stage: Stage, layer: str, problem: AffineMap, scenes: Sequence[CalibrationBatch]
) -> Tensor:
    """Gram matrix of the closing layer's inputs, for the preconditioner."""
    total = torch.zeros((), device=scenes[0].graph.positions.device)
    for scene in scenes:
        values = (scene.merged + scene.geometry).value
        x = layer_input(stage.get_submodule(layer), lambda: run_stage(stage, scene, values))  # noqa: B023
        design = problem.design(x)
        total = total + design.T @ design
    return total + 1e-6 * total.diagonal().mean() * torch.eye(len(total)).to(total)


def _message_report(
    name: str, problem: AffineMap, solution: MessageSolution, terms: Sequence[MessageTerm]
) -> LayerReport:
    return LayerReport(
        name=name,
        kind="message",
        rows=sum(part.numel() for term in terms for part in term.target),
        residual_before=solution.residual_before,
        residual_after=solution.residual_after,
        effective_rank=None,
        size=solution.theta.shape[0],
        ridge=solution.ridge,
    )
