"""What a caller may pass to the calculator, checked, and the force field that it leads to, ready to be served."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from ase import Atoms

from ase_gffmerge.engines.ase.dispersion import Dispersion, contains_dispersion
from ase_gffmerge.errors import ArgumentError
from ase_gffmerge.forcefield.conditioning import specialist_indices
from ase_gffmerge.forcefield.force_field import ForceField
from ase_gffmerge.inference.compiled import Compile
from ase_gffmerge.workflows.load_or_merge import Resolved

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
            f"skin={skin!r} is no length; give one of about 1 Å, or 0 to search neighbors every time"
        )
    return width


def weight_tuple(weights: Sequence[float] | None) -> tuple[float, ...] | None:
    """How much each specialist counts."""
    try:
        return None if weights is None else tuple(float(weight) for weight in weights)
    except (TypeError, ValueError):
        raise ArgumentError(f"weights={weights!r} is not a list of numbers, one per specialist") from None


def atom_indices(indices: Sequence[int] | None, n_atoms: int) -> list[int] | None:
    """Indices of atoms from 0 on; a mask and negative ones are read as numpy does."""
    if indices is None:
        return None
    wanted = np.asarray(indices)
    try:
        chosen: list[int] = np.arange(n_atoms)[wanted if wanted.size else []].tolist()
    except IndexError:
        raise ArgumentError(f"indices={indices!r:.80} are not those of {n_atoms} atoms") from None
    return chosen


def compile_choice(compile: Any) -> Compile:
    """``auto``, ``True`` or ``False``."""
    if isinstance(compile, bool | np.bool_):
        return bool(compile)
    if isinstance(compile, str) and compile == "auto":
        return "auto"
    raise ArgumentError(f"compile={compile!r} is not known; use 'auto', True or False")


def specialist_choice(specialist: Any, force_field: ForceField) -> str | int | None:
    """Name or index of a specialist as what JSON knows; refused where it does not exist or would have no effect."""
    if specialist is None:
        return None
    if force_field.potential.hyper.n_embeddings == 1:
        raise ArgumentError(
            f"specialist={specialist!r} has no effect: {force_field.name!r} has one embedding for "
            "all; leave it out, or merge with conditioning='per-specialist'"
        )
    specialist_indices(Atoms("X"), force_field.specialist_names, default=specialist)
    choice: str | int = np.asarray(specialist).item()
    return choice


def dispersion_choice(dispersion: str | None, force_field: ForceField) -> Dispersion | None:
    """D3 correction to add, unless the force field's labels contain dispersion already."""
    if dispersion is None:
        return None
    if contains_dispersion(force_field.level_of_theory):
        raise ArgumentError(
            f"{force_field.name!r} was trained on {force_field.level_of_theory}, which contains dispersion already; leave "
            "dispersion out"
        )
    return Dispersion.parse(dispersion)


def served_force_field(
    resolved: Resolved, device: torch.device, dtype: torch.dtype, forces_std: bool = False
) -> ForceField:
    """Bring the force field to the device, frozen; the caller's object stays as it is.

    Parameters
    ----------
    resolved
        What the caller's arguments led to.
    device, dtype
        Where, and in which type, the weights are wanted.
    forces_std
        Whether it has to know the uncertainty of its forces.

    Raises
    ------
    MissingUncertaintyError
        When it does not.
    """
    if forces_std:
        resolved.force_field.require_uncertainty()
    own = replace(resolved.force_field, calibration=())
    if resolved.borrowed:
        own = replace(
            own,
            potential=copy.deepcopy(own.potential),
            extrapolation_grade=copy.deepcopy(own.extrapolation_grade),
        )
    own.potential.eval().requires_grad_(False)
    return own.to(device=device, dtype=dtype)


@contextmanager
def isolated_torch() -> Iterator[None]:
    """Leave inference mode, and restore torch's random state: building modules draws initial weights."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=devices), torch.inference_mode(False):
        yield
