"""Steps 1-3: align the layers of a module, one after the other, with every specialist."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ase_gffmerge.least_squares.gram import Gram, normalised_sum, symmetric_product
from ase_gffmerge.least_squares.ridge import ridge_solve
from ase_gffmerge.merging.calibration import CalibrationBatch, CalibrationSet
from ase_gffmerge.merging.recipe import Recipe
from ase_gffmerge.merging.report import LayerReport
from ase_gffmerge.merging.tangents import Dual, Tensors, pushforward
from ase_gffmerge.models.affine_maps import AffineMap, is_affine, layer_maps, rows_entering, with_ones
from ase_gffmerge.models.base import Stage


class _Reached(Exception):
    """Raised by a hook to stop a forward pass at the layer of interest."""


def layer_input(module: nn.Module, run: Callable[[], Any]) -> Tensor:
    """Run a model up to ``module`` and return what enters it."""
    caught: list[Tensor] = []

    def stop(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        caught.append(rows_entering(module, inputs))
        raise _Reached

    handle = module.register_forward_pre_hook(stop)
    try:
        run()
    except _Reached:
        pass
    finally:
        handle.remove()
    return caught[0]


def layer_inputs(
    root: nn.Module, run: Callable[[], Any], *, wanted: Callable[[nn.Module], bool] = is_affine
) -> dict[str, Tensor]:
    """What enters every affine layer (or other wanted module) of ``root`` while ``run`` evaluates it, in that order."""
    caught: dict[str, Tensor] = {}
    alive: list[Any] = []  # so that no other object takes an identity
    rows: dict[int, Tensor] = {}  # layers that are given one and the same object share its rows

    def note(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            key = id(inputs[0])
            if key not in rows:
                alive.append(inputs[0])
                rows[key] = rows_entering(module, inputs)
            caught[name] = rows[key]

        return hook

    handles = [
        module.register_forward_pre_hook(note(name))
        for name, module in root.named_modules()
        if wanted(module)
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return caught


def affine_layers(root: nn.Module, run: Callable[[], Any]) -> list[str]:
    """Names of the affine layers of ``root`` in the order in which ``run`` executes them."""
    return list(layer_inputs(root, run))


Runner = Callable[[nn.Module, CalibrationBatch, Tensors], Any]
"""``run(module, scene, tensors)`` evaluates the module under alignment on the tensors of :data:`Inputs`."""

Inputs = Callable[[CalibrationBatch, bool], Dual]
"""What enters the module in a scene: in the merged model (``True``) or in the specialist."""


def align_layers(
    prefix: str,
    merged: nn.Module,
    originals: Sequence[nn.Module],
    calibration_sets: Sequence[CalibrationSet],
    recipe: Recipe,
    *,
    run: Runner,
    inputs: Inputs,
) -> list[LayerReport]:
    """Solve every affine layer of a module in execution order.

    Parameters
    ----------
    prefix
        Qualified name of the module, for the report.
    merged
        Module of the merged model (a stage or the readout); written in place.
    originals
        The same module of every specialist.
    territories
        Calibration scenes, in the order of ``originals``.
    recipe
        Options.
    run, inputs
        How to evaluate the module on a scene.
    """
    reports = []
    first = calibration_sets[0].scenes[0]
    at_once = recipe.inputs == "specialist" and not recipe.probes
    known = [
        _own_grams(original, calibration_set, recipe, run=run, inputs=inputs) if at_once else {}
        for original, calibration_set in zip(originals, calibration_sets, strict=True)
    ]
    names = (
        known[0] if at_once else affine_layers(merged, lambda: run(merged, first, inputs(first, True).value))
    )
    for name in names:
        ours = layer_maps(name, merged.get_submodule(name))
        theirs = [layer_maps(name, original.get_submodule(name)) for original in originals]

        def entering(module: nn.Module, scene: CalibrationBatch, of_merged: bool, name: str = name) -> Dual:
            layer = module.get_submodule(name)
            return pushforward(
                lambda *x: layer_input(layer, lambda: run(module, scene, x)), inputs(scene, of_merged)
            )

        grams = [
            found.get(name)
            or _layer_grams(
                calibration_set, ours, their, recipe, entering=entering, merged=merged, original=original
            )
            for found, original, their, calibration_set in zip(
                known, originals, theirs, calibration_sets, strict=True
            )
        ]
        for i, problem in enumerate(ours):
            reports.append(
                _solve_layer(prefix, problem, [gram[i] for gram in grams], calibration_sets, recipe)
            )
    return reports


def _own_grams(
    original: nn.Module, calibration_set: CalibrationSet, recipe: Recipe, *, run: Runner, inputs: Inputs
) -> dict[str, list[Gram]]:
    r"""Statistics of all layers of one specialist from one pass over its frames, when the rows are its own.

    Then :math:`Y = X\Theta_k`, so that :math:`C = G\,\Theta_k` and :math:`\|Y\|^2 = \mathrm{tr}\,\Theta_k^\top C`
    follow from G; layers that cut the same rows from the same input share it.
    """
    totals: dict[str, list[Gram]] = {}
    for scene in calibration_set.scenes:
        entering = layer_inputs(original, lambda s=scene: run(original, s, inputs(s, False).value))  # type: ignore[misc]
        products: dict[Any, Tensor] = {}
        for name, x in entering.items():
            grams = []
            for problem in layer_maps(name, original.get_submodule(name)):
                design = _design(problem, x, recipe)
                key = (id(x), problem.rows, problem.has_bias)
                if key not in products:
                    products[key] = symmetric_product(design.double())
                grams.append(_gram_of_own(products[key], problem.read().double(), len(design)))
            totals[name] = (
                [a + b for a, b in zip(totals[name], grams, strict=True)] if name in totals else grams
            )
    return totals


def _gram_of_own(xx: Tensor, theta: Tensor, n_rows: int) -> Gram:
    xy = xx[:, : len(theta)] @ theta
    return Gram(xx, xy, float((theta * xy[: len(theta)]).sum()), float(n_rows))


def _design(problem: AffineMap, inputs: Tensor, recipe: Recipe) -> Tensor:
    """Rows of the unknowns, with the reference recipe's column of ones for layers without bias."""
    return problem.design(inputs) if recipe.ones == "biased" else with_ones(problem.rows(inputs))


def _layer_grams(
    calibration_set: CalibrationSet,
    ours: Sequence[AffineMap],
    theirs: Sequence[AffineMap],
    recipe: Recipe,
    *,
    entering: Callable[[nn.Module, CalibrationBatch, bool], Dual],
    merged: nn.Module,
    original: nn.Module,
) -> list[Gram]:
    """Statistics of one specialist: rows of the merged (or its own) input, targets of its own output."""
    device = calibration_set.scenes[0].graph.positions.device
    values = [Gram.zero(*_size(problem, recipe), device=device) for problem in ours]
    slopes = list(values)
    for scene in calibration_set.scenes:
        own = entering(original, scene, False)
        x = entering(merged, scene, True) if recipe.inputs == "merged" else own
        for i, (problem, their) in enumerate(zip(ours, theirs, strict=True)):
            theta = their.read()
            design = _design(problem, x.value[0], recipe)
            values[i] = values[i] + Gram.of(design, their.design(own.value[0]) @ theta)
            if x.tangent:
                rows, target = problem.rows(x.tangent[0]), their.rows(own.tangent[0])
                design = torch.cat(
                    [rows, rows.new_zeros(len(rows), values[i].xx.shape[0] - rows.shape[1])], dim=1
                )
                slopes[i] = slopes[i] + Gram.of(design, target @ theta[: target.shape[1]])
    return [value.balanced(slope, recipe.slope_weight) for value, slope in zip(values, slopes, strict=True)]


def _size(problem: AffineMap, recipe: Recipe) -> tuple[int, int]:
    """Shape of the unknowns, with the reference recipe's extra row for layers without bias."""
    d, m = problem.read().shape
    return d + (recipe.ones == "all" and not problem.has_bias), m


def combine(grams: Sequence[Gram], calibration_sets: Sequence[CalibrationSet], recipe: Recipe) -> Gram:
    """Weighted statistics of all specialists, normalised if the recipe says so."""
    weights = [calibration_set.weight for calibration_set in calibration_sets]
    if recipe.normalise:
        return normalised_sum(list(grams), weights)
    total = grams[0] * weights[0]
    for gram, weight in zip(grams[1:], weights[1:], strict=True):
        total = total + gram * weight
    return total


def _solve_layer(
    prefix: str,
    problem: AffineMap,
    grams: Sequence[Gram],
    calibration_sets: Sequence[CalibrationSet],
    recipe: Recipe,
) -> LayerReport:
    gram = combine(grams, calibration_sets, recipe)
    mean = problem.read().double()
    if len(gram.xx) > len(mean):
        mean = torch.cat([mean, mean.new_zeros(1, mean.shape[1])])
    known = recipe.anchor == "zero" and gram.n_rows  # a layer that no frame reaches keeps the mean
    prior = torch.zeros_like(mean) if known else mean
    solution = ridge_solve(gram, prior, ridge=recipe.ridge, relative=recipe.ridge_scale == "relative")
    problem.write(solution.theta[: len(problem.read())].to(problem.read().dtype))
    return LayerReport.of(f"{prefix}.{problem.name}", "layer", solution, before=gram.residual(mean))


def run_stage(stage: nn.Module, scene: CalibrationBatch, tensors: Tensors) -> Any:
    """Evaluate a stage on the tensors of :func:`stage_inputs`."""
    return stage(*scene.split(tensors))


def stage_inputs(scene: CalibrationBatch, of_merged: bool) -> Dual:
    """State before the stage, and geometry."""
    return (scene.merged if of_merged else scene.target) + scene.geometry


def advance(stage: Stage, state: Dual, scene: CalibrationBatch) -> Dual:
    """State after the stage."""
    return pushforward(lambda *x: tuple(run_stage(stage, scene, x)), state + scene.geometry)
