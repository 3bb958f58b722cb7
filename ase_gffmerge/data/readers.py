"""The one entry for frame files: :func:`read_frames` gives labelled ``ase.Atoms`` in eV and Å."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import ase.io
import numpy as np
from ase import Atoms
from ase.io.formats import UnknownFileTypeError
from ase.utils import string2index

from ase_gffmerge.data.formats import is_deepmd, read_deepmd, read_npz
from ase_gffmerge.data.labels import AUTO, normalize_labels
from ase_gffmerge.errors import FileFormatError, FramesError, LabelWarning


def read_frames(
    path: str | Path,
    *,
    index: str | int | slice = ":",
    energy_key: str | None = None,
    forces_key: str | None = None,
    stress_key: str | None = None,
) -> list[Atoms]:
    """Read frames with their labels.

    Parameters
    ----------
    path
        An ``.npz`` archive (:mod:`ase_gffmerge.data.formats`), a DeePMD-kit folder
        (:mod:`ase_gffmerge.data.formats`), or any file that :func:`ase.io.read` knows (extxyz, traj, cif,
        ...), whose labels must be in ASE's units.
    index
        Which frames, as in ASE: ``":"``, ``"::10"``, ``-1``, a slice. A single number gives one frame.
    energy_key, forces_key, stress_key
        Names under which other programs wrote the labels, for example ``REF_energy``, or ``auto``; a key with
        "virial" in its name holds virials. Default: ASE's names, for stresses also ``virial`` and ``virials``.

    Returns
    -------
    list of ase.Atoms
        Each with a calculator whose ``results`` hold what the file has of energy (eV), forces (eV/Å) and
        stress (Voigt, eV/Å³, positive under tension), without the bias of constraints. Cells and periodicity
        are kept.

    Raises
    ------
    FileFormatError
        If the file is truncated, damaged, of an unknown kind, or lacks keys.
    FramesError
        If the file is missing or empty, holds no such frames, frames without atoms, or labels that are no finite
        numbers or of wrong shapes.
    """
    keys = {"energy": energy_key, "forces": forces_key, "stress": stress_key}
    return list(iter_frames(path, index=index, keys=keys))


def iter_frames(
    path: str | Path, *, index: str | int | slice = ":", keys: Mapping[str, str | None] | None = None
) -> Iterator[Atoms]:
    """Like :func:`read_frames`, one frame after the other, for files larger than memory allows as a list.

    Parameters
    ----------
    path, index
        As for :func:`read_frames`.
    keys
        Key by label, see :func:`~ase_gffmerge.data.labels.normalize_labels`.
    """
    path, index, keys = Path(path), _index(index), keys or {}
    notes: set[str] = set()
    found: set[str] = set()
    n, atoms = -1, None
    for n, atoms in enumerate(_source(path, index)):
        where = f"{path}, frame {_number(n, index)}"
        _check_geometry(atoms, where)
        found |= normalize_labels(atoms, where, keys=keys, note=lambda text: _say_once(notes, path, text))
        yield atoms
    if atoms is None:
        raise FramesError(f"{path} holds no frames at index {index}; choose others or get the file again")
    for name, key in keys.items():
        if key not in (None, AUTO) and name not in found:
            there = ", ".join(map(str, (*atoms.info, *atoms.arrays, *getattr(atoms.calc, "results", ()))))
            raise FramesError(f"{path}: no frame has the key {key!r} for {name}; the keys there are {there}")


def _source(path: Path, index: int | slice) -> Iterator[Atoms]:
    """Frames as they are in the file."""
    if not path.exists():
        raise FramesError(
            f"no frames: {path} does not exist; check the path, or fetch it with 'gffmerge data fetch'"
        )
    if path.is_dir() and not is_deepmd(path):
        raise FileFormatError(
            f"{path} is a folder without type.raw, so not of DeePMD's layout; give a frame file"
        )
    if path.is_file() and path.stat().st_size == 0:
        raise FramesError(f"{path} is empty; get the file again")
    if path.is_file() and path.suffix.lower() != ".npz":
        return _ase_frames(path, index)
    arrays = read_deepmd(path) if path.is_dir() else read_npz(path)
    chosen = range(len(arrays))[index] if isinstance(index, slice) else _one(path, len(arrays), index)
    return arrays.frames(chosen)


def _say_once(notes: set[str], path: Path, text: str) -> None:
    if text not in notes:
        notes.add(text)
        warnings.warn(f"{path}: {text}", LabelWarning, stacklevel=4)


def _number(n: int, index: int | slice) -> int:
    """Number in the file of the n-th frame that was read, as far as the index says."""
    if isinstance(index, int):
        return index
    start = index.start or 0
    return start + n * (index.step or 1) if start >= 0 and (index.step or 1) > 0 else n


def _index(index: str | int | slice) -> int | slice:
    try:
        parsed = string2index(index) if isinstance(index, str) else index
        return parsed if isinstance(parsed, slice) else int(parsed)
    except ValueError:
        raise FramesError(f"the index {index!r} is not of the form '0', ':', '::10' or '5:20'") from None


def _one(path: Path, n: int, index: int) -> list[int]:
    if not -n <= index < n:
        raise FramesError(f"{path} has {n} frames, so none at index {index}")
    return [index]


def _ase_frames(path: Path, index: int | slice) -> Iterator[Atoms]:
    """Frames through ASE; whatever its readers raise becomes one clear error."""
    n = 0
    try:
        frames = ase.io.iread(path, index=index, do_not_split_by_at_sign=True)
        while (atoms := _quietly_next(frames)) is not None:
            yield atoms
            n += 1
    except UnknownFileTypeError:
        raise FileFormatError(
            f"{path}: ASE does not know the file type {path.suffix!r}; use extxyz, traj, npz, ..."
        ) from None
    except Exception as error:  # ASE's readers raise anything from KeyError to StopIteration on damaged files
        raise FileFormatError(
            f"{path} cannot be read at frame {_number(n, index)} ({type(error).__name__}: {error}); get the file again"
        ) from error


def _quietly_next(frames: Iterator[Atoms]) -> Atoms | None:
    """The next frame without the warnings of ASE's readers; ``None`` at the end."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return next(frames, None)


def _check_geometry(atoms: Atoms, where: str) -> None:
    if len(atoms) == 0:
        raise FramesError(f"{where} has no atoms; remove this frame")
    for name, value in {"positions": atoms.positions, "cell": atoms.cell.array}.items():
        if not np.all(np.isfinite(value)):
            raise FramesError(f"{where}: {name} are not finite; remove this frame")
