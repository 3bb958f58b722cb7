"""Devices: choosing one, fitting batches into its memory, and surviving the fork of a process.

What happens when the memory of a device does not suffice: smaller batches, or an error that says what would.

What a process needs that was forked from one that computes.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Protocol, TypeVar

import torch

from ase_gffmerge.errors import DeviceError, DeviceMemoryError

TYPES = {"cpu", "cuda"}
"""Types of devices on which everything runs; others that torch knows lack float64, some operations, or any numbers."""

_ALLOCATION_FAILED = ("can't allocate memory", "not enough memory", "ALLOC_FAILED", "out of memory")
"""Words of torch's errors that have no class of their own: on the CPU, and in CUDA's libraries."""


def resolve_device(name: str | torch.device = "auto") -> torch.device:
    """Turn ``auto``, ``cpu``, ``cuda`` or ``cuda:N`` into a device that exists.

    Raises
    ------
    DeviceError
        When CUDA is asked for and not there, or the name is not a device, or one of a type that is not supported.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise DeviceError(f"{name!r} is not a device; use auto, cpu, cuda or cuda:N") from None
    if device.type not in TYPES:
        raise DeviceError(f"devices of type {device.type!r} are not supported; use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (
        not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()
    ):
        raise DeviceError(
            f"device {name!r} was asked for but torch {torch.__version__} sees {torch.cuda.device_count()} CUDA "
            "device(s); use device='cpu' or 'auto', or install a CUDA build of torch"
        )
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())  # other threads may have another one
    return device


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is not enough memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _ALLOCATION_FAILED)


@contextmanager
def memory_errors(what: str, *, device: torch.device, remedy: str = "") -> Iterator[None]:
    """Turn running out of memory into an error with a remedy.

    Parameters
    ----------
    what
        What needs more memory than there is; begins the message.
    device
        Where.
    remedy
        What to do, beside using another machine or device; default: end other programs.

    Raises
    ------
    DeviceMemoryError
        In the place of every error that :func:`is_out_of_memory` recognizes.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        elsewhere = "a machine with more memory" if device.type == "cpu" else "device='cpu'"
        raise DeviceMemoryError(
            f"{what} needs more memory than {device} has free; {remedy or 'end what else runs there'}, or use {elsewhere}"
        ) from error


_process = os.getpid()


def survive_fork() -> None:
    """Let torch compute with one thread in a process that was forked; call it before computing.

    Such a process inherits the pools of threads that torch had used, but not the threads, and would wait for them forever.
    """
    global _process
    if os.getpid() != _process:
        _process = os.getpid()
        torch.set_num_threads(1)


class ForkSafeLock:
    """A reentrant lock that is open in a forked process, whatever the threads of its parent were doing.

    Such a process has one thread; a lock that another thread held would never be given back.
    """

    def __init__(self) -> None:
        self._process, self._lock = os.getpid(), threading.RLock()

    def __enter__(self) -> None:
        if os.getpid() != self._process:
            self._process, self._lock = os.getpid(), threading.RLock()
        self._lock.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()


Item = TypeVar("Item")
Frame = TypeVar("Frame", bound="Structure")
Result = TypeVar("Result")


class Structure(Protocol):
    """Atoms, or a graph of them."""

    def __len__(self) -> int:
        """Number of atoms."""
        ...

    def get_chemical_formula(self) -> str:
        """Formula for a message."""
        ...


def chunks(items: Iterable[Item], budget: int, *, size: Callable[[Any], int] = len) -> Iterator[list[Item]]:
    """Consecutive items, frames for example, in groups that do not exceed a budget, of at least one item each.

    Parameters
    ----------
    items
        What is grouped.
    budget
        Largest sum of the sizes in a group of several.
    size
        Of an item; of frames the number of atoms.
    """
    group: list[Item] = []
    total = 0
    for item in items:
        if group and total + size(item) > budget:
            yield group
            group, total = [], 0
        group.append(item)
        total += size(item)
    if group:
        yield group


def in_parts(
    evaluate: Callable[[Sequence[Frame]], Result], frames: Sequence[Frame], *, device: torch.device
) -> list[Result]:
    """Evaluate a batch of frames; where memory does not suffice, its halves, down to single frames.

    Parameters
    ----------
    evaluate
        Maps a batch of frames to its result.
    frames
        One batch of structures, or of their graphs.
    device
        Where ``evaluate`` computes; for the message, and to give cached memory back before trying again.

    Returns
    -------
    list
        One result per part, in the order of the frames; a single one when memory sufficed.

    Raises
    ------
    DeviceMemoryError
        When a single frame does not fit.
    """
    survive_fork()
    try:
        return [evaluate(frames)]
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        if len(frames) == 1:
            formula = f"{frames[0].get_chemical_formula()} ({len(frames[0])} atoms)"
            with memory_errors(formula, device=device):
                raise
    if device.type == "cuda":  # here the error is gone, and with it the tensors that its traceback held
        torch.cuda.empty_cache()
    half = len(frames) // 2
    return [
        result
        for part in (frames[:half], frames[half:])
        for result in in_parts(evaluate, part, device=device)
    ]
