"""Construction of modules on e3nn, this project's and other packages', with e3nn 0.6 and with 0.4, which MACE needs."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.fx import GraphModule

from ase_gffmerge.runtime.forking import ForkSafeLock

# e3nn 0.4's file of constants holds slices, which torch >= 2.6 would refuse
with torch.serialization.safe_globals([slice]):
    import e3nn
    from e3nn.nn import FullyConnectedNet
    from e3nn.o3 import Linear as EquivariantLinear

__all__ = ["EquivariantLinear", "FullyConnectedNet", "eager_e3nn", "keep_plain", "package_mode"]

_lock = ForkSafeLock()

_EAGER: dict[str, str | bool] = (
    {"jit_mode": "eager"} if "jit_mode" in e3nn.get_optimization_defaults() else {"jit_script_fx": False}
)
"""The option of plain modules, by its name in the e3nn that is installed."""


@contextmanager
def eager_e3nn() -> Iterator[None]:
    """Let e3nn build plain modules, which differentiate, copy and pickle; its defaults are then restored."""
    with _lock:
        defaults = e3nn.get_optimization_defaults()
        e3nn.set_optimization_defaults(**_EAGER)
        try:
            yield
        finally:
            e3nn.set_optimization_defaults(**{option: defaults[option] for option in _EAGER})


def keep_plain(root: nn.Module) -> None:
    """Let copies of plain modules be plain, too: e3nn 0.4 compiles the code that it generated when it copies it.

    What it generates to raise an error, in place of a method that was not asked for, cannot be read from a pickle and goes.
    """
    if "jit_mode" in _EAGER:
        return
    for module in list(root.modules()):
        if hasattr(module, "__codegen__"):
            setattr(module, "__codegen__", [])  # noqa: B010 (a module's own attribute, which is no tensor)
        for name, part in list(module.named_children()):
            if isinstance(part, GraphModule) and not any(node.op == "output" for node in part.graph.nodes):
                delattr(module, name)


@contextmanager
def package_mode(dtype: torch.dtype = torch.float64) -> Iterator[None]:
    """Let another package build plain modules of one type; default type and random numbers are then as before."""
    before = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[]), eager_e3nn():
        torch.set_default_dtype(dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(before)
