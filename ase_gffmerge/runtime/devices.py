"""Devices: choosing one, and recognizing that its memory does not suffice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

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
