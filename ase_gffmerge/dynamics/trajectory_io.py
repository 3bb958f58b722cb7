"""Trajectories on disk: frame by frame while they are made (.traj, .extxyz), or finished batches as arrays (.npz)."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import fields
from io import BytesIO
from pathlib import Path
from zipfile import BadZipFile

import ase.io
import numpy as np
from ase import Atoms
from ase.io.trajectory import TrajectoryWriter

from ase_gffmerge.dynamics.trajectory import Trajectory
from ase_gffmerge.errors import FileFormatError
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


@contextmanager
def frame_writer(path: str | Path | None) -> Iterator[Callable[[Atoms], None]]:
    """Give a function that appends a frame with its energy and forces; a file of that name is replaced.

    Every frame is complete on disk when the function returns, so an interrupted run leaves a readable file.

    Raises
    ------
    FileFormatError
        When the file cannot be written (any more); the frames that are in it stay readable.
    """
    if path is None:
        yield lambda atoms: None
        return
    path, n_frames = check_trajectory(path), 0

    def write(atoms: Atoms) -> None:
        nonlocal n_frames
        with _explained(path, n_frames):
            append(atoms)
        n_frames += 1

    with ExitStack() as stack:
        with _explained(path, n_frames):
            append = stack.enter_context(_traj(path) if path.suffix == ".traj" else _extxyz(path))
        yield write


@contextmanager
def _traj(path: Path) -> Iterator[Callable[[Atoms], None]]:
    trajectory = TrajectoryWriter(path)
    try:
        yield trajectory.write
    finally:
        with suppress(OSError):  # of a frame that failed before
            trajectory.close()


@contextmanager
def _extxyz(path: Path) -> Iterator[Callable[[Atoms], None]]:
    path.unlink(missing_ok=True)

    def append(atoms: Atoms) -> None:
        size = path.stat().st_size if path.exists() else 0
        try:
            ase.io.write(path, atoms, format="extxyz", append=True)
        except OSError:
            os.truncate(path, size)
            raise

    yield append


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
    plain = {name: value.item() if value.ndim == 0 else value for name, value in stored.items()}
    bonds = tuple((int(i), int(j)) for i, j in stored["broken_bonds"].reshape(-1, 2))
    return Trajectory(start=start, **plain | {"broken_bonds": bonds})
