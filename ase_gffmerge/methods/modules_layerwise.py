r"""Methods that merge modules layer by layer, from what enters the layers of every model on its own examples.

The two methods of GNNMerge (arXiv 2503.03384) are here as published: heads stay, layers are matched on every model's own
inputs. ``gnnmerge`` minimizes the mean squared difference of the convolutions' outputs with Adam (1000 steps at a learning
rate of 0.05). ``gnnmerge++`` solves :math:`\min_W \sum_k \frac{1}{n_k}\lVert X_k W - Y_k\rVert^2 + 10^{-6}\lVert W\rVert^2`
for every inner linear layer; biases, which it never touches, are the mean's here.
"""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch_geometric.nn.conv import MessagePassing

from ase_gffmerge.errors import IncompatibleSpecialistsError
from ase_gffmerge.least_squares.gram import Gram
from ase_gffmerge.least_squares.ridge import ridge_solve
from ase_gffmerge.merging.module_calls import (
    Entering,
    Item,
    arguments,
    entering,
    evaluating,
    outputs_of,
    select,
)
from ase_gffmerge.merging.module_layers import ModuleProblem, Step, execution_order
from ase_gffmerge.merging.module_views import shared_views
from ase_gffmerge.methods.git_rebasin import POWERS, matched_orders, similarities
from ase_gffmerge.methods.modules import ModuleInputs, Views, least_disagreement, module_method
from ase_gffmerge.methods.procrustes import turned
from ase_gffmerge.methods.regmean import ALPHAS, regression_mean
from ase_gffmerge.methods.weight_space import grid_of
from ase_gffmerge.models.affine_maps import AffineMap, layer_parts
from ase_gffmerge.models.torch_layers import is_within
from ase_gffmerge.runtime.progress import Progress

STEPS, LEARNING_RATE = 1000, 0.05
"""Of ``gnnmerge``, as published."""

RIDGE = 1e-6
"""Absolute, of ``gnnmerge++``, as published."""


# Layer by layer on the models' own inputs


@dataclass(frozen=True)
class SharedMap:
    """One affine map of a shared layer: of the merged module and of every model, and Gram matrices of what enters it there.

    Attributes
    ----------
    ours, theirs
        The map.
    grams
        G_k per row (d, d), without the column of ones.
    """

    ours: AffineMap
    theirs: Sequence[AffineMap]
    grams: Sequence[Tensor]


def shared_maps(inputs: ModuleInputs, views: Sequence[nn.Module]) -> list[SharedMap]:
    """All maps of shared layers, in the order of execution, that have more inputs than a bias or a scale."""
    problem, found = inputs.problem(views), []
    for step in execution_order(problem):
        if len(step.members) < len(views):
            continue
        layer = views[0].get_submodule(step.name)
        layers = [model.get_submodule(step.name) for model in problem.models]
        for i, part in enumerate(layer_parts(layer)):
            theirs = [list(layer_parts(own)[i].maps(step.name, own)) for own in layers]
            for j, ours in enumerate(part.maps(step.name, layer)):
                maps = [own[j] for own in theirs]
                if not ours.per_channel and len(ours.read()) > ours.has_bias:
                    grams = [_own_gram(problem, step, k, i, own) for k, own in enumerate(maps)]
                    found.append(SharedMap(ours, maps, grams))
    return found


def _own_gram(problem: ModuleProblem, step: Step, k: int, part: int, own: AffineMap) -> Tensor:
    layer = problem.models[k].get_submodule(step.name)
    run = partial(problem.run, problem.models[k])
    total = Gram.zero(len(own.read()) - own.has_bias, 0)
    for item in problem.examples[k]:
        for entered in entering(layer, layer_parts(layer)[part], partial(run, item), n_calls=step.n_calls):
            rows = own.rows(entered.x)
            rows = rows[select(entered, rows, problem.mask(k, item), item)]
            total = total + Gram.of(rows.cpu(), rows[:, :0].cpu())
    return total.xx / max(total.n_rows, 1.0)


@module_method("regmean", citation="Jin et al., arXiv 2212.09849")
@torch.no_grad()
def regmean(inputs: ModuleInputs, progress: Progress) -> Views:
    """Regression mean of every map on the models' own inputs, α of least disagreement; biases and heads stay the mean's."""
    first = inputs.mean()
    with evaluating(first):
        maps = shared_maps(inputs, first)

    def build(alpha: float) -> Views:
        views = deepcopy(first)
        for one in maps:
            theta, d = one.ours.read(), len(one.grams[0])
            solution = regression_mean(one.grams, [own.read()[:d] for own in one.theirs], alpha=alpha)
            _map_in(views[0], one.ours).write(torch.cat([solution.to(theta), theta[d:]]))
        return views

    return least_disagreement(inputs, build, grid_of(alpha=ALPHAS), progress)


def _map_in(view: nn.Module, affine_map: AffineMap) -> AffineMap:
    """The same map in a copy of the module."""
    for name, layer in view.named_modules():
        for part in layer_parts(layer):
            for own in part.maps(name, layer):
                if own.name == affine_map.name:
                    return own
    raise KeyError(affine_map.name)


@module_method("gnnmerge++", citation="GNNMerge, arXiv 2503.03384 (normal equations)")
@torch.no_grad()
def gnnmerge_plus_plus(inputs: ModuleInputs, progress: Progress) -> Views:
    """Inner linear layers solved on the models' own inputs, without anchor; biases are the mean's, heads stay."""
    views = inputs.mean()
    names = [
        name
        for name, layer in views[0].named_modules()
        if isinstance(getattr(layer, "weight", None), Tensor)
        and type(layer).__name__ == "Linear"
        and not any(is_within(name, own) for own in inputs.own)
    ]
    problem = inputs.problem(views)
    for i, name in enumerate(names):
        progress(i / len(names), name)
        total: Gram | None = None
        for k, model in enumerate(problem.models):
            layer = model.get_submodule(name)
            weight = layer.get_parameter("weight").double()
            for item in problem.examples[k]:
                for x, *_ in arguments(layer, partial(problem.run, model, item), n_calls=1):
                    assert isinstance(x, Tensor)
                    rows = x.reshape(-1, x.shape[-1]).double()
                    rows = rows[select(Entering(rows, None), rows, problem.mask(k, item), item)]
                    gram = Gram.of(rows, rows @ weight.T) * (1.0 / max(len(rows), 1))
                    total = gram if total is None else total + gram
        if total is not None:
            zero = torch.zeros_like(total.xy)
            solution = ridge_solve(total, zero, ridge=RIDGE, relative=False)
            views[0].get_submodule(name).get_parameter("weight").copy_(solution.theta.T)
    return views


@module_method("gnnmerge", citation="GNNMerge, arXiv 2503.03384 (Adam on embeddings)", trains=True)
def gnnmerge(inputs: ModuleInputs, progress: Progress) -> Views:
    """Outputs of every convolution matched to the models' on their own inputs by Adam; heads stay."""
    views = inputs.mean()
    problem = inputs.problem(views)
    inner = {
        name: layer
        for name, layer in views[0].named_modules()
        if isinstance(layer, MessagePassing) and not any(is_within(name, own) for own in inputs.own)
    }
    for i, (name, layer) in enumerate(inner.items()):
        progress(i / len(inner), name)
        pairs = []
        with torch.no_grad(), evaluating(views):
            for k, model in enumerate(problem.models):
                for item in problem.examples[k]:
                    original, mask = model.get_submodule(name), problem.mask(k, item)
                    for args in arguments(original, partial(problem.run, model, item), n_calls=1):
                        pairs.append((args, original(*args), mask))
        optimizer = torch.optim.Adam(layer.parameters(), lr=LEARNING_RATE)
        with evaluating(views):
            for _ in range(STEPS):
                optimizer.zero_grad()
                loss = torch.zeros(())
                for args, target, mask in pairs:
                    difference = layer(*args) - target
                    loss = loss + (difference if mask is None else difference[mask]).square().mean()
                loss.backward()
                optimizer.step()
    return views


@module_method("procrustes", citation="Schönemann, doi:10.1007/BF02289451")
@torch.no_grad()
def procrustes(inputs: ModuleInputs, progress: Progress) -> Views:
    """Mean of weights whose input bases were turned, map by map, towards those of one model; heads stay."""
    first = inputs.mean()
    with evaluating(first):
        maps = shared_maps(inputs, first)

    def build(reference: float) -> Views:
        views = deepcopy(first)
        for one in maps[1:]:  # the first takes the same features in all models
            theta, d = one.ours.read(), len(one.grams[0])
            weights = [own.read()[:d].double() for own in one.theirs]
            target = weights[int(reference)]
            others = [w if w is target else turned(w, target) for w in weights]
            _map_in(views[0], one.ours).write(torch.cat([torch.stack(others).mean(0).to(theta), theta[d:]]))
        return views

    return least_disagreement(inputs, build, grid_of(reference=range(len(first))), progress)


# Git Re-Basin


@dataclass(frozen=True)
class Chain:
    """Layers that follow one another, and the group of channels that each takes and gives; ``None`` stays where it is."""

    names: tuple[str, ...]
    inputs: tuple[str | None, ...]
    outputs: tuple[str | None, ...]
    sizes: Mapping[str, int]


def chain_of(problem: ModuleProblem) -> Chain:
    """The layers of a plain chain, whose channels between two layers may be put into any order.

    Raises
    ------
    IncompatibleSpecialistsError
        When a layer is no affine map as a whole.
    """
    names = [step.name for step in execution_order(problem) if 0 in step.members]
    inputs: list[str | None] = []
    outputs: list[str | None] = []
    sizes: dict[str, int] = {}
    group: str | None = None
    for i, name in enumerate(names):
        parts = layer_parts(problem.models[0].get_submodule(name))
        maps = [one for part in parts for one in part.maps(name, problem.models[0].get_submodule(name))]
        if len(maps) != 1 or maps[0].offset:
            raise IncompatibleSpecialistsError(
                f"nobody has declared which channels of the layer {name!r} may be permuted; leave git_rebasin out"
            )
        theta = maps[0].read()
        inputs.append(group)
        if maps[0].per_channel:
            outputs.append(group)
            continue
        group = name if i + 1 < len(names) else None
        outputs.append(group)
        if group:
            sizes[group] = theta.shape[1]
    return Chain(tuple(names), tuple(inputs), tuple(outputs), sizes)


def permuted_module(model: nn.Module, chain: Chain, orders: Mapping[str, Tensor]) -> nn.Module:
    """Copy of a module with other channel order.

    Parameters
    ----------
    model, chain
        The module and its layers.
    orders
        For every group the old place of each new channel.
    """
    result = deepcopy(model)
    for name, before, after in zip(chain.names, chain.inputs, chain.outputs, strict=True):
        layer = result.get_submodule(name)
        (part,) = layer_parts(layer)
        (affine_map,) = part.maps(name, layer)
        theta = affine_map.read().clone()
        if before and not affine_map.per_channel:
            blocks = theta[: len(theta) - affine_map.has_bias].reshape(
                -1, chain.sizes[before], theta.shape[1]
            )
            rows = blocks[:, orders[before]].reshape(-1, theta.shape[1])
            theta = torch.cat([rows, theta[len(rows) :]])
        if after:
            theta = theta[:, orders[after]]
            for key in ("running_mean", "running_var"):
                if isinstance(held := getattr(layer, key, None), Tensor):
                    held.copy_(held[orders[after]])
        affine_map.write(theta)
    return result


@module_method("git_rebasin", citation="Ainsworth et al., arXiv 2209.04836")
@torch.no_grad()
def git_rebasin(inputs: ModuleInputs, progress: Progress) -> Views:
    """Mean after the channels between layers were brought into one order by their activations; heads stay.

    Raises
    ------
    IncompatibleSpecialistsError
        For modules that are no plain chain of layers.
    """
    problem, n = inputs.problem(inputs.mean()), len(inputs.models)
    chain = chain_of(problem)
    items = [item for examples in problem.examples for item in examples]
    moments = [
        (group, _moment(problem, name, items, size=chain.sizes[group]))
        for name, group in zip(chain.names, chain.inputs, strict=True)
        if group
    ]

    def build(power: float) -> Views:
        _, orders = matched_orders(similarities(moments, n, power=power))
        moved = [
            permuted_module(model, chain, order) for model, order in zip(inputs.models, orders, strict=True)
        ]
        for model, other in zip(inputs.models, moved, strict=True):
            before, after = (outputs_of(inputs.run(m, items[0]))[0] for m in (model, other.eval()))
            if not torch.allclose(before, after, atol=1e-3 * float(before.abs().max())):
                raise IncompatibleSpecialistsError(
                    "the modules are no plain chain of layers: other channel orders change their outputs; leave "
                    "git_rebasin out"
                )
        return shared_views(moved, inputs.own)

    return least_disagreement(inputs, build, grid_of(power=POWERS), progress)


def _moment(problem: ModuleProblem, name: str, items: Sequence[Item], *, size: int) -> Tensor:
    """Second moments (K c + 1, K c + 1) of the c channels that enter a layer in K models, and of the constant 1."""
    total = torch.zeros(())
    for item in items:
        columns = []
        for model in problem.models:
            layer = model.get_submodule(name)
            (part,) = layer_parts(layer)
            (entered, *_) = entering(layer, part, partial(problem.run, model, item), n_calls=1)
            columns.append(entered.x.reshape(-1, entered.x.shape[-1])[:, :size].double().cpu())
        z = torch.cat([*columns, torch.ones_like(columns[0][:, :1])], dim=1)
        total = total + z.T @ z
    return total
