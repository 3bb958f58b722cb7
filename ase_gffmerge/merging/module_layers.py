r"""Align the layers of modules of any kind, one after the other, with every model's: steps 1 and 2 without a potential.

In the order of execution every layer is solved as in :mod:`.layerwise`,

.. math::

   \min_\Theta\ \sum_k \frac{a_k}{n_k s_k} \bigl\| [X_k\ 1]\,\Theta - Y_k \bigr\|^2
   \;+\; \lambda\,\frac{\mathrm{tr}\,G}{d}\, \bigl\| \Theta - \Theta_{\rm mean} \bigr\|^2 ,

where X_k enters the layer of the merged model on model k's examples and Y_k leaves it in model k itself. Of a layer that is
affine only in a part of its parameters, Y_k is its output less what the other parameters contribute in the merged model.

Models of independent initialisations have nothing in common, channel by channel. Then channels may be *divided*: of every
layer but the last, each model gets a contiguous share of the outputs, and column j of Θ follows model k(j) alone, on its own
rows, but from all inputs. What a model loses with the other channels, the layers after them make up for as well as they can.

The merged model is a list of *views*, one for each model: modules that share the tensors of everything that is merged, and
have their own of what every model keeps.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ase_gffmerge.least_squares.gram import Gram, SymmetricProducts, normalized_sum
from ase_gffmerge.least_squares.ridge import Solution, ridge_solve
from ase_gffmerge.merging.module_calls import (
    Entering,
    Item,
    Run,
    arguments,
    channel_owners,
    covered_parameters,
    entering,
    executed_layers,
    is_tied,
    select,
    thinned,
)
from ase_gffmerge.merging.module_views import weighted_mean
from ase_gffmerge.merging.report import LayerReport
from ase_gffmerge.models.affine_maps import AffineMap, LayerKind, layer_parts, with_ones
from ase_gffmerge.models.torch_layers import KeptOutputs, channels_last
from ase_gffmerge.runtime.progress import Clock, Progress

ALIGNED, EVALUATED = "aligned", "evaluated"


@dataclass(frozen=True, kw_only=True)
class ModuleProblem:
    """What it takes to align modules.

    Attributes
    ----------
    models
        The models, in evaluation mode; never changed.
    views
        The merged model with what every one of them keeps, sharing the tensors of everything else.
    examples
        Of every model.
    run
        Evaluates a module on an example.
    mask
        Which nodes of model k's example count; ``None`` for all.
    weights, ridge
        a_k and λ.
    twin
        A slightly displaced copy of an example, or ``None``: differences between both are rows of derivatives.
    derivative_weight
        Weight of all derivatives against all values.
    max_rows
        Rows of a layer that are kept of one example, chosen at random; ``None`` for all.
    divided
        Whether every channel follows a single model.
    kept
        Outputs of layers on the examples that need not be computed again; default: none.
    clock
        Times evaluations of modules, and the alignment of layers, which holds them.
    products
        Of rows that enter several layers or models.
    """

    models: Sequence[nn.Module]
    views: Sequence[nn.Module]
    examples: Sequence[Iterable[Item]]
    run: Run
    mask: Callable[[int, Item], Tensor | None]
    weights: Sequence[float]
    ridge: float
    twin: Callable[[Item, int], Item] | None = None
    derivative_weight: float = 1.0
    max_rows: int | None = None
    divided: bool = False
    kept: KeptOutputs = field(default_factory=KeptOutputs)
    clock: Clock = field(default_factory=Clock)
    products: SymmetricProducts = field(default_factory=SymmetricProducts)

    def shared(self, name: str) -> bool:
        """Whether a layer is merged, and not every model's own."""
        layers = [dict(view.named_modules()).get(name) for view in self.views]
        first = [dict(layer.named_parameters()) if layer is not None else {} for layer in layers]
        return all(own.keys() == first[0].keys() for own in first) and all(
            own[key] is first[0][key] for own in first for key in own
        )


@dataclass(frozen=True)
class Step:
    """A layer, how often it is called, and the models whose examples determine it."""

    name: str
    n_calls: int
    members: tuple[int, ...]


def execution_order(problem: ModuleProblem) -> list[Step]:
    """Every layer once, in an order in which each comes after those that feed it, for every model."""
    order: list[tuple[str, int | None]] = []
    calls: dict[tuple[str, int | None], int] = {}
    for k, (view, examples) in enumerate(zip(problem.views, problem.examples, strict=True)):
        found: dict[str, int] = {}
        for item in examples:
            with problem.kept.replayed(view, item):
                calls_here = executed_layers(view, partial(problem.run, view, item))
            for name, n in calls_here.items():
                found[name] = max(n, found.get(name, 0))
            if not isinstance(examples, Sequence):
                break  # a loader: what its first batch calls, all do
        place = 0
        for name, n in found.items():
            key = (name, None if problem.shared(name) else k)
            calls[key] = max(n, calls.get(key, 0))
            if key in order:
                place = order.index(key) + 1
            else:
                order.insert(place, key)
                place += 1
    everyone = tuple(range(len(problem.views)))
    return [Step(name, calls[name, k], everyone if k is None else (k,)) for name, k in order]


@dataclass(frozen=True, kw_only=True)
class Alignment:
    """What was solved.

    Attributes
    ----------
    reports
        One for every least-squares problem.
    reached
        Names of all layers that the examples call.
    recalibrated
        Names of the batch normalizations whose statistics were taken anew.
    solved
        Names of the layers that are called, but for those that have a parameter of an earlier one.
    """

    reports: tuple[LayerReport, ...]
    reached: tuple[str, ...]
    recalibrated: tuple[str, ...]
    solved: tuple[str, ...]


def align_modules(
    problem: ModuleProblem,
    *,
    solved: Callable[[str], bool] = lambda name: True,
    steps: Sequence[Step] | None = None,
    progress: Progress,
) -> Alignment:
    """Solve all layers of the views in place.

    Parameters
    ----------
    problem
        With the views.
    solved
        Whether the layer of a name is solved; default: all are.
    steps
        The :func:`execution_order`, if it is known.
    progress
        Called with a fraction (0 to 1) and the name of a layer.
    """
    reports, recalibrated, tied = list[LayerReport](), list[str](), list[str]()
    first: dict[int, str] = {}
    steps = execution_order(problem) if steps is None else steps
    once = all(step.n_calls == 1 for step in steps) and not any(map(is_tied, problem.views))
    for i, step in enumerate(steps):
        progress(i / len(steps), step.name)
        if i and once:
            for k in steps[i - 1].members:
                problem.kept.settle(problem.views[k], [steps[i - 1].name])
        if not solved(step.name):
            continue
        layer = problem.views[step.members[0]].get_submodule(step.name)
        own = [id(layer.get_parameter(key)) for key in covered_parameters(layer)]
        if any(first.setdefault(key, step.name) != step.name for key in own):
            tied.append(step.name)  # another solution would undo that of the layer before
            continue
        if recalibrates(layer):
            _recalibrate(problem, step)
            recalibrated.append(step.name)
        for _ in range(min(step.n_calls, 2)):  # what enters a later call of a layer depends on the layer
            with problem.clock(ALIGNED):
                found = _solve_step(problem, step, divided=problem.divided and step is not steps[-1])
        reports += found
    reached = dict.fromkeys(step.name for step in steps)
    return Alignment(
        reports=tuple(reports),
        reached=tuple(reached),
        recalibrated=tuple(dict.fromkeys(recalibrated)),
        solved=tuple(name for name in reached if name not in tied),
    )


def recalibrates(layer: nn.Module) -> bool:
    """Whether a layer normalizes by statistics of earlier batches."""
    return isinstance(layer, _BatchNorm) and layer.running_mean is not None


def _solve_step(problem: ModuleProblem, step: Step, *, divided: bool) -> list[LayerReport]:
    layer = problem.views[step.members[0]].get_submodule(step.name)
    suffix = "" if len(step.members) == len(problem.models) else f" of model {step.members[0]}"
    reports = []
    for part in layer_parts(layer):
        maps = list(part.maps(step.name, layer))
        grams = [_statistics(problem, step, part, maps, k) for k in step.members]
        for i, affine_map in enumerate(maps):
            own = {k: gram[i] for k, gram in zip(step.members, grams, strict=True) if gram[i].n_rows}
            if own:
                owners = channel_owners(affine_map, len(problem.models)) if divided else None
                found = _solved(problem, affine_map, own, owners=owners)
                reports += [LayerReport.of(affine_map.name + suffix, "layer", solution) for solution in found]
    return reports


def _solved(
    problem: ModuleProblem, affine_map: AffineMap, grams: Mapping[int, Gram], *, owners: Tensor | None
) -> list[Solution]:
    """Solve and write one map, for all models together or every output for its owner, where that one has rows."""
    prior = affine_map.read().double()
    every = torch.zeros(prior.shape[1], dtype=torch.long)
    owners = every if owners is None or not set(owners.tolist()) <= set(grams) else owners
    together = owners is every
    theta, solutions = prior.clone(), []
    for k in owners.unique().tolist():
        chosen = grams if together else {k: grams[k]}
        gram = normalized_sum(list(chosen.values()), [problem.weights[j] for j in chosen])
        solution = ridge_solve(gram, _flat(affine_map, prior), ridge=problem.ridge)
        columns = (owners == k).to(theta.device)
        theta[:, columns] = solution.theta.reshape(prior.shape)[:, columns].to(theta)
        solutions.append(solution)
    affine_map.write(theta.to(affine_map.read()))
    return solutions


def _statistics(
    problem: ModuleProblem, step: Step, part: LayerKind, maps: Sequence[AffineMap], k: int
) -> list[Gram]:
    """Statistics of one model for every map of a part of a layer."""
    view, model = problem.views[k], problem.models[k]
    layer, original = view.get_submodule(step.name), model.get_submodule(step.name)
    theirs = list(part.maps(step.name, original))
    values = [_gram(affine_map, *_nothing(affine_map)) for affine_map in maps]
    derivatives = list(values)

    def enter(item: Item, kept: KeptOutputs) -> list[tuple[Entering, Entering]]:
        runs = [partial(problem.run, module, item) for module in (view, model)]
        with (
            problem.clock(EVALUATED),
            kept.replayed(view, item, but=step.name),
            kept.replayed(model, item, but=step.name),
        ):
            ours = entering(layer, part, runs[0], n_calls=step.n_calls)
            own = kept.of(
                model,
                item,
                (step.name, part.part),
                lambda: entering(original, part, runs[1], n_calls=step.n_calls),
            )
        return list(zip(ours, own, strict=False))

    for i, item in enumerate(problem.examples[k]):
        mask = problem.mask(k, item)
        here = enter(item, problem.kept)
        there = enter(problem.twin(item, i), KeptOutputs()) if problem.twin else []
        for n, (ours, own) in enumerate(here):
            for j, (affine_map, their) in enumerate(zip(maps, theirs, strict=True)):
                rows, targets = _equations(affine_map, their, ours, own)
                chosen = thinned(select(ours, rows, mask, item), problem.max_rows)
                rows, targets = rows[chosen], targets[chosen]
                values[j] += _gram(affine_map, rows, targets, problem.products)
                if (
                    n < len(there)
                    and there[n][0].x.shape == ours.x.shape
                    and there[n][1].x.shape == own.x.shape
                ):
                    moved, moved_targets = (x[chosen] for x in _equations(affine_map, their, *there[n]))
                    derivatives[j] += _gram(affine_map, moved - rows, moved_targets - targets)
    return [a.balanced(b, problem.derivative_weight) for a, b in zip(values, derivatives, strict=True)]


def _equations(ours: AffineMap, theirs: AffineMap, entered: Entering, own: Entering) -> tuple[Tensor, Tensor]:
    """Rows of the merged model's layer, and what they should be mapped to, in float64."""
    rows, reference = (affine_map.rows(x).double() for affine_map, x in ((ours, entered.x), (theirs, own.x)))
    theta = theirs.read().double()
    if theirs.per_channel:
        targets = reference * theta[0] + (theta[1] if theirs.has_bias else 0.0)
    else:
        targets = (with_ones(reference) if theirs.has_bias else reference) @ theta
    if ours.offset and theirs.offset:
        targets = targets + theirs.offset(own.x).double() - ours.offset(entered.x).double()
    if ours.has_bias and not ours.per_channel:
        rows = with_ones(rows)
    if rows.device.type == "mps":  # without float64
        rows, targets = rows.cpu(), targets.cpu()
    return rows, targets


def _nothing(affine_map: AffineMap) -> tuple[Tensor, Tensor]:
    theta = affine_map.read().double()
    width = theta.shape[1] if affine_map.per_channel else len(theta)
    return theta.new_zeros(0, width), theta.new_zeros(0, theta.shape[1])


def _gram(
    affine_map: AffineMap, rows: Tensor, targets: Tensor, products: SymmetricProducts | None = None
) -> Gram:
    """Statistics of rows [x 1]; a scale and shift per channel are the unknowns of one problem with a single output."""
    if not affine_map.per_channel:
        return Gram.of(rows, targets, products=products)
    square, product = rows.square().sum(0), (rows * targets).sum(0)
    yy, n = float(targets.square().sum()), float(rows.numel())
    if not affine_map.has_bias:
        return Gram(torch.diag(square), product[:, None], yy, n)
    total, ones = torch.diag(rows.sum(0)), torch.full_like(square, float(len(rows)))
    xx = torch.cat([torch.cat([torch.diag(square), total], 1), torch.cat([total, torch.diag(ones)], 1)])
    return Gram(xx, torch.cat([product, targets.sum(0)])[:, None], yy, n)


def _flat(affine_map: AffineMap, theta: Tensor) -> Tensor:
    return theta.reshape(-1, 1) if affine_map.per_channel else theta


@torch.no_grad()
def _recalibrate(problem: ModuleProblem, step: Step) -> None:
    r"""Set mean and variance of a batch normalization to those of what enters it, every model's examples counting the same.

    Its scale and shift become those of the mean of the models' maps, which in evaluation are
    :math:`x \mapsto w\,(x-\mu)/\sigma + b`.
    """
    norm = problem.views[step.members[0]].get_submodule(step.name)
    assert isinstance(norm, _BatchNorm)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    first = torch.zeros_like(norm.running_mean, dtype=torch.float64)
    second, weight = torch.zeros_like(first), 0.0
    for k in step.members:
        own, n = [torch.zeros_like(first), torch.zeros_like(first)], 0
        view = problem.views[k]
        for item in problem.examples[k]:
            with problem.kept.replayed(view, item, but=step.name):
                own_norm = view.get_submodule(step.name)
                calls = arguments(own_norm, partial(problem.run, view, item), n_calls=step.n_calls)
            mask = problem.mask(k, item)
            for x, *_ in calls:
                assert isinstance(x, Tensor)
                rows = channels_last(norm, x).double()
                rows = rows[select(Entering(rows, None), rows, mask, item)]
                own = [own[0] + rows.sum(0), own[1] + rows.square().sum(0)]
                n += len(rows)
        if n:
            first, second = (
                total + problem.weights[k] * value / n for total, value in zip((first, second), own)
            )
            weight += problem.weights[k]
    if not weight:
        return
    mean = first / weight
    variance = (second / weight - mean.square()).clamp(min=0.0)
    if norm.affine:
        originals = [problem.models[k].get_submodule(step.name) for k in step.members]
        slopes = [
            o.get_parameter("weight").double() / (o.get_buffer("running_var").double() + norm.eps).sqrt()
            for o in originals
        ]
        shifts = [
            o.get_parameter("bias").double() - o.get_buffer("running_mean").double() * a
            for o, a in zip(originals, slopes)
        ]
        share = [problem.weights[k] for k in step.members]
        slope, shift = weighted_mean(slopes, share), weighted_mean(shifts, share)
        norm.weight.copy_(slope * (variance + norm.eps).sqrt())
        norm.bias.copy_(shift + slope * mean)
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(variance)
