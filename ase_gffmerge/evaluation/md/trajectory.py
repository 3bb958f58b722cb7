"""Trajectories of replicas as arrays, in memory and on disk."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from io import BytesIO
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from ase import Atoms

from ase_gffmerge.dynamics.batched_md import ReplicaRun
from ase_gffmerge.dynamics.energies import kinetic_energies
from ase_gffmerge.storage.atomic import atomic_write


@dataclass(frozen=True, kw_only=True)
class MDTrajectory:
    """One run of one replica with a fixed cell.

    Attributes
    ----------
    numbers, masses : (n_atoms,)
        Atomic numbers and masses in u.
    cell : (3, 3)
        Å.
    pbc : (3,)
        Periodic directions.
    positions, velocities : (n_frames, n_atoms, 3)
        Å (unwrapped) and ASE's unit of velocity.
    times : (n_frames,)
        ps.
    total_energies, temperatures : (n_frames,)
        eV, K.
    stopped
        Why the run ended early; empty for one that did not.
    stable_time
        ps to that moment, or the length of the whole run.
    """

    numbers: np.ndarray
    masses: np.ndarray
    cell: np.ndarray
    pbc: np.ndarray
    positions: np.ndarray
    velocities: np.ndarray
    times: np.ndarray
    total_energies: np.ndarray
    temperatures: np.ndarray
    stopped: str
    stable_time: float

    @classmethod
    def of(cls, run: ReplicaRun, start: Atoms, *, length: float) -> "MDTrajectory":
        """Arrays of a run that began at ``start`` and was to last ``length`` ps."""
        shape = (len(run.frames), len(start), 3)
        stopped_at = length if run.stopped_at_fs is None else run.stopped_at_fs / 1000
        return cls(
            numbers=start.numbers,
            masses=start.get_masses(),
            cell=start.cell.array,
            pbc=start.pbc,
            positions=np.array([atoms.positions for atoms in run.frames]).reshape(shape),
            velocities=np.array([atoms.get_velocities() for atoms in run.frames]).reshape(shape),
            times=run.times_fs / 1000,
            total_energies=run.total_energies,
            temperatures=run.temperatures,
            stopped=f"{run.stopped}: {run.detail}" if run.stopped else "",
            stable_time=stopped_at,
        )

    @property
    def held(self) -> bool:
        """Whether the run reached its end."""
        return not self.stopped

    @property
    def potential_energies(self) -> np.ndarray:
        """Total minus kinetic energy (n_frames,) in eV."""
        return self.total_energies - kinetic_energies(self.velocities, self.masses)

    def after(self, time: float) -> np.ndarray:
        """Positions (n, n_atoms, 3) of the frames from ``time`` (ps) on."""
        return self.positions[self.times >= time]

    def structure(self, frame: int) -> Atoms:
        """A frame without velocities."""
        return Atoms(self.numbers, self.positions[frame], masses=self.masses, cell=self.cell, pbc=self.pbc)


def save_trajectories(trajectories: Sequence[MDTrajectory], path: Path) -> None:
    """Write a batch as one compressed ``.npz`` file, atomically."""
    arrays = {
        f"{k}.{field.name}": np.asarray(getattr(trajectory, field.name))
        for k, trajectory in enumerate(trajectories)
        for field in fields(trajectory)
    }
    buffer = BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    atomic_write(path, buffer.getvalue())


def load_trajectories(path: Path) -> list[MDTrajectory] | None:
    """Read a batch back bit for bit; ``None`` when the file is missing or damaged (it is then run again)."""
    try:
        with path.open("rb") as handle, np.load(handle) as archive:
            count = 1 + max(int(name.split(".")[0]) for name in archive.files)
            return [_trajectory(archive, k) for k in range(count)]
    except (OSError, ValueError, KeyError, BadZipFile):
        return None


def _trajectory(archive: np.lib.npyio.NpzFile, k: int) -> MDTrajectory:
    values: dict[str, Any] = {field.name: archive[f"{k}.{field.name}"] for field in fields(MDTrajectory)}
    return MDTrajectory(
        **values | {"stopped": str(values["stopped"]), "stable_time": float(values["stable_time"])}
    )
