"""Steps 1-4: align the layers of one stage, then the stage's output, with every specialist."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ase_gffmerge.merging.duals import Dual, Tensors, differentiable_push, push
from ase_gffmerge.merging.layers import Problem, is_affine, problems, with_ones
from ase_gffmerge.merging.messages import MessageSolution, MessageTerm, solve_messages
from ase_gffmerge.merging.recipe import Recipe
from ase_gffmerge.merging.report import LayerReport
from ase_gffmerge.merging.solve import ridge_solve
from ase_gffmerge.merging.statistics import Gram, normalised_sum
from ase_gffmerge.merging.territory import Scene, Territory
from ase_gffmerge.models.potential import Stage, State


class _Reached(Exception):
    """Raised by a hook to stop a forward pass at the layer of interest."""


def layer_input(module: nn.Module, run: Callable[[], Any]) -> Tensor:
    """Run a model up to ``module`` and return what enters it."""
    caught: list[Tensor] = []

    def stop(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        caught.append(inputs[0])
        raise _Reached

    handle = module.register_forward_pre_hook(stop)
    try:
        run()
    except _Reached:
        pass
    finally:
        handle.remove()
    return caught[0]


def affine_layers(root: nn.Module, run: Callable[[], Any]) -> list[str]:
    """Names of the affine layers of ``root`` in the order in which ``run`` executes them."""
    order: list[str] = []
    handles = [
        module.register_forward_pre_hook(lambda *_, name=name: order.append(name))
        for name, module in root.named_modules()
        if is_affine(module)
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return list(dict.fromkeys(order))


Runner = Callable[[nn.Module, Scene, Tensors], Any]
"""``run(module, scene, tensors)`` evaluates the module under alignment on the tensors of :data:`Inputs`."""

Inputs = Callable[[Scene, bool], Dual]
"""What enters the module in a scene: in the merged model (``True``) or in the specialist."""


def align_layers(
    prefix: str,
    merged: nn.Module,
    originals: Sequence[nn.Module],
    territories: Sequence[Territory],
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
    first = territories[0].scenes[0]
    for name in affine_layers(merged, lambda: run(merged, first, inputs(first, True).value)):
        ours = list(problems(name, merged.get_submodule(name)))
        theirs = [list(problems(name, original.get_submodule(name))) for original in originals]

        def entering(module: nn.Module, scene: Scene, of_merged: bool, name: str = name) -> Dual:
            layer = module.get_submodule(name)
            return push(
                lambda *x: layer_input(layer, lambda: run(module, scene, x)), inputs(scene, of_merged)
            )

        grams = [
            _layer_grams(territory, ours, their, recipe, entering=entering, merged=merged, original=original)
            for original, their, territory in zip(originals, theirs, territories, strict=True)
        ]
        for i, problem in enumerate(ours):
            reports.append(_solve_layer(prefix, problem, [gram[i] for gram in grams], territories, recipe))
    return reports


def _layer_grams(
    territory: Territory,
    ours: Sequence[Problem],
    theirs: Sequence[Problem],
    recipe: Recipe,
    *,
    entering: Callable[[nn.Module, Scene, bool], Dual],
    merged: nn.Module,
    original: nn.Module,
) -> list[Gram]:
    """Statistics of one specialist: rows of the merged (or its own) input, targets of its own output."""
    device = territory.scenes[0].graph.pos.device
    values = [Gram.zero(*_size(problem, recipe), device=device) for problem in ours]
    slopes = list(values)
    for scene in territory.scenes:
        own = entering(original, scene, False)
        x = entering(merged, scene, True) if recipe.inputs == "merged" else own
        for i, (problem, their) in enumerate(zip(ours, theirs, strict=True)):
            theta = their.read()
            design = (
                problem.design(x.value[0]) if recipe.ones == "biased" else with_ones(problem.rows(x.value[0]))
            )
            values[i] = values[i] + Gram.of(design, their.design(own.value[0]) @ theta)
            if x.tangent:
                rows, target = problem.rows(x.tangent[0]), their.rows(own.tangent[0])
                design = torch.cat(
                    [rows, rows.new_zeros(len(rows), values[i].xx.shape[0] - rows.shape[1])], dim=1
                )
                slopes[i] = slopes[i] + Gram.of(design, target @ theta[: target.shape[1]])
    return [value.balanced(slope, recipe.slope_weight) for value, slope in zip(values, slopes, strict=True)]


def _size(problem: Problem, recipe: Recipe) -> tuple[int, int]:
    """Shape of the unknowns, with the reference recipe's extra row for layers without bias."""
    d, m = problem.read().shape
    return d + (recipe.ones == "all" and not problem.has_bias), m


def combine(grams: Sequence[Gram], territories: Sequence[Territory], recipe: Recipe) -> Gram:
    """Weighted statistics of all specialists, normalised if the recipe says so."""
    weights = [territory.weight for territory in territories]
    if recipe.normalise:
        return normalised_sum(list(grams), weights)
    total = grams[0] * weights[0]
    for gram, weight in zip(grams[1:], weights[1:], strict=True):
        total = total + gram * weight
    return total


def _solve_layer(
    prefix: str, problem: Problem, grams: Sequence[Gram], territories: Sequence[Territory], recipe: Recipe
) -> LayerReport:
    gram = combine(grams, territories, recipe)
    mean = problem.read().double()
    if len(gram.xx) > len(mean):
        mean = torch.cat([mean, mean.new_zeros(1, mean.shape[1])])
    prior = mean if recipe.anchor == "mean" else torch.zeros_like(mean)
    solution = ridge_solve(gram, prior, ridge=recipe.ridge, relative=recipe.ridge_scale == "relative")
    problem.write(solution.theta[: len(problem.read())].to(problem.read().dtype))
    return LayerReport.of(f"{prefix}.{problem.name}", "layer", solution, before=gram.residual(mean))


def align_messages(
    name: str, merged: Stage, originals: Sequence[Stage], territories: Sequence[Territory], recipe: Recipe
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
    """
    scenes = [territory.scenes[0] for territory in territories]
    targets = [
        advance(original, scene.target, scene) for original, scene in zip(originals, scenes, strict=True)
    ]
    scales = [_part_scales(dual, t.weight, recipe) for dual, t in zip(targets, territories, strict=True)]
    reports = []
    for layer in merged.closing:
        for problem in problems(layer, merged.get_submodule(layer)):
            terms = [
                MessageTerm(_output_of(merged, layer, problem, scene), dual.value + dual.tangent, scale)
                for scene, dual, scale in zip(scenes, targets, scales, strict=True)
            ]
            metric = _closing_metric(merged, layer, problem, scenes)
            solution = solve_messages(terms, problem.read(), metric=metric, ridge=recipe.ridge)
            problem.write(solution.theta)
            reports.append(_message_report(f"{name}.{problem.name}", problem, solution, terms))
    return reports


def _stage_output(stage: Stage, scene: Scene) -> Callable[..., State]:
    """The stage as a function of its state and the geometry."""
    return lambda *x: tuple(stage(x[:-3], scene.edge_geometry(x[-3:])))


def run_stage(stage: nn.Module, scene: Scene, tensors: Tensors) -> Any:
    """Evaluate a stage on the tensors of :func:`stage_inputs`."""
    return stage(tensors[:-3], scene.edge_geometry(tensors[-3:]))


def stage_inputs(scene: Scene, of_merged: bool) -> Dual:
    """State before the stage, and geometry."""
    return (scene.merged if of_merged else scene.target) + scene.geometry


def advance(stage: Stage, state: Dual, scene: Scene) -> Dual:
    """State after the stage."""
    return push(_stage_output(stage, scene), state + scene.geometry)


def _output_of(stage: Stage, layer: str, problem: Problem, scene: Scene) -> Callable[[Tensor], State]:
    """Stage output and its slopes as a function of the closing map, on the merged model's state."""
    inputs = scene.merged + scene.geometry

    def output(theta: Tensor) -> State:
        parameters = {f"{layer}.{key}": value for key, value in problem.parameters(theta).items()}

        def stage_of(*x: Tensor) -> State:
            return tuple(functional_call(stage, parameters, (x[:-3], scene.edge_geometry(x[-3:]))))

        return differentiable_push(stage_of, inputs)

    return output


def _part_scales(state: Dual, weight: float, recipe: Recipe) -> tuple[float, ...]:
    """Weights a_k / (N_k s_kc) of the parts of a state and of their slopes."""
    squares = [float(part.double().square().sum()) for part in state.value + state.tangent]
    weights = [weight] * len(state.value) + [weight * recipe.slope_weight] * len(state.tangent)
    return tuple(w / square if square > 0 else 0.0 for w, square in zip(weights, squares, strict=True))


def _closing_metric(stage: Stage, layer: str, problem: Problem, scenes: Sequence[Scene]) -> Tensor:
    """Gram matrix of the closing layer's inputs, for the preconditioner."""
    total = torch.zeros((), device=scenes[0].graph.pos.device)
    for scene in scenes:
        values = (scene.merged + scene.geometry).value
        x = layer_input(stage.get_submodule(layer), lambda: _stage_output(stage, scene)(*values))  # noqa: B023
        design = problem.design(x)
        total = total + design.T @ design
    return total + 1e-6 * total.diagonal().mean() * torch.eye(len(total)).to(total)


def _message_report(
    name: str, problem: Problem, solution: MessageSolution, terms: Sequence[MessageTerm]
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
