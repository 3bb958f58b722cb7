"""Trajectories on disk, frame by frame."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import ase.io
from ase import Atoms
from ase.io.trajectory import Trajectory

from ase_gffmerge.errors import FileFormatError
from ase_gffmerge.fileformat import require_writable

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
    """
    if path is None:
        yield lambda atoms: None
        return
    path = check_trajectory(path)
    if path.suffix == ".traj":
        with Trajectory(path, "w") as trajectory:
            yield trajectory.write
    else:
        path.unlink(missing_ok=True)
        yield lambda atoms: ase.io.write(path, atoms, format="extxyz", append=True)
