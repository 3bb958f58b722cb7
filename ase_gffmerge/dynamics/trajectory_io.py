"""Trajectories on disk: frame by frame while they are made (.traj, .extxyz), or finished batches as arrays (.npz)."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import fields
from io import BytesIO
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import ase.io
import numpy as np
from ase import Atoms
from ase.io.trajectory import TrajectoryWriter

from ase_gffmerge.dynamics.trajectory import Trajectory
from ase_gffmerge.errors import FileFormatError, first_line
from ase_gffmerge.storage.atomic import atomic_write, require_writable

SUFFIXES = (".traj", ".xyz", ".extxyz")
STORED = tuple(field.name for field in fields(Trajectory) if field.name != "start")


def check_trajectory(path: str | Path) -> Path:
    """Raise :class:`FileFormatError` when ``path`` has another suffix than these, or cannot be written."""
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise FileFormatError(
            f"cannot write a trajectory to {path}: its name must end in {', '.join(SUFFIXES)}"
        )
    require_writable(path)
    return path


class FrameWriter:
    """Appends frames with their energies and forces to a file; every one is complete on disk when the call returns."""

    def __init__(self, path: Path | None, write: Callable[[Atoms], None], n_frames: int):
        self._path, self._write, self.n_frames = path, write, n_frames

    def __call__(self, atoms: Atoms) -> None:
        """Append a frame."""
        if self._path is None:
            return
        with _explained(self._path, self.n_frames):
            self._write(atoms)
        self.n_frames += 1


@contextmanager
def frame_writer(
    path: str | Path | None, *, append: bool = False, keep: int | None = None
) -> Iterator[FrameWriter]:
    """Open a trajectory for writing; an interrupted run leaves a readable file.

    Parameters
    ----------
    path
        ``.traj``, ``.xyz`` or ``.extxyz`` file; ``None`` writes nothing.
    append
        Keep what is there; otherwise the file is replaced.
    keep
        Keep the first so many frames of what is there, and take off the rest.

    Raises
    ------
    FileFormatError
        When the file cannot be written (any more), or holds fewer frames than are to be kept; the frames that are in it
        stay readable.
    """
    if path is None:
        yield FrameWriter(None, lambda atoms: None, 0)
        return
    path = check_trajectory(path)
    n_frames = 0
    if keep is not None:
        n_frames = _keep_first(path, keep)
    elif append and path.exists():
        n_frames = len(_frames(path))
    with ExitStack() as stack:
        with _explained(path, n_frames):
            opened = (
                _traj(path, append=n_frames > 0)
                if path.suffix == ".traj"
                else _extxyz(path, append=n_frames > 0)
            )
            writer = FrameWriter(path, stack.enter_context(opened), n_frames)
        yield writer


def _frames(path: Path) -> list[Atoms]:
    try:
        return list(ase.io.iread(path, index=":"))
    except Exception as error:  # whatever a damaged file makes ASE say
        raise FileFormatError(f"{path} cannot be read and so not be continued: {first_line(error)}") from None


def _keep_first(path: Path, keep: int) -> int:
    """Take off the frames after the first ``keep``; gives their number."""
    frames = _frames(path) if path.exists() else []
    if len(frames) < keep:
        raise FileFormatError(
            f"{path} holds {len(frames)} frames, fewer than the {keep} that the restart file knows of; put the whole "
            "trajectory back, or begin a new run"
        )
    if len(frames) > keep:
        shortened = path.with_name(f".{path.name}.tmp{path.suffix}")
        ase.io.write(shortened, frames[:keep])
        shortened.replace(path)
    return keep


@contextmanager
def _traj(path: Path, *, append: bool) -> Iterator[Callable[[Atoms], None]]:
    trajectory = TrajectoryWriter(path, mode="a" if append else "w")
    try:
        yield trajectory.write
    finally:
        with suppress(OSError):  # of a frame that failed before
            trajectory.close()


@contextmanager
def _extxyz(path: Path, *, append: bool) -> Iterator[Callable[[Atoms], None]]:
    if not append:
        path.unlink(missing_ok=True)

    def write(atoms: Atoms) -> None:
        size = path.stat().st_size if path.exists() else 0
        try:
            ase.io.write(path, atoms, format="extxyz", append=True)
        except OSError:
            os.truncate(path, size)
            raise

    yield write


@contextmanager
def _explained(path: Path, n_frames: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise FileFormatError(
            f"cannot write frame {n_frames} to {path}: {error.strerror or error}; the {n_frames} frames before it are "
            "complete: free some space and go on from the last of them"
        ) from None


def save_trajectories(trajectories: Sequence[Trajectory], path: Path) -> None:
    """Write a batch, but for its starting structures, as one compressed ``.npz`` file, atomically."""
    arrays = {
        f"{k}.{name}": np.asarray(value)
        for k, trajectory in enumerate(trajectories)
        for name in STORED
        if (value := getattr(trajectory, name)) is not None
    }
    buffer = BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    atomic_write(path, buffer.getvalue())


def load_trajectories(path: Path, starts: Sequence[Atoms]) -> list[Trajectory] | None:
    """Read the batch that began at ``starts`` back bit for bit; ``None`` when the file is missing or damaged."""
    try:
        with path.open("rb") as handle, np.load(handle) as archive:
            return [_trajectory(archive, k, start) for k, start in enumerate(starts)]
    except (OSError, ValueError, KeyError, BadZipFile):
        return None


def _trajectory(archive: np.lib.npyio.NpzFile, k: int, start: Atoms) -> Trajectory:
    stored = {name: archive[f"{k}.{name}"] for name in STORED if f"{k}.{name}" in archive}
    plain: dict[str, Any] = {
        name: value.item() if value.ndim == 0 else value for name, value in stored.items()
    }
    bonds = tuple((int(i), int(j)) for i, j in stored["broken_bonds"].reshape(-1, 2))
    return Trajectory(start=start, **plain | {"broken_bonds": bonds})
