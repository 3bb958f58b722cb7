"""NumPy archives with frames: the forms of rMD17, of MD17/MD22 (sGDML) and of LiPS20.

The form, and with it the units, follows from the keys:

===========  ====================================================  =====================
form         keys needed (optional)                                units
===========  ====================================================  =====================
LiPS20       nuclear_charges, cell, coords, energies, forces       eV, eV/Å, virials eV
             (virials)
rMD17        nuclear_charges, coords, energies, forces             kcal/mol, kcal/mol/Å
MD17, MD22   z, R, E, F                                            kcal/mol, kcal/mol/Å
===========  ====================================================  =====================
"""

from __future__ import annotations

import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from ase import units

from ase_gffmerge.data.arrays import FrameArrays, checked_arrays
from ase_gffmerge.errors import FileFormatError

KCAL_PER_MOL = units.kcal / units.mol


@dataclass(frozen=True)
class NpzForm:
    """How one family of archives names its arrays, and the eV per unit of its energies."""

    name: str
    keys: dict[str, str]
    optional: dict[str, str]
    energy_unit: float


_CHARGES = {"numbers": "nuclear_charges", "positions": "coords", "energies": "energies", "forces": "forces"}
FORMS = (
    NpzForm("LiPS20", {**_CHARGES, "cells": "cell"}, {"virials": "virials"}, 1.0),
    NpzForm("rMD17", _CHARGES, {}, KCAL_PER_MOL),
    NpzForm("MD17", {"numbers": "z", "positions": "R", "energies": "E", "forces": "F"}, {}, KCAL_PER_MOL),
)


def read_npz(path: Path) -> FrameArrays:
    """Read an archive of one of the forms above; pickled objects are refused.

    Parameters
    ----------
    path
        The archive.

    Returns
    -------
    FrameArrays
        In eV and Å.

    Raises
    ------
    FileFormatError
        If the archive is truncated or not an archive, or keys are missing.
    FramesError
        If it holds no frames or values that are not finite.
    """
    try:
        with path.open("rb") as file:  # opened here: np.load leaves damaged archives open
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise FileFormatError(f"{path} is a single array, not an .npz archive of frames")
            form = _form(path, archive.files)
            wanted = form.keys | {k: v for k, v in form.optional.items() if v in archive.files}
            raw = {attribute: archive[key] for attribute, key in wanted.items()}
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError) as error:
        raise FileFormatError(
            f"{path} is truncated, damaged, or not a plain .npz archive ({error}); get the file again"
        ) from error
    return checked_arrays(path, raw, energy_unit=form.energy_unit)


def _form(path: Path, present: list[str]) -> NpzForm:
    """Choose the first form whose keys are all present, else say what is missing from the nearest one."""
    for form in FORMS:
        if set(form.keys.values()) <= set(present):
            return form
    nearest = max(FORMS[::-1], key=lambda form: len(set(form.keys.values()) & set(present)))
    missing = [key for key in nearest.keys.values() if key not in present]
    raise FileFormatError(
        f"{path} lacks {', '.join(missing)} (it has: {', '.join(present) or 'nothing'}); frames need "
        + " or ".join(f"{', '.join(form.keys.values())} ({form.name})" for form in FORMS)
    )
