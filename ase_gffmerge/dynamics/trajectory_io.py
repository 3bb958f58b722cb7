"""Trajectories on disk, frame by frame."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import ase.io
from ase import Atoms
from ase.io.trajectory import Trajectory

from ase_gffmerge.errors import FileFormatError
from ase_gffmerge.storage.atomic import require_writable

SUFFIXES = (".traj", ".xyz", ".extxyz")


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
    trajectory = Trajectory(path, "w")
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
