"""Construction of modules on e3nn, this project's and other packages'."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock

import e3nn
import torch

_lock = RLock()


@contextmanager
def eager_e3nn() -> Iterator[None]:
    """Let e3nn build plain modules, which differentiate, copy and pickle; its defaults are then restored."""
    with _lock:
        mode = e3nn.get_optimization_defaults()["jit_mode"]
        e3nn.set_optimization_defaults(jit_mode="eager")
        try:
            yield
        finally:
            e3nn.set_optimization_defaults(jit_mode=mode)


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
