"""Calibration frames as the tensors of a file."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from ase import Atoms
from ase.data import chemical_symbols
from torch import Tensor

from ase_gffmerge.errors import FramesError

_KINDS = {"n_atoms": "i", "numbers": "i", "positions": "f", "cells": "f", "pbc": "b"}


def require_sound(frames: Sequence[Atoms], owner: str) -> None:
    """Raise :class:`FramesError` for frames without atoms, and for positions or cells that are not finite."""
    for i, atoms in enumerate(frames):
        if len(atoms) == 0:
            raise FramesError(f"calibration frame {i} of {owner!r} is empty; leave that frame out")
        if not (np.isfinite(atoms.positions).all() and np.isfinite(atoms.cell.array).all()):
            raise FramesError(
                f"calibration frame {i} of {owner!r} ({atoms.get_chemical_formula()}) has positions or cell vectors that "
                "are NaN or infinite; leave that frame out"
            )


def pack_frames(frames: Sequence[Atoms]) -> dict[str, Tensor]:
    """Flatten frames into tensors: atom counts, numbers, positions (float64), cells, periodicity."""
    if not frames:
        return {}
    return {
        "calibration.n_atoms": torch.tensor([len(atoms) for atoms in frames]),
        "calibration.numbers": torch.as_tensor(np.concatenate([atoms.numbers for atoms in frames])),
        "calibration.positions": torch.as_tensor(np.concatenate([atoms.positions for atoms in frames])),
        "calibration.cells": torch.as_tensor(np.stack([atoms.cell.array for atoms in frames])),
        "calibration.pbc": torch.as_tensor(np.stack([atoms.pbc for atoms in frames])),
    }


def unpack_frames(tensors: Mapping[str, Tensor]) -> tuple[Atoms, ...]:
    """Inverse of :func:`pack_frames`; raises ``KeyError``, ``TypeError`` or ``ValueError`` for anything else."""
    if "calibration.n_atoms" not in tensors:
        return ()
    array = {key: tensors[f"calibration.{key}"].numpy() for key in _KINDS}
    _check(array)
    splits = np.cumsum(array["n_atoms"])[:-1]
    numbers, positions = np.split(array["numbers"], splits), np.split(array["positions"], splits)
    return tuple(
        Atoms(z, positions=r, cell=cell, pbc=pbc)
        for z, r, cell, pbc in zip(numbers, positions, array["cells"], array["pbc"], strict=True)
    )


def _check(array: Mapping[str, np.ndarray]) -> None:
    """Raise ``ValueError`` for arrays that are not those of frames."""
    for key, kind in _KINDS.items():
        if array[key].dtype.kind != kind:
            raise ValueError(f"calibration frames ({key} are of type {array[key].dtype})")
    counts, numbers = array["n_atoms"], array["numbers"]
    n_frames, n_atoms = counts.size, numbers.size
    shapes = {
        "n_atoms": (n_frames,),
        "numbers": (n_atoms,),
        "positions": (n_atoms, 3),
        "cells": (n_frames, 3, 3),
        "pbc": (n_frames, 3),
    }
    fit = {key: value.shape for key, value in array.items()} == shapes
    if not fit or n_frames == 0 or counts.min() < 1 or counts.max() > n_atoms or counts.sum() != n_atoms:
        raise ValueError("calibration frames (their arrays do not fit each other)")
    if not (np.isfinite(array["positions"]).all() and np.isfinite(array["cells"]).all()):
        raise ValueError("calibration frames (their positions or cells are not finite)")
    if numbers.min() < 0 or numbers.max() >= len(chemical_symbols):
        raise ValueError("calibration frames (an atomic number is that of no element)")
