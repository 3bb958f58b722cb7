"""What a merge of modules is given, and whether it can be merged: the modules, their examples, and the rows that count."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from math import isfinite
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch_geometric.data import Data
from torch_geometric.data.data import BaseData

from ase_gffmerge.errors import ArgumentError, FramesError, IncompatibleSpecialistsError
from ase_gffmerge.merging.module_calls import SEEDS, Item, Run, held_by, outputs_of

Rows = None | str | Tensor | np.ndarray | Sequence[Any] | Callable[[int, Item], Tensor | None]
"""Which nodes count: see :func:`row_masks`."""


def check_modules(models: Sequence[nn.Module]) -> None:
    """Refuse what cannot be merged.

    Raises
    ------
    IncompatibleSpecialistsError
        For fewer than two models, for what is no module, and for parameters that cannot be averaged.
    """
    for model in models:
        if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
            raise IncompatibleSpecialistsError(
                f"a {type(model).__name__} is not a torch network of Python; give the modules themselves (of a calculator, "
                "with module=lambda calc: calc.model)"
            )
    if len(models) < 2:
        raise IncompatibleSpecialistsError(
            f"a merge needs at least two models, got {len(models)}; use a single one as it is"
        )
    first = dict(models[0].named_parameters())
    for k, model in enumerate(models):
        for name, own in model.named_parameters():
            if is_lazy(own):
                raise IncompatibleSpecialistsError(
                    f"{name} of model {k} has no values yet; evaluate the model once on an example, or load its weights"
                )
            other = first.get(name, own)
            if (own.dtype, own.device) != (other.dtype, other.device):
                raise IncompatibleSpecialistsError(
                    f"{name} is {own.dtype} on {own.device} in model {k} and {other.dtype} on {other.device} in model 0; "
                    "bring the models to one type of numbers and one device first: model.to(dtype=..., device=...)"
                )


def checked_weights(weights: Sequence[float] | None, n_models: int) -> tuple[float, ...]:
    """How much each model counts, ones where nothing is given.

    Raises
    ------
    ArgumentError
        For another number of weights than of models, or weights that are not positive and finite.
    """
    found = (1.0,) * n_models if weights is None else tuple(weights)
    if len(found) != n_models:
        raise ArgumentError(f"there are {n_models} models and {len(found)} weights; give one for each")
    if not all(isinstance(weight, Real) and 0 < weight < float("inf") for weight in found):
        raise ArgumentError(f"weights={list(found)} must be positive numbers, one for each model")
    return tuple(map(float, found))


def checked_ridge(ridge: float) -> float:
    """A relative ridge.

    Raises
    ------
    ArgumentError
        For anything but a finite number that is not negative.
    """
    if not isinstance(ridge, Real) or not 0 <= ridge < float("inf"):
        raise ArgumentError(f"ridge={ridge!r} is no relative ridge; give a small number such as 1e-3")
    return float(ridge)


def as_examples(examples: object, n_models: int) -> list[Iterable[Item]]:
    """Examples of every model, each of which can be read again and again.

    One graph or loader for all models, or a list of one for each.

    Raises
    ------
    FramesError
        When their number does not fit, or a model has none.
    """
    if isinstance(examples, BaseData | Tensor | dict) or not isinstance(examples, Sequence):
        groups = n_models * [list(examples) if isinstance(examples, Iterator) else examples]
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
    masks = [] if rows is None or isinstance(rows, str) or callable(rows) else _one_each(rows, len(models))

    def mask(k: int, item: Item) -> object:
        if callable(rows):
            return rows(k, item)
        if isinstance(rows, str):
            if rows == "confidence":
                return _most_confident(models, run, item) == k
            return _labelled(item) if rows == "labelled" else _attribute(item, rows)
        return masks[k] if masks else None

    return lambda k, item: _seeds_of(item, _fitting(item, mask(k, item)))


def _one_each(rows: Sequence[Any] | Tensor | np.ndarray, n_models: int) -> list[Any]:
    """A mask for each model, of one for all or of as many as there are models."""
    if len(rows) and rows[0] is not None and np.ndim(rows[0]) == 0:
        return n_models * [rows]
    if len(rows) != n_models:
        raise FramesError(
            f"there are {n_models} models and {len(rows)} masks in rows=; give one for each, or one for all"
        )
    return list(rows)


def _fitting(item: Item, given: object) -> Tensor | None:
    """A mask of as many nodes (or graphs) as an example has."""
    if given is None:
        return None
    mask = torch.as_tensor(given)
    if mask.dtype != torch.bool and not bool(((mask == 0) | (mask == 1)).all()):
        raise FramesError(
            "rows= chooses nodes by True and False (or 1 and 0), one for each node; it got other numbers, such as indices "
            "of nodes, of which mask = torch.zeros(n, dtype=torch.bool); mask[indices] = True makes a mask"
        )
    mask = mask.bool()
    if not isinstance(item, Data) or item.num_nodes is None:
        return mask
    sizes = {int(item.num_nodes), getattr(item, "num_graphs", None)}
    if len(mask) not in sizes:
        raise FramesError(
            f"a mask of {len(mask)} rows does not fit a graph of {item.num_nodes} nodes; give rows= the name of an "
            "attribute of the graphs, or a function of the model's index and the example"
        )
    return mask


def _attribute(item: Item, name: str) -> Tensor:
    value = held_by(item, name) if isinstance(item, BaseData) else None
    if not isinstance(value, Tensor):
        raise FramesError(
            f"rows={name!r} asks for an attribute that an example does not have; give the graphs a mask of that name, or "
            "rows='labelled', 'confidence', a mask, or a function of the model's index and the example"
        )
    return value


def _labelled(item: Item) -> Tensor:
    held = held_by(item, "y") if isinstance(item, BaseData) and held_by(item, "train_mask") is None else None
    if isinstance(held, Tensor):
        y = held.reshape(len(held), -1)[:, 0]
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
