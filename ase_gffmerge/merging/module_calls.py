"""How modules of any kind are evaluated on examples, what enters their layers there, and which rows of it count.

An example is anything that ``run(module, item)`` can evaluate: a graph of torch_geometric, a batch of graphs, a sampled
neighborhood with its seed nodes first, or a tensor. All layers are watched from outside while the module evaluates itself.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from inspect import Parameter, signature
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch_geometric.data import HeteroData
from torch_geometric.data.data import BaseData

from ase_gffmerge.errors import FramesError
from ase_gffmerge.models import graph_layers  # noqa: F401 registers the layers of torch_geometric
from ase_gffmerge.models.affine_maps import AffineMap, LayerKind, layer_parts
from ase_gffmerge.models.torch_layers import intercepted, is_within, replaced_forward

Item = Any
"""One example, of whichever kind the modules are evaluated on."""

Run = Callable[[nn.Module, Item], object]

SEEDS = "batch_size"
"""Attribute of a sampled neighborhood with the number of its seed nodes, which come first."""


class _Reached(Exception):
    """Ends an evaluation at the layer of interest."""


def run_module(module: nn.Module, item: Item) -> object:
    """Evaluate a module without gradients (:func:`call_module`); convolutions with ``cached=True`` keep no graph of it."""
    kept = [
        (part, {key: x for key, x in vars(part).items() if key.startswith("_cached_")})
        for part in module.modules()
    ]
    try:
        with torch.no_grad():
            return call_module(module, item)
    finally:
        for part, held in kept:
            part.__dict__.update(held)


def call_module(module: nn.Module, item: Item) -> object:
    """Call a module: graphs give the arguments that bear their attributes' names, tuples all of them, in order.

    Raises
    ------
    FramesError
        When a graph lacks what the module's ``forward`` asks for.
    """
    if not isinstance(item, BaseData):
        args = tuple(item) if isinstance(item, tuple | list) else () if isinstance(item, dict) else (item,)
        named = item if isinstance(item, dict) else {}
        try:
            signature(module.forward).bind(*args, **named)
        except TypeError as error:
            raise FramesError(
                f"an example does not fit the module's forward: {error}; a tuple holds its positional and a dictionary its "
                "keyword arguments, and several models take a list with the examples of each"
            ) from None
        return module(*args, **named)
    wanted = [
        p
        for p in signature(module.forward).parameters.values()
        if p.kind not in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD) and p.name != SEEDS
    ]
    held = {p.name: value for p in wanted if (value := held_by(item, p.name)) is not None}
    missing = [p.name for p in wanted if p.default is Parameter.empty and p.name not in held]
    if len(missing) == 1 and not held:
        return module(item)
    if not wanted:
        raise FramesError(
            "the module's forward names no arguments (is it compiled, or a wrapper of another one?), so that nobody knows "
            "what of a graph it takes; give the module inside, or run=lambda model, item: model(...)"
        )
    if missing:
        raise FramesError(
            f"the module's forward takes {missing[0]!r}, which the graph does not have (it has "
            f"{', '.join(map(str, item.keys()))}); add it to the graph, or give run=lambda model, item: model(...)"
        )
    return module(**held)


def held_by(graph: BaseData, name: str) -> object:
    """An attribute of a graph, or of all node or edge types of a heterogeneous one, such as ``x_dict`` (or ``x``)."""
    if not isinstance(graph, HeteroData):
        return graph.get(name)
    if name in graph._global_store:  # graph[name] would make a kind of nodes of that name
        return graph._global_store[name]
    return graph.collect(name.removesuffix("_dict"), allow_empty=True) or None


@contextmanager
def evaluating(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Put modules into evaluation mode, and back into the mode of each of their parts."""
    modes = {part: part.training for module in modules for part in module.modules()}
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # which evaluates layers without calling them
    for part in modes:
        part.training = False
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for part, mode in modes.items():
            part.training = mode


def solvable_layers(root: nn.Module) -> dict[str, nn.Module]:
    """Layers with affine maps by name; what lies inside a layer whose maps hold its parameters is left out."""
    found: dict[str, nn.Module] = {}
    taken: set[int] = set()
    for name, module in root.named_modules():
        own = covered_parameters(module)
        ids = {id(module.get_parameter(key)) for key in own}
        if own and not ids <= taken:
            found[name] = module
            taken |= ids
    return found


def covered_parameters(layer: nn.Module) -> set[str]:
    """Names of the parameters that a layer's maps hold."""
    maps = (affine_map for part in layer_parts(layer) for affine_map in part.maps("", layer))
    return {key for affine_map in maps for key in affine_map.parameters(affine_map.read())}


def is_tied(root: nn.Module) -> bool:
    """Whether layers have a parameter in common, so that solving one changes what another returns."""
    return len(list(root.parameters())) < len(list(root.named_parameters(remove_duplicate=False)))


def channel_owners(affine_map: AffineMap, n_models: int) -> Tensor | None:
    """The model (d_out,) that each output of a map follows; ``None`` where a layer has fewer channels than models."""
    block, n_blocks = affine_map.block
    width = affine_map.read().shape[1]
    if width * n_blocks < n_models:
        return None
    return (block * width + torch.arange(width)) * n_models // (width * n_blocks)


def averaged_names(
    models: Sequence[nn.Module],
    view: nn.Module,
    *,
    reached: Collection[str],
    recalibrated: Collection[str],
    own: tuple[str, ...],
) -> tuple[str, ...]:
    """Parameters that no problem covers, and buffers that differ between the models: both are the mean of the models'.

    Parameters
    ----------
    models
        The models.
    view
        The merged module.
    reached, recalibrated
        Names of layers that were solved, and of those whose statistics were taken anew.
    own
        Names of what every model keeps.
    """
    solved = {
        id(view.get_submodule(name).get_parameter(key))
        for name in reached
        if not any(is_within(name, head) for head in own)
        for key in covered_parameters(view.get_submodule(name))
    }
    names = [name for name, parameter in view.named_parameters() if id(parameter) not in solved]
    theirs = [dict(model.named_buffers()) for model in models]
    for name, buffer in view.named_buffers():
        fresh = any(is_within(name, norm) for norm in recalibrated)
        others = [held[name] for held in theirs if name in held and held[name].shape == buffer.shape]
        if has_mean(buffer) and not fresh and any(not torch.equal(o, others[0]) for o in others):
            names.append(name)
    return tuple(name for name in names if not any(is_within(name, head) for head in own))


def own_buffers(models: Sequence[nn.Module], own: tuple[str, ...]) -> tuple[str, ...]:
    """Buffers outside of the heads that differ between the models and have no mean: integers, and other shapes.

    Counters of batches do not matter.
    """
    theirs = [dict(model.named_buffers()) for model in models]
    found = []
    for name in dict.fromkeys(name for held in theirs for name in held):
        if name.endswith("num_batches_tracked") or any(is_within(name, head) for head in own):
            continue
        here = [held.get(name) for held in theirs]
        alike = all(x is not None and here[0] is not None and x.shape == here[0].shape for x in here)
        if not alike or not (has_mean(here[0]) or all(x.equal(here[0]) for x in here)):  # type: ignore[arg-type,union-attr]
            found.append(name)
    return tuple(found)


def has_mean(tensor: Tensor) -> bool:
    """Whether it holds real or complex numbers, and not integers."""
    return tensor.is_floating_point() or tensor.is_complex()


def executed_layers(root: nn.Module, run: Callable[[], object]) -> dict[str, int]:
    """Names of the layers with affine maps, in the order in which they finish, and how often each is called."""
    calls: dict[str, int] = {}

    def noting(name: str, original: Callable[..., object]) -> Callable[..., object]:
        def forward(*args: object, **kwargs: object) -> object:
            output = original(*args, **kwargs)
            calls[name] = calls.pop(name, 0) + 1
            return output

        return forward

    with ExitStack() as stack:
        for name, layer in solvable_layers(root).items():
            handle = layer.register_forward_hook(
                lambda *_: None
            )  # keeps fused evaluations of several layers away
            stack.callback(handle.remove)
            stack.enter_context(replaced_forward(layer, noting(name, layer.forward)))
        run()
    return calls


class Entering(NamedTuple):
    """What enters a part of a layer in one call: ``x`` for its maps, and the node of each row where that is known."""

    x: Tensor
    nodes: Tensor | None


def entering(layer: nn.Module, part: LayerKind, run: Callable[[], object], *, n_calls: int) -> list[Entering]:
    """What enters a part of a layer in its first ``n_calls`` calls, where the evaluation ends.

    Parameters
    ----------
    layer, part
        The layer and one of its :func:`.layer_parts`.
    run
        Evaluates the module.
    n_calls
        After how many calls it ends; fewer if it does not come so far.
    """
    caught: list[Entering] = []

    def note(args: tuple[object, ...]) -> None:
        nodes = None if part.nodes is None else part.nodes(layer, *args)
        with torch.no_grad():
            caught.append(Entering(part.entering(layer, *args).detach().clone(), nodes))
        if len(caught) == n_calls:
            raise _Reached

    with intercepted(layer, note):
        try:
            run()
        except Exception:
            if len(caught) < n_calls:  # an error of the module, not the end of the evaluation
                raise
    return caught


def arguments(layer: nn.Module, run: Callable[[], object], *, n_calls: int) -> list[tuple[object, ...]]:
    """Positional arguments of the first calls of a layer.

    Parameters
    ----------
    layer
        The layer.
    run, n_calls
        See :func:`entering`.
    """
    caught: list[tuple[object, ...]] = []

    def note(args: tuple[object, ...]) -> None:
        caught.append(args)
        if len(caught) == n_calls:
            raise _Reached

    with intercepted(layer, note):
        try:
            run()
        except Exception:
            if len(caught) < n_calls:
                raise
    return caught


def outputs_of(result: object) -> list[Tensor]:
    """All tensors of numbers that a module returned."""
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def select(entered: Entering, rows: Tensor, mask: Tensor | None, item: Item) -> Tensor:
    """Which of the rows (n, d) count (n,): those of the mask's nodes, or of the edges that end there.

    Parameters
    ----------
    entered
        Where they come from.
    rows
        Rows, one or several per node, edge or graph.
    mask
        Of the nodes (or graphs).
    item
        The example.
    """
    everything = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
    if mask is None:
        return everything
    mask = mask.to(rows.device)
    if entered.nodes is not None:
        return mask[entered.nodes.to(rows.device)]
    if len(rows) == len(mask):
        return mask
    edges = held_by(item, "edge_index") if isinstance(item, BaseData) else None
    if isinstance(edges, Tensor) and edges.dim() == 2 and edges.shape[1] == len(rows):
        return mask[edges[1].to(rows.device)]
    return everything


def thinned(selected: Tensor, most: int | None) -> Tensor:
    """Indices of selected rows, at most so many, chosen at random; always the same choice."""
    indices = selected.nonzero()[:, 0]
    if most is None or len(indices) <= most:
        return indices
    order = torch.randperm(len(indices), generator=torch.Generator().manual_seed(0))[:most]
    return indices[order.to(indices.device)]
