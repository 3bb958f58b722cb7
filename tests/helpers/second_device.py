"""A second device in the memory of the first, on which everything can run that is meant for a GPU.

Tensors on ``second:0`` hold a tensor on the CPU that nobody else sees. What a GPU refuses fails: an operation on tensors of
both devices, for example with one that was made in the wrong place, and NumPy's view of a tensor that was not brought back.
What it cannot tell: memory, speed, and what the kernels of a GPU do differently.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from ase_gffmerge.runtime.devices import TYPES

_setup_privateuseone_for_python_backend("second")
CPU, SECOND = torch.device("cpu"), torch.device("second:0")

aten = torch.ops.aten
BETWEEN_DEVICES = {aten._to_copy.default, aten.copy_.default}
INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
"""Operations that torch lets have indices on the CPU."""


class There(torch.Tensor):
    """A tensor on the second device; ``elem`` is where its numbers really are."""

    @staticmethod
    def __new__(cls, elem: torch.Tensor, requires_grad: bool = False) -> "There":
        return torch.Tensor._make_wrapper_subclass(
            cls,
            elem.shape,
            strides=elem.stride(),
            storage_offset=elem.storage_offset(),
            dtype=elem.dtype,
            device=SECOND,
            requires_grad=requires_grad,
        )

    def __init__(self, elem: torch.Tensor, requires_grad: bool = False):
        self.elem = elem

    def __deepcopy__(self, memo):
        copy = memo[id(self)] = There(self.elem.clone(), self.requires_grad)
        if isinstance(self, torch.nn.Parameter):
            copy._is_param = True
        return copy

    def tolist(self):
        return self.elem.tolist()

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return carried_out(function, args, kwargs or {})


def here(value):
    """What a tensor really is."""
    return value.elem if isinstance(value, There) else value


def carried_out(function, args, kwargs):
    """Result of an operation, on the device where it belongs."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    there = any(isinstance(tensor, There) for tensor in tensors)
    if there and function not in BETWEEN_DEVICES | INDEXED:
        misplaced = [tuple(t.shape) for t in tensors if not isinstance(t, There) and t.dim()]
        assert not misplaced, f"{function}: tensors {misplaced} are on the CPU, others on {SECOND}"
    device = kwargs.get("device") or (args[0].device if function is aten.copy_.default else None)
    target = torch.device(device) if device is not None else SECOND if there else CPU
    real = {**tree_map(here, kwargs), **({"device": CPU} if kwargs.get("device") is not None else {})}
    result = function(*tree_map(here, args), **real)
    if target.type != SECOND.type:
        return result
    written = args[0] if args and isinstance(args[0], There) else kwargs.get("out")
    if written is not None and result is here(written):
        return written
    return tree_map(lambda leaf: There(leaf) if isinstance(leaf, torch.Tensor) else leaf, result)


class Dispatch(TorchDispatchMode):
    """Tensors that are made there, or brought there."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return carried_out(function, args, kwargs or {})


class FromPython(TorchFunctionMode):
    """Lists of numbers, which torch would bring there without asking."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function is torch.Tensor.new_tensor:
            kwargs = {"device": args[0].device, "dtype": args[0].dtype, **kwargs}
            function, args = torch.tensor, args[1:]
        if function in (torch.tensor, torch.as_tensor) and not isinstance(args[0], torch.Tensor):
            device = kwargs.pop("device", None) or CPU
            return function(*args, **kwargs, device=CPU).to(device)
        if function is torch.Tensor.__getitem__ and isinstance(args[0], There) and isinstance(args[1], list):
            args = (args[0], torch.tensor(args[1], dtype=torch.long).to(SECOND))
        if function is torch.Tensor.__setitem__ and isinstance(args[0], There):
            args = tree_map(here, args)
        return function(*args, **kwargs)


@contextmanager
def second_device() -> Iterator[str]:
    """Within it there is a second device; gives its name."""
    TYPES.add(SECOND.type)
    with FromPython(), Dispatch():
        yield str(SECOND)


def slopes_by_differences(function, inputs, step: float = 1e-4):
    """Stand for ``merging.duals.differentiable_push``: forward derivatives of wrapped tensors crash torch."""

    def as_tuple(tensors):
        out = function(*tensors)
        return out if isinstance(out, tuple) else (out,)

    values = as_tuple(inputs.value)
    if not inputs.tangent:
        return values
    tangents = []
    for probe in zip(*inputs.tangent, strict=True):
        ahead, behind = (
            as_tuple([x + sign * step * v for x, v in zip(inputs.value, probe, strict=True)])
            for sign in (1, -1)
        )
        tangents.append([(a - b) / (2 * step) for a, b in zip(ahead, behind, strict=True)])
    return values + tuple(torch.stack(found) for found in zip(*tangents, strict=True))


def numbers(value) -> torch.Tensor:
    """All numbers of a result in one row, on the CPU."""
    leaves = [torch.as_tensor(leaf).cpu().double().flatten() for leaf in tree_leaves(deepcopy(value))]
    return torch.cat(leaves)
