"""Choice of the device, and what torch needs in a forked process."""

import os

import torch

from ase_gffmerge.errors import DeviceError

_process = os.getpid()


def survive_fork() -> None:
    """Let torch compute with one thread in a process that was forked; call it before computing.

    Such a process inherits the pools of threads that torch had used, but not the threads, and would wait for them forever.
    """
    global _process
    if os.getpid() != _process:
        _process = os.getpid()
        torch.set_num_threads(1)


def resolve_device(name: str | torch.device = "auto") -> torch.device:
    """Turn ``auto``, ``cpu``, ``cuda`` or ``cuda:N`` into a device that exists.

    Raises
    ------
    DeviceError
        When CUDA is asked for and not there, or the name is not a device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise DeviceError(f"{name!r} is not a device; use auto, cpu, cuda or cuda:N") from None
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
