"""The file of a force field: weights, calibration frames and extrapolation grade as tensors, all else as JSON metadata."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from ase import Atoms
from ase.data import chemical_symbols
from torch import Tensor

from ase_gffmerge.errors import FileFormatError, FramesError, first_line
from ase_gffmerge.forcefield.leverage import ExtrapolationGrade
from ase_gffmerge.forcefield.provenance import (
    MergeRecord,
    Provenance,
    pack_seen,
    require_kind,
    unpack_merge_record,
    unpack_provenance,
)
from ase_gffmerge.models import Potential, build_potential
from ase_gffmerge.models.core_repulsion import CoreRepulsion
from ase_gffmerge.storage.tensor_file import content_digest, read_digest, read_file

UNITS = {"energy": "eV", "length": "Å"}
"""Of every file; others are refused."""

_WEIGHTS, _GRADE, _FRAMES = "potential.", "extrapolation_grade.", "calibration."
_CORE = "core_repulsion."
_WEIGHT_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_FRAME_ARRAYS = {"n_atoms": "i", "numbers": "i", "positions": "f", "cells": "f", "pbc": "b"}
_GARBLED = (
    KeyError,
    TypeError,
    ValueError,
    IndexError,
    AttributeError,
    RuntimeError,
    OverflowError,
    MemoryError,
)


class Contents(TypedDict):
    """What a file holds: the fields of a :class:`~ase_gffmerge.forcefield.force_field.ForceField`."""

    name: str
    potential: Potential
    calibration: tuple[Atoms, ...]
    level_of_theory: str
    provenance: Provenance
    merged: MergeRecord | None
    extrapolation_grade: ExtrapolationGrade | None


def pack(contents: Contents) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Metadata and tensors of a file."""
    potential, grade, merged = contents["potential"], contents["extrapolation_grade"], contents["merged"]
    tensors = {f"{_WEIGHTS}{name}": value for name, value in potential.state_dict().items()}
    tensors |= pack_frames(contents["calibration"]) | pack_seen(contents["provenance"])
    if grade is not None:
        tensors |= {f"{_GRADE}{name}": value for name, value in grade.state_dict().items()}
    metadata: dict[str, Any] = {
        "name": contents["name"],
        "architecture": potential.architecture,
        "hyper": potential.hyper.to_dict(),
        "species": list(potential.species),
        "units": UNITS,
        "level_of_theory": contents["level_of_theory"],
        "provenance": contents["provenance"].to_dict(),
        "merged": vars(merged) if merged else None,
    }
    return metadata, tensors


def read_contents(path: Path) -> Contents:
    """Read and check a file; the potential is frozen, with weights as stored.

    Raises
    ------
    FileFormatError
        When the file is missing, truncated, altered, of an unknown version, or not what it says.
    """
    metadata, tensors = read_file(path)
    if "checkpoint" in metadata:
        raise FileFormatError(
            f"{path} is the checkpoint of an unfinished training, not a model; run the same "
            "`gffmerge train` or `gffmerge distill` command again to finish it"
        )
    try:
        with torch.random.fork_rng(devices=[]):
            potential = _untrained(metadata, tensors)
        contents = _unpack(metadata, tensors, potential)
        units = metadata["units"]
    except FileFormatError as error:
        raise FileFormatError(f"{path}: {first_line(error)}") from None
    except _GARBLED as error:
        raise FileFormatError(
            f"{path}: metadata lack or garble {first_line(error)}; write the file again"
        ) from None
    if units != UNITS:
        raise FileFormatError(f"{path} is in units {units}, not {UNITS}; convert the model before saving it")
    _load_weights(potential, tensors, path)
    potential.eval().requires_grad_(False)
    return contents


def require_same_again(path: Path) -> None:
    """Read a file and raise :class:`FileFormatError` unless what was read would be written just so."""
    metadata, tensors = pack(read_contents(path))
    if content_digest(metadata, tensors) != read_digest(path):
        raise FileFormatError(f"{path} does not hold all that it should")


def _unpack(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor], potential: Potential) -> Contents:
    """Everything but weights, around a potential that gets them later."""
    merged = metadata["merged"]
    return Contents(
        name=require_kind(metadata["name"], str, "name"),
        potential=potential,
        calibration=unpack_frames(tensors),
        level_of_theory=require_kind(metadata["level_of_theory"], str, "level_of_theory"),
        provenance=unpack_provenance(metadata["provenance"], tensors),
        merged=unpack_merge_record(merged) if merged else None,
        extrapolation_grade=_unpack_extrapolation_grade(tensors, potential),
    )


# -- weights --


def require_finite(potential: Potential, message: str) -> None:
    """Raise :class:`FileFormatError` for a parameter or buffer with NaN or infinity.

    Parameters
    ----------
    potential
        What to look at.
    message
        Beginning of the error's text; the name of the parameter follows.
    """
    if broken := first_not_finite(potential):
        raise FileFormatError(
            f"{message}: its parameter {broken!r} contains NaN or infinity; its training "
            "diverged, or something wrote over it"
        )


def first_not_finite(potential: Potential) -> str | None:
    """Name of the first parameter or buffer that contains NaN or infinity."""
    state = potential.state_dict().items()
    return next((name for name, value in state if not _is_finite(value)), None)


def _is_finite(value: Tensor) -> bool:
    """Whether there is neither NaN nor infinity: with one of them no sum is finite, and sums are fast."""
    return math.isfinite(value.sum()) or bool(value.isfinite().all())


def _untrained(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Potential:
    """Potential with random weights, no larger than those in the file: the header may claim any size."""
    hyper, species = metadata["hyper"], metadata["species"]
    n_weights = sum(value.numel() for name, value in tensors.items() if name.startswith(_WEIGHTS))
    too_large = sorted(
        name for name, value in hyper.items() if isinstance(value, int) and value > max(n_weights, 1)
    )
    if too_large or ("n_blocks" in hyper and hyper["n_blocks"] > len(tensors)):
        raise FileFormatError(
            f"the hyper-parameters do not belong to these weights: {', '.join(too_large) or 'n_blocks'} is larger than "
            "a file of this size can be; write the file again"
        )
    potential = build_potential(metadata["architecture"], hyper, tuple(species))
    if any(name.startswith(f"{_WEIGHTS}{_CORE}") for name in tensors):
        potential.core_repulsion = CoreRepulsion.blank(potential.species)
    return potential


def _load_weights(potential: Potential, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Copy weights after checking names, types, shapes and values."""
    stored = {
        name.removeprefix(_WEIGHTS): value for name, value in tensors.items() if name.startswith(_WEIGHTS)
    }
    dtype = stored["embedding"].dtype if "embedding" in stored else potential.dtype
    if dtype in _WEIGHT_TYPES and dtype != potential.dtype:
        potential.to(dtype=dtype)
    expected = potential.state_dict()
    for name, value in expected.items():
        if name not in stored:
            raise FileFormatError(f"{path} lacks the tensor {name!r}; write the file again")
        _check_weight(name, stored[name], value, path)
    if extra := sorted(stored.keys() - expected.keys()):
        raise FileFormatError(f"{path} has unexpected tensors {extra[:3]}; write the file again")
    potential.load_state_dict(stored)
    core = potential.core_repulsion
    if core is not None and not core.sound(potential.hyper.cutoff):
        raise FileFormatError(
            f"{path}: the tables of its core repulsion are impossible; write the file again"
        )


def _check_weight(name: str, stored: Tensor, expected: Tensor, path: Path) -> None:
    if stored.shape != expected.shape:
        raise FileFormatError(
            f"{path}: tensor {name!r} has shape {tuple(stored.shape)}, the architecture needs {tuple(expected.shape)}; "
            "the hyper-parameters in the file do not belong to these weights"
        )
    if not stored.dtype.is_floating_point:
        raise FileFormatError(
            f"{path}: tensor {name!r} holds {stored.dtype}, not real numbers; write it again"
        )
    if stored.dtype != expected.dtype:
        raise FileFormatError(
            f"{path}: tensor {name!r} holds {stored.dtype}, beside others {expected.dtype} is needed; write it again"
        )
    if not _is_finite(stored):
        raise FileFormatError(f"{path}: tensor {name!r} contains NaN or infinity; the training diverged")


def _unpack_extrapolation_grade(
    tensors: Mapping[str, Tensor], potential: Potential
) -> ExtrapolationGrade | None:
    """The extrapolation grade of a file; most specialists have none."""
    if f"{_GRADE}species" not in tensors:
        return None
    species, whitening = tensors[f"{_GRADE}species"], tensors[f"{_GRADE}whitening"]
    size = whitening.shape[-1]
    known = species.dtype == torch.int64 and set(species.tolist()) <= set(potential.species)
    if not known or len(species.unique()) != len(species) or not whitening.dtype.is_floating_point:
        raise ValueError("the extrapolation grade (its elements are not those of the potential)")
    fits = whitening.shape == (len(species), size, size)
    if not (
        fits and 0 < size <= potential.hyper.channels * potential.hyper.n_blocks and _is_finite(whitening)
    ):
        raise ValueError("the extrapolation grade (its matrices do not fit its elements or are not finite)")
    deviations = tensors.get(f"{_GRADE}deviations")
    if deviations is not None and not (
        deviations.shape == (2,) and deviations.dtype == whitening.dtype and _is_finite(deviations)
    ):
        raise ValueError("the extrapolation grade (its factors of standard deviations are no two numbers)")
    aligned = whitening.clone()  # as torch allocates: sums in BLAS may depend on it
    return ExtrapolationGrade(species, aligned, deviations).eval().to(device=potential.device)


# -- calibration frames --


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
    arrays = {
        "n_atoms": np.array([len(atoms) for atoms in frames]),
        "numbers": np.concatenate([atoms.numbers for atoms in frames]),
        "positions": np.concatenate([atoms.positions for atoms in frames]),
        "cells": np.stack([atoms.cell.array for atoms in frames]),
        "pbc": np.stack([atoms.pbc for atoms in frames]),
    }
    return {f"{_FRAMES}{name}": torch.as_tensor(array) for name, array in arrays.items()}


def unpack_frames(tensors: Mapping[str, Tensor]) -> tuple[Atoms, ...]:
    """Inverse of :func:`pack_frames`; raises ``KeyError``, ``TypeError`` or ``ValueError`` for anything else."""
    if f"{_FRAMES}n_atoms" not in tensors:
        return ()
    array = {name: tensors[f"{_FRAMES}{name}"].numpy() for name in _FRAME_ARRAYS}
    _check_frames(array)
    splits = np.cumsum(array["n_atoms"])[:-1]
    numbers, positions = np.split(array["numbers"], splits), np.split(array["positions"], splits)
    return tuple(
        Atoms(z, positions=r, cell=cell, pbc=pbc)
        for z, r, cell, pbc in zip(numbers, positions, array["cells"], array["pbc"], strict=True)
    )


def _check_frames(array: Mapping[str, np.ndarray]) -> None:
    """Raise ``ValueError`` for arrays that are not those of frames."""
    for name, kind in _FRAME_ARRAYS.items():
        if array[name].dtype.kind != kind:
            raise ValueError(f"calibration frames ({name} are of type {array[name].dtype})")
    counts, numbers = array["n_atoms"], array["numbers"]
    n_frames, n_atoms = counts.size, numbers.size
    shapes = {
        "n_atoms": (n_frames,),
        "numbers": (n_atoms,),
        "positions": (n_atoms, 3),
        "cells": (n_frames, 3, 3),
        "pbc": (n_frames, 3),
    }
    fit = {name: value.shape for name, value in array.items()} == shapes
    if not fit or n_frames == 0 or counts.min() < 1 or counts.max() > n_atoms or counts.sum() != n_atoms:
        raise ValueError("calibration frames (their arrays do not fit each other)")
    if not (np.isfinite(array["positions"]).all() and np.isfinite(array["cells"]).all()):
        raise ValueError("calibration frames (their positions or cells are not finite)")
    if numbers.min() < 0 or numbers.max() >= len(chemical_symbols):
        raise ValueError("calibration frames (an atomic number is that of no element)")
