"""How modules of any kind are evaluated on examples, what enters their layers there, and which rows count.

An example is anything that ``run(module, item)`` can evaluate: a graph of torch_geometric, a batch of graphs, a sampled
neighborhood with its seed nodes first, or a tensor. All layers are watched from outside while the module evaluates itself.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from inspect import Parameter, signature
from math import isfinite
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch_geometric.data import Data
from torch_geometric.data.data import BaseData

from ase_gffmerge.errors import FramesError
from ase_gffmerge.models import graph_layers  # noqa: F401 registers the layers of torch_geometric
from ase_gffmerge.models.affine_maps import LayerKind, layer_parts
from ase_gffmerge.models.torch_layers import intercepted, replaced_forward

Item = Any
"""One example, of whichever kind the modules are evaluated on."""

Run = Callable[[nn.Module, Item], object]

Rows = None | str | Tensor | Sequence[Tensor] | Callable[[int, Item], Tensor | None]
"""Which nodes count: see :func:`row_masks`."""


SEEDS = "batch_size"
"""Attribute of a sampled neighborhood with the number of its seed nodes, which come first."""


class _Reached(Exception):
    """Ends an evaluation at the layer of interest."""


def run_module(module: nn.Module, item: Item) -> object:
    """Evaluate a module without gradients: :func:`call_module`."""
    with torch.no_grad():
        return call_module(module, item)


def call_module(module: nn.Module, item: Item) -> object:
    """Call a module: graphs give the arguments that bear their attributes' names, tuples all of them, in order.

    Raises
    ------
    FramesError
        When a graph lacks what the module's ``forward`` asks for.
    """
    if isinstance(item, dict):
        return module(**item)
    if not isinstance(item, BaseData):
        return module(*item) if isinstance(item, tuple | list) else module(item)
    wanted = [
        p
        for p in signature(module.forward).parameters.values()
        if p.kind not in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD) and p.name != SEEDS
    ]
    held = {p.name: value for p in wanted if (value := _held(item, p.name)) is not None}
    missing = [p.name for p in wanted if p.default is Parameter.empty and p.name not in held]
    if len(wanted) == 1 and missing:
        return module(item)
    if missing:
        raise FramesError(
            f"the module's forward takes {missing[0]!r}, which the graph does not have (it has "
            f"{', '.join(map(str, item.keys()))}); add it to the graph, or give run=lambda model, item: model(...)"
        )
    return module(**held)


def _held(graph: BaseData, name: str) -> object:
    """An attribute of a graph, or of all node or edge types of a heterogeneous one, such as ``x_dict``."""
    if name in graph:
        return graph[name]
    return getattr(graph, name, None) if name.endswith("_dict") else None


def as_examples(examples: object, n_models: int) -> list[Iterable[Item]]:
    """Examples of every model, each of which can be read again and again.

    One graph or loader for all models, or a list of one for each.

    Raises
    ------
    FramesError
        When their number does not fit, or a model has none.
    """
    if isinstance(examples, BaseData | Tensor | dict) or not isinstance(examples, Sequence):
        groups = n_models * [examples]
    else:
        groups = list(examples)
    if len(groups) != n_models:
        raise FramesError(
            f"there are {n_models} models and examples for {len(groups)}; give one graph, list or loader for each model"
        )
    found: list[Iterable[Item]] = []
    for k, group in enumerate(groups):
        if isinstance(group, BaseData | Tensor | dict | tuple):
            group = [group]
        elif isinstance(group, Iterator):
            group = list(group)
        if not isinstance(group, Iterable) or (isinstance(group, Sequence) and not len(group)):
            raise FramesError(f"model {k} has no examples; give it at least one graph of those that it knows")
        found.append(group)
    return found


def require_outputs(k: int, n_values: int, size: float) -> None:
    """Refuse examples on which a model says nothing.

    Parameters
    ----------
    k
        Index of the model.
    n_values, size
        Outputs that count, and the sum of their squares.

    Raises
    ------
    FramesError
        Where there are none, or some are NaN or infinite.
    """
    if not n_values:
        raise FramesError(
            f"not a single row of model {k}'s examples counts, so that a merge would hold nothing of it; give it other "
            "examples, or other rows"
        )
    if not isfinite(size):
        raise FramesError(
            f"model {k} returns NaN or infinity on its examples; look for values in them that are not finite"
        )


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


# Which rows count


def row_masks(rows: Rows, models: Sequence[nn.Module], *, run: Run) -> Callable[[int, Item], Tensor | None]:
    """Function of a model's index and an example that gives the mask of the nodes that count, or ``None`` for all.

    Parameters
    ----------
    rows
        ``None``: all, or the seed nodes of a sampled neighborhood. ``"labelled"``: those in ``train_mask``, or that have a
        label in ``y`` (neither negative nor NaN). ``"confidence"``: those on which a model has the largest logsumexp of its
        logits among all models. Another string: that attribute of the graph. A mask for all models, one mask for each, or a
        function of the model's index and the example.
    models, run
        The models, and how they are evaluated.
    """

    def mask(k: int, item: Item) -> Tensor | None:
        if callable(rows):
            return rows(k, item)
        if isinstance(rows, Tensor):
            return rows
        if isinstance(rows, str):
            if rows == "confidence":
                return _most_confident(models, run, item) == k
            return _labelled(item) if rows == "labelled" else _attribute(item, rows)
        return None if rows is None else rows[k]

    return lambda k, item: _seeds_of(item, _fitting(item, mask(k, item)))


def _fitting(item: Item, mask: Tensor | None) -> Tensor | None:
    """A mask of as many nodes (or graphs) as an example has."""
    if mask is None or not isinstance(item, Data) or item.num_nodes is None:
        return mask
    sizes = {int(item.num_nodes), getattr(item, "num_graphs", None)}
    if len(mask) not in sizes:
        raise FramesError(
            f"a mask of {len(mask)} rows does not fit a graph of {item.num_nodes} nodes; give rows= the name of an "
            "attribute of the graphs, or a function of the model's index and the example"
        )
    return mask


def _attribute(item: Item, name: str) -> Tensor:
    value = item[name] if isinstance(item, BaseData) and name in item else None
    if not isinstance(value, Tensor):
        raise FramesError(
            f"rows={name!r} asks for an attribute that an example does not have; give the graphs a mask of that name, or "
            "rows='labelled', 'confidence', a mask, or a function of the model's index and the example"
        )
    return value.bool()


def _labelled(item: Item) -> Tensor:
    if isinstance(item, BaseData) and "train_mask" not in item and isinstance(item.get("y"), Tensor):
        y: Tensor = item["y"].reshape(len(item["y"]), -1)[:, 0]
        return ~y.isnan() if y.is_floating_point() else y >= 0
    return _attribute(item, "train_mask")


def _most_confident(models: Sequence[nn.Module], run: Run, item: Item) -> Tensor:
    """The model with the largest logsumexp of its logits, for every row of the outputs."""
    evidence = [outputs_of(run(model, item))[0].double().logsumexp(dim=-1) for model in models]
    return torch.stack(evidence).argmax(0)


def _seeds_of(item: Item, mask: Tensor | None) -> Tensor | None:
    """A mask without the nodes that a sampled neighborhood holds for their neighbors' sake only."""
    if not isinstance(item, Data) or not isinstance(item.get(SEEDS), int):
        return mask
    n = int(item.num_nodes or 0)
    seeds = torch.arange(n) < item[SEEDS]
    if mask is None:
        return seeds
    return seeds.to(mask.device) & mask if len(mask) == n else mask


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
    edges = item.get("edge_index") if isinstance(item, BaseData) else None
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
