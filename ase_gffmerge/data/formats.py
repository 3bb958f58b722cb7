"""Frames in formats that ASE does not read: NumPy archives (rMD17, MD17/MD22, LiPS20) and DeePMD folders.

The form, and with it the units, follows from the keys:

===========  ====================================================  =====================
form         keys needed (optional)                                units
===========  ====================================================  =====================
LiPS20       nuclear_charges, cell, coords, energies, forces       eV, eV/Å, virials eV
             (virials)
rMD17        nuclear_charges, coords, energies, forces             kcal/mol, kcal/mol/Å
MD17, MD22   z, R, E, F                                            kcal/mol, kcal/mol/Å
===========  ====================================================  =====================

DeePMD-kit system folders: ``type.raw``, ``type_map.raw`` and arrays per set (Å, eV, eV/Å; virial eV).

Frames of one system as arrays: checked, then turned into labelled ``ase.Atoms`` one by one.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from ase import Atoms, units
from ase.calculators.singlepoint import SinglePointCalculator
from ase.data import atomic_numbers, chemical_symbols

from ase_gffmerge.errors import FileFormatError, FramesError

_VOIGT = ([0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1])


@dataclass(frozen=True)
class FrameArrays:
    """Frames with the same atoms, in eV and Å.

    Attributes
    ----------
    numbers : (n_atoms,) int
        Atomic numbers.
    positions : (n_frames, n_atoms, 3) float
        Å.
    energies : (n_frames,) float, optional
        Total energies, eV.
    forces : (n_frames, n_atoms, 3) float, optional
        eV/Å.
    cells : (n_frames, 3, 3) float, optional
        Rows are cell vectors, Å. None: not periodic.
    virials : (n_frames, 3, 3) float, optional
        W = -dE/dε (ε: strain), eV; see :func:`stress_from_virial`.
    """

    numbers: np.ndarray
    positions: np.ndarray
    energies: np.ndarray | None = None
    forces: np.ndarray | None = None
    cells: np.ndarray | None = None
    virials: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.positions)

    def frames(self, indices: Iterable[int]) -> Iterator[Atoms]:
        """Yield the frames at `indices` with their labels attached."""
        for i in indices:
            cell = None if self.cells is None else self.cells[i]
            atoms = Atoms(
                self.numbers, np.array(self.positions[i], dtype=float), cell=cell, pbc=cell is not None
            )
            atoms.calc = SinglePointCalculator(atoms, **self._labels(i))
            yield atoms

    def _labels(self, i: int) -> dict[str, object]:
        labels: dict[str, object] = {}
        if self.energies is not None:
            labels["energy"] = float(self.energies[i])
        if self.forces is not None:
            labels["forces"] = np.array(self.forces[i], dtype=float)
        if self.virials is not None and self.cells is not None:
            labels["stress"] = stress_from_virial(self.virials[i], self.cells[i])
        return labels


def stress_from_virial(virial: np.ndarray, cell: np.ndarray) -> np.ndarray:
    r"""Stress of a frame from its virial, :math:`\sigma = -W/V`, positive under tension as in ASE.

    DeePMD-kit stores the virial :math:`W = -\partial E/\partial\varepsilon` in eV, positive in a compressed
    crystal. Its own ASE calculator uses ``stress = -virial / volume`` (deepmodeling/deepmd-kit, pull request
    338) and dpdata writes ``virial = -volume * stress`` from ASE's stress. The LiPS20 labels were checked
    against this: a pair potential with a flexible radial function for each pair of elements was fitted to the
    *forces* of 40 frames of beta-Li3PS4 and of Li7P3S11, and its own :math:`-\partial E/\partial\varepsilon`
    compared with the virial labels. Fluctuations from frame to frame correlate with 0.85-0.93 (diagonal) and
    0.87 (off diagonal), with slopes 0.94-1.08: the sign is +1, the unit eV (not eV/Å³). The mean (+2 to +4
    GPa) is positive as hot crystals in a fixed cell demand. A network trained on energies and forces
    alone (``md_examples/benchmarks/benchmark_lips20.py``) agrees better still, with correlations of 0.95-0.99 and slopes
    of 0.98-1.05. What it leaves of the labels does not follow the momenta (slopes below 0.1, where a kinetic
    part would give 1): the labels are those of the potential energy alone.

    Parameters
    ----------
    virial : (3, 3) float
        eV; symmetrised.
    cell : (3, 3) float
        Rows are cell vectors, Å.

    Returns
    -------
    (6,) float
        Stress in Voigt order xx, yy, zz, yz, xz, xy, eV/Å³.
    """
    symmetric = 0.5 * (virial + virial.T)
    return -symmetric[_VOIGT].astype(float) / abs(np.linalg.det(cell))


def checked_arrays(source: Path, raw: dict[str, np.ndarray], *, energy_unit: float = 1.0) -> FrameArrays:
    """Build :class:`FrameArrays` from raw arrays after checking them.

    Parameters
    ----------
    source
        The file or folder, for messages.
    raw
        Arrays under the attribute names of :class:`FrameArrays`; trailing axes may be flat.
    energy_unit
        eV per unit of the raw energies, forces and virials.

    Raises
    ------
    FileFormatError
        If a shape does not fit or an array is not numeric.
    FramesError
        If there are no frames, or a value is not finite or not an atomic number.
    """
    numbers = _integers(source, raw["numbers"])
    n_atoms = len(numbers)
    positions = _shaped(source, "positions", raw["positions"], (-1, n_atoms, 3))
    n = len(positions)
    if n == 0 or n_atoms == 0:
        raise FramesError(
            f"{source} holds {n} frames of {n_atoms} atoms: there is nothing to read; get the file again"
        )
    shapes = {"energies": (n,), "forces": (n, n_atoms, 3), "cells": (n, 3, 3), "virials": (n, 3, 3)}
    optional: dict[str, np.ndarray] = {}
    for name, shape in shapes.items():
        if name in raw:
            one_cell = name == "cells" and raw[name].shape == (3, 3)
            value = np.broadcast_to(raw[name], shape) if one_cell else raw[name]
            optional[name] = _shaped(source, name, value, shape)
    _check_cells(source, optional.get("cells"))
    scaled = {k: v if k == "cells" or energy_unit == 1.0 else v * energy_unit for k, v in optional.items()}
    return FrameArrays(numbers=numbers, positions=positions, **scaled)


def _integers(source: Path, numbers: np.ndarray) -> np.ndarray:
    if numbers.ndim != 1 or not np.issubdtype(numbers.dtype, np.integer):
        raise FileFormatError(
            f"{source}: atomic numbers have shape {numbers.shape} and type {numbers.dtype}, "
            "expected integers (n_atoms,)"
        )
    if numbers.size and (numbers.min() < 1 or numbers.max() >= len(chemical_symbols)):
        raise FramesError(
            f"{source}: atomic numbers {numbers.min()}..{numbers.max()} are outside the periodic table"
        )
    return numbers.astype(int)


def _shaped(source: Path, name: str, value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Check kind, shape and values; flat trailing axes are unfolded."""
    if value.dtype.kind not in "fiu":
        raise FileFormatError(
            f"{source}: {name} have type {value.dtype}, expected numbers; get the file again"
        )
    per_frame = int(np.prod(shape[1:]))
    n = shape[0] if shape[0] >= 0 else len(value) if value.ndim else -1
    if value.ndim == 0 or len(value) != n or value.size != n * per_frame or value.ndim > 3:
        want = ("n_frames" if shape[0] < 0 else n, *shape[1:])
        raise FileFormatError(
            f"{source}: {name} have shape {value.shape}, expected {want}; the file does not fit itself"
        )
    value = value.reshape(n, *shape[1:])
    bad = np.flatnonzero(~np.isfinite(value.reshape(n, per_frame)).all(axis=1))
    if bad.size:
        raise FramesError(
            f"{source}: {name} of {bad.size} of {n} frames (first: frame {bad[0]}) are not finite; "
            "remove these frames"
        )
    return value


def _check_cells(source: Path, cells: np.ndarray | None) -> None:
    if cells is not None and (flat := np.flatnonzero(np.abs(np.linalg.det(cells)) < 1e-6)).size:
        raise FramesError(
            f"{source}: the cell of frame {flat[0]} has no volume; a periodic frame needs three vectors"
        )


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
