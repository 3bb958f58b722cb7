"""Memory: sizes as people write them, what a process holds, the bound that a user sets, and the peak of a computation.

What a process frees between two steps, and needs again at once.
"""

from __future__ import annotations

import ctypes
import os
import re
import resource
import sys
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ase_gffmerge.errors import ArgumentError

VARIABLE = "GFFMERGE_MAX_MEMORY"
"""Environment variable with the bound of merges that are given none."""

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30}


_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Numbers of ``mallopt``'s parameters."""

_KEPT, _LARGEST, _USUAL = 2**30, 2**25, 2**26
"""Bytes that may stay free while work lasts; of a block from the operating system; that may stay free otherwise."""

_working = 0


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Keep memory that is freed for the next step, for as long as the context lasts; only the time changes.

    Glibc gives the end of its heap back whenever much of it is free, which is after every step of a training; the next
    step then waits for the operating system to clear it again. Where ``MALLOC_TRIM_THRESHOLD_`` is set, and with other
    C libraries, nothing is done.
    """
    global _working
    library = _glibc()
    if library is None:
        yield
        return
    _working += 1
    library.mallopt(_MMAP_THRESHOLD, _LARGEST)
    library.mallopt(_TRIM_THRESHOLD, _KEPT)
    try:
        yield
    finally:
        _working -= 1
        if not _working:
            library.mallopt(_TRIM_THRESHOLD, _USUAL)
            library.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    if sys.platform != "linux" or "MALLOC_TRIM_THRESHOLD_" in os.environ:
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "mallopt") and hasattr(library, "malloc_trim") else None


def n_bytes(size: str | float, name: str = "max_memory") -> int:
    """Turn ``4GB``, ``500 MiB`` or a number of bytes into bytes; ``name`` is that of the option, for messages.

    Raises
    ------
    ArgumentError
        For anything else.
    """
    found = re.fullmatch(r"\s*([0-9.]+(?:[eE][+]?[0-9]+)?)\s*([kKmMgGtT]?[iI]?)[bB]?\s*", str(size))
    try:
        value = float(found[1]) * _UNITS[found[2].upper()] if found else 0.0
    except (KeyError, ValueError):
        value = 0.0
    if not 1 <= value < float("inf"):
        raise ArgumentError(f"{name}={size!r} is no size; give one such as '4GB' or '500MB'")
    return int(value)


def written(size: float) -> str:
    """Write a number of bytes for people."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def memory_bound(given: str | float | None) -> int | None:
    """Bound in bytes that a call was given, else that of the environment, else none."""
    if given is not None:
        return n_bytes(given)
    size = os.environ.get(VARIABLE)
    return n_bytes(size, VARIABLE) if size else None


def resident(device: torch.device) -> int:
    """Bytes that this process holds now: of the machine's memory, or of the GPU's."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # no Linux: the largest so far
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak * (1 if sys.platform == "darwin" else 1024)


@dataclass(frozen=True, kw_only=True)
class Portions:
    """How much of a merge is computed at once; smaller portions take less memory and more time, and give the same result.

    Attributes
    ----------
    edges
        Edges of the frames in one pass of the solves or of a training step, at least one frame; default: whole batches.
    keep_graphs
        Keep the graphs of automatic differentiation through the corrections of a stage.
    directions
        Directions along which a wide readout's frames are differentiated in one pass; default: all.
    """

    edges: int | None = None
    keep_graphs: bool = True
    directions: int | None = None


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of the tensors that are made within ``with PeakMemory() as memory: ...``, on any device.

    Attributes
    ----------
    live, peak
        Bytes held now, and the most at any time. What existed before is not counted, nor what operations use inside.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        result = func(*args, **(kwargs or {}))
        before = {_key(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and (key := _key(tensor)) not in before | self._known:
                self._add(key, tensor.untyped_storage())
        return result

    def _add(self, key: int, storage: torch.UntypedStorage) -> None:
        size = storage.nbytes()
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
