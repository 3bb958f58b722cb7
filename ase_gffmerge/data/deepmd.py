"""DeePMD-kit system folders: ``type.raw``, ``type_map.raw`` and arrays per set (Å, eV, eV/Å; virial eV)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from ase.data import atomic_numbers

from ase_gffmerge.data.arrays import FrameArrays, checked_arrays
from ase_gffmerge.errors import FileFormatError

_NAMES = {"positions": "coord", "cells": "box", "energies": "energy", "forces": "force", "virials": "virial"}


def is_deepmd(path: Path) -> bool:
    """Whether `path` is a folder of DeePMD-kit's layout."""
    return (path / "type.raw").is_file()


def read_deepmd(folder: Path) -> FrameArrays:
    """Read a DeePMD-kit folder; all its ``set.*`` in the order of their names are one series of frames.

    Arrays come from ``set.*/NAME.npy`` or, where there are no sets, from the text files ``NAME.raw``; NAME is
    coord, box, energy, force, virial. A file ``nopbc`` marks a system without periodicity.

    Parameters
    ----------
    folder
        Folder with ``type.raw`` and ``type_map.raw``.

    Returns
    -------
    FrameArrays
        In eV and Å.

    Raises
    ------
    FileFormatError
        If a needed file is missing, truncated, or of a shape that does not fit.
    FramesError
        If there are no frames or values are not finite.
    """
    raw = {"numbers": _numbers(folder)}
    sets = sorted(folder.glob("set.*"))
    if any((s / "real_atom_types.npy").exists() for s in sets):
        raise FileFormatError(f"{folder} is of DeePMD's mixed type; write one folder for each composition")
    for attribute, name in _NAMES.items():
        parts = [s / f"{name}.npy" for s in sets] or [folder / f"{name}.raw"]
        if any(part.exists() for part in parts):
            raw[attribute] = np.concatenate([_load(part) for part in parts])
    if "positions" not in raw:
        raise FileFormatError(
            f"{folder} lacks coordinates: set.*/coord.npy or coord.raw; get the folder again"
        )
    if (folder / "nopbc").exists():
        raw.pop("cells", None)
    elif "cells" not in raw:
        raise FileFormatError(
            f"{folder} lacks box.npy; add it, or an empty file 'nopbc' if it is not periodic"
        )
    return checked_arrays(folder, raw)


def _numbers(folder: Path) -> np.ndarray:
    """Atomic numbers (n_atoms,) from the type indices and the type map."""
    if not (folder / "type_map.raw").is_file():
        raise FileFormatError(f"{folder} lacks type_map.raw: write the element symbols there, one per type")
    symbols = (folder / "type_map.raw").read_text(encoding="utf-8").split()
    try:
        types = [int(word) for word in (folder / "type.raw").read_text(encoding="utf-8").split()]
        if min(types, default=0) < 0:
            raise IndexError("negative type index")
        return np.array([atomic_numbers[symbols[t]] for t in types], dtype=int)
    except (ValueError, IndexError, KeyError) as error:
        raise FileFormatError(
            f"{folder}: type.raw and type_map.raw ({' '.join(symbols)}) do not give elements: {error}"
        ) from error


def _load(path: Path) -> np.ndarray:
    """One array with the frames first; a single number per line in text becomes (n_frames,)."""
    try:
        if path.suffix == ".npy":
            return np.atleast_1d(np.load(path, allow_pickle=False))
        array = np.loadtxt(path, ndmin=2)
        return array[:, 0] if path.stem == "energy" else array
    except (OSError, ValueError, EOFError) as error:
        raise FileFormatError(
            f"{path} is missing, truncated or damaged ({error}); get the file again"
        ) from error
