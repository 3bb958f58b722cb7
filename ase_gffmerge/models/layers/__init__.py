"""Building blocks of the architectures, and what e3nn needs before it is imported.

Construction of modules on e3nn, this project's and other packages', with e3nn 0.6 and with 0.4, which MACE needs.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Tracer
from torch.overrides import TorchFunctionMode

from ase_gffmerge.runtime.devices import ForkSafeLock

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


class CodeTracer(Tracer):
    """Traces generated code without folding what it computes of buffers, or makes of nothing, into new constants."""

    proxy_buffer_attributes = True

    def trace(self, root: nn.Module, concrete_args: dict[str, object] | None = None) -> Graph:  # type: ignore[override]
        """See the base class."""
        with _RecordedFactories(self):
            return super().trace(root, concrete_args)


class _RecordedFactories(TorchFunctionMode):
    """Lets a tracer record the calls of functions that make tensors of nothing."""

    def __init__(self, tracer: Tracer):
        super().__init__()
        self.tracer = tracer

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        if func in (torch.empty, torch.zeros, torch.ones):
            return self.tracer.create_proxy("call_function", func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


def keep_plain(root: nn.Module) -> None:
    """Let copies of the code that e3nn generated be what the original is, with the same buffers and no others.

    A pickle of such code, and with e3nn 0.6 every copy, traces it again. By default that folds products of buffers, and with
    e3nn 0.4 empty tensors, into constants that are named ``_tensor_constant0``, ... and stand in state dictionaries. e3nn
    0.4 compiles it when it copies it; what it generates to raise an error, in place of a method that was not asked for,
    cannot be read from a pickle and goes.
    """
    for module in list(root.modules()):
        if "jit_mode" not in _EAGER and hasattr(module, "__codegen__"):
            setattr(module, "__codegen__", [])  # noqa: B010 (a module's own attribute, which is no tensor)
        for name, part in list(module.named_children()):
            if not isinstance(part, GraphModule):
                continue
            if "jit_mode" not in _EAGER and not any(node.op == "output" for node in part.graph.nodes):
                delattr(module, name)
            part._tracer_cls = part.graph._tracer_cls = CodeTracer


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
