"""Construction of e3nn modules without TorchScript."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock

import e3nn

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
