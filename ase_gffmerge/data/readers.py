"""The one entry for frame files: :func:`read_frames` gives labelled ``ase.Atoms`` in eV and Å."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import ase.io
import numpy as np
from ase import Atoms
from ase.io.formats import UnknownFileTypeError, string2index

from ase_gffmerge.data.deepmd import is_deepmd, read_deepmd
from ase_gffmerge.data.npz import read_npz
from ase_gffmerge.errors import FileFormatError, FramesError


def read_frames(path: str | Path, *, index: str | int | slice = ":") -> list[Atoms]:
    """Read frames with their labels.

    Parameters
    ----------
    path
        An ``.npz`` archive (:mod:`ase_gffmerge.data.npz`), a DeePMD-kit folder
        (:mod:`ase_gffmerge.data.deepmd`), or any file that :func:`ase.io.read` knows (extxyz, traj, cif,
        ...), whose labels must be in ASE's units.
    index
        Which frames, as in ASE: ``":"``, ``"::10"``, ``-1``, a slice. A single number gives one frame.

    Returns
    -------
    list of ase.Atoms
        Each with a `SinglePointCalculator` that holds what the file has of energy (eV), forces (eV/Å) and
        stress (Voigt, eV/Å³, positive under tension). Cells and periodicity are kept.

    Raises
    ------
    FileFormatError
        If the file is truncated, damaged, of an unknown kind, or lacks keys.
    FramesError
        If the file is missing or empty, holds no such frames, or values that are not finite.
    """
    return list(iter_frames(path, index=index))


def iter_frames(path: str | Path, *, index: str | int | slice = ":") -> Iterator[Atoms]:
    """Like :func:`read_frames`, one frame after the other, for files larger than memory allows as a list."""
    path, index = Path(path), _index(index)
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
    if path.is_dir() or path.suffix.lower() == ".npz":
        arrays = read_deepmd(path) if path.is_dir() else read_npz(path)
        chosen = range(len(arrays))[index] if isinstance(index, slice) else _one(path, len(arrays), index)
        source = arrays.frames(chosen)
    else:
        source = _ase_frames(path, index)
    n = -1
    for n, atoms in enumerate(source):
        _check_finite(path, n, atoms)
        yield atoms
    if n < 0:
        raise FramesError(f"{path} holds no frames at index {index}; choose others or get the file again")


def require_labels(
    frames: Sequence[Atoms], source: str | Path, properties: Sequence[str] = ("energy", "forces")
) -> None:
    """Check that every frame carries the labels that a step needs.

    Parameters
    ----------
    frames
        Frames, for example from :func:`read_frames`.
    source
        Where they are from, for the message.
    properties
        Names of ASE properties: ``energy``, ``forces``, ``stress``.

    Raises
    ------
    FramesError
        If there are no frames, or some lack a label; says which and what.
    """
    if not frames:
        raise FramesError(f"{source}: there are no frames")
    for name in properties:
        lacking = [i for i, atoms in enumerate(frames) if not _has_label(atoms, name)]
        if lacking:
            shown = ", ".join(map(str, lacking[:5])) + (", ..." if len(lacking) > 5 else "")
            raise FramesError(
                f"{source}: {len(lacking)} of {len(frames)} frames lack {name} (frames {shown}); "
                f"compute the labels, or rename them to ASE's name {name!r}"
            )


def _has_label(atoms: Atoms, name: str) -> bool:
    return atoms.calc is not None and getattr(atoms.calc, "results", {}).get(name) is not None


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
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield from ase.io.iread(path, index=index, do_not_split_by_at_sign=True)
    except UnknownFileTypeError:
        raise FileFormatError(
            f"{path}: ASE does not know the file type {path.suffix!r}; use extxyz, traj, npz, ..."
        ) from None
    except Exception as error:  # ASE's readers raise anything from KeyError to StopIteration on damaged files
        raise FileFormatError(
            f"{path} cannot be read ({type(error).__name__}: {error}); get the file again"
        ) from error


def _check_finite(path: Path, n: int, atoms: Atoms) -> None:
    results = getattr(atoms.calc, "results", {}) if atoms.calc is not None else {}
    values = {"positions": atoms.positions, "cell": atoms.cell.array} | {
        name: results[name] for name in ("energy", "forces", "stress") if results.get(name) is not None
    }
    for name, value in values.items():
        if not np.all(np.isfinite(value)):
            raise FramesError(f"{path}: {name} of frame {n} is not finite; remove this frame")
