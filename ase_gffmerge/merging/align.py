"""Steps 1-4: align the layers of one stage, then the stage's output, with every specialist."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ase_gffmerge.merging.layers import Problem, is_affine, problems, with_ones
from ase_gffmerge.merging.messages import MessageSolution, MessageTerm, solve_messages
from ase_gffmerge.merging.recipe import Recipe
from ase_gffmerge.merging.report import LayerReport
from ase_gffmerge.merging.solve import ridge_solve
from ase_gffmerge.merging.statistics import Gram, normalised_sum
from ase_gffmerge.merging.territory import Scene, Territory
from ase_gffmerge.models.potential import Stage, State


class _Reached(Exception):  # noqa: N818
    """Raised by a hook to stop a forward pass at the layer of interest."""


def layer_input(module: nn.Module, run: Callable[[], Any]) -> Tensor:
    """Run a model up to ``module`` and return what enters it."""
    caught: list[Tensor] = []

    def stop(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        caught.append(inputs[0].detach())
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


Runner = Callable[[nn.Module, Territory, int, bool], Any]
"""``run(root, territory, scene index, merged?)`` evaluates the module under alignment."""


def align_layers(
    prefix: str,
    merged: nn.Module,
    originals: Sequence[nn.Module],
    territories: Sequence[Territory],
    run: Runner,
    recipe: Recipe,
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
    run
        Evaluates a module on a scene, with the merged model's or the specialist's state as input.
    recipe
        Options.
    """
    reports = []
    for name in affine_layers(merged, lambda: run(merged, territories[0], 0, True)):
        ours = list(problems(name, merged.get_submodule(name)))
        theirs = [list(problems(name, original.get_submodule(name))) for original in originals]
        grams = [
            _layer_grams(name, merged, original, ours, problem_k, territory, run, recipe)
            for original, problem_k, territory in zip(originals, theirs, territories, strict=True)
        ]
        for i, problem in enumerate(ours):
            reports.append(_solve_layer(prefix, problem, [gram[i] for gram in grams], territories, recipe))
    return reports


def _layer_grams(
    name: str,
    merged: nn.Module,
    original: nn.Module,
    ours: Sequence[Problem],
    theirs: Sequence[Problem],
    territory: Territory,
    run: Runner,
    recipe: Recipe,
) -> list[Gram]:
    """Gram statistics of one specialist: rows of the merged (or its own) input, targets of its own output."""
    totals: list[Gram] = []
    for i in range(len(territory.scenes)):
        own = layer_input(original.get_submodule(name), lambda i=i: run(original, territory, i, False))
        x = own
        if recipe.inputs == "merged":
            x = layer_input(merged.get_submodule(name), lambda i=i: run(merged, territory, i, True))
        grams = []
        for problem, their in zip(ours, theirs, strict=True):
            design = problem.design(x) if recipe.ones == "biased" else with_ones(problem.rows(x))
            grams.append(Gram.of(design, their.design(own) @ their.read()))
        totals = [a + b for a, b in zip(totals, grams, strict=True)] if totals else grams
    return totals


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
    return LayerReport(
        name=f"{prefix}.{problem.name}",
        kind="layer",
        rows=solution.n_rows,
        residual_before=gram.residual(mean),
        residual_after=solution.residual_after,
        effective_rank=solution.effective_rank,
        size=len(mean),
        ridge=solution.ridge,
    )


def align_messages(
    name: str, merged: Stage, originals: Sequence[Stage], territories: Sequence[Territory], recipe: Recipe
) -> list[LayerReport]:
    """Solve the closing maps of a stage again so that its output matches every specialist's stage output.

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
    targets = [
        [original(scene.target, scene.geometry) for scene in territory.scenes]
        for original, territory in zip(originals, territories, strict=True)
    ]
    scales = [_part_scales(states, territory) for states, territory in zip(targets, territories, strict=True)]
    reports = []
    for layer in merged.closing:
        for problem in problems(layer, merged.get_submodule(layer)):
            terms = [
                MessageTerm(_output_of(merged, layer, problem, scene), target, scale)
                for territory, states, scale in zip(territories, targets, scales, strict=True)
                for scene, target in zip(territory.scenes, states, strict=True)
            ]
            metric = _closing_metric(merged, layer, problem, territories, recipe)
            solution = solve_messages(terms, problem.read(), metric=metric, ridge=recipe.ridge)
            problem.write(solution.theta)
            reports.append(_message_report(f"{name}.{problem.name}", problem, solution, terms))
    return reports


def _output_of(stage: Stage, layer: str, problem: Problem, scene: Scene) -> Callable[[Tensor], State]:
    """Stage output as a function of the closing map, on the merged model's state."""

    def output(theta: Tensor) -> State:
        parameters = {f"{layer}.{key}": value for key, value in problem.parameters(theta).items()}
        return functional_call(stage, parameters, (scene.merged, scene.geometry))

    return output


def _part_scales(states: Sequence[State], territory: Territory) -> tuple[float, ...]:
    """Weights a_k / (N_k s_kc) of the parts of a state: number of entries and mean square of each."""
    scales = []
    for parts in zip(*states, strict=True):
        total = sum(float(part.double().square().sum()) for part in parts)
        scales.append(territory.weight / total if total > 0 else 0.0)
    return tuple(scales)


def _closing_metric(
    stage: Stage, layer: str, problem: Problem, territories: Sequence[Territory], recipe: Recipe
) -> Tensor:
    """Gram matrix of the closing layer's inputs, for the preconditioner."""
    total: Tensor | None = None
    for territory in territories:
        for scene in territory.scenes:
            x = layer_input(stage.get_submodule(layer), lambda scene=scene: stage(scene.merged, scene.geometry))
            design = problem.design(x)
            gram = design.T @ design
            total = gram if total is None else total + gram
    if total is None:
        raise ValueError("no calibration scenes")
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
        effective_rank=float(solution.theta.shape[0]),
        size=solution.theta.shape[0],
        ridge=solution.ridge,
    )
