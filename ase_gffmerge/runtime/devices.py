"""Choice of the device."""

import torch

from ase_gffmerge.errors import DeviceError

TYPES = {"cpu", "cuda"}
"""Types of devices on which everything runs; others that torch knows lack float64, some operations, or any numbers."""


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
