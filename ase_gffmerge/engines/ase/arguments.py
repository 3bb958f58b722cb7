"""What a caller may pass to the calculator, checked: a :class:`.ArgumentError` for anything else."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ase_gffmerge.errors import ArgumentError
from ase_gffmerge.inference.compiled import Compile

DTYPES = {"float32": torch.float32, "float64": torch.float64}


def dtype_name(dtype: str | torch.dtype) -> str:
    """``float32`` or ``float64``."""
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ArgumentError(f"dtype={dtype!r} is not supported; use 'float32' or 'float64'")
    return name


def skin_width(skin: float) -> float:
    """Width of the skin in Å."""
    try:
        width = float(skin)
    except (TypeError, ValueError):
        width = -1.0
    if not 0 <= width < float("inf"):
        raise ArgumentError(
            f"skin={skin!r} is no length; give one of about 1 Å, or 0 to search neighbours every time"
        )
    return width


def weight_tuple(weights: Sequence[float] | None) -> tuple[float, ...] | None:
    """How much each specialist counts."""
    try:
        return None if weights is None else tuple(float(weight) for weight in weights)
    except (TypeError, ValueError):
        raise ArgumentError(f"weights={weights!r} is not a list of numbers, one per specialist") from None


def compile_choice(compile: Any) -> Compile:
    """``auto``, ``True`` or ``False``."""
    if isinstance(compile, bool | np.bool_):
        return bool(compile)
    if isinstance(compile, str) and compile == "auto":
        return "auto"
    raise ArgumentError(f"compile={compile!r} is not known; use 'auto', True or False")


def specialist_choice(specialist: Any) -> str | int | None:
    """Name or index of a specialist as what JSON knows."""
    choice: str | int | None = None if specialist is None else np.asarray(specialist).item()
    return choice
