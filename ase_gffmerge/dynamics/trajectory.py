"""What molecular dynamics recorded, in memory and on disk: energies, temperatures, frames.

Trajectories on disk: frame by frame while they are made (.traj, .extxyz), or finished batches as arrays (.npz).
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, fields
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import ase.io
import numpy as np
from ase import Atoms, units
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io.trajectory import TrajectoryWriter

from ase_gffmerge.errors import FileFormatError, first_line
from ase_gffmerge.storage.tensor_file import atomic_write, require_writable


@dataclass(frozen=True)
class Sample:
    """One moment of a run.

    Attributes
    ----------
    step
        Steps done.
    time
        fs.
    potential_energy, kinetic_energy
        eV.
    temperature
        K.
    volume, pressure
        Å³ and GPa (the ideal gas of the momenta included) under a barostat; 0 without one.
    """

    step: int
    time: float
    potential_energy: float
    kinetic_energy: float
    temperature: float
    volume: float = 0.0
    pressure: float = 0.0

    @property
    def total_energy(self) -> float:
        """Potential plus kinetic energy in eV."""
        return self.potential_energy + self.kinetic_energy


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """Recorded molecular dynamics of one structure, in ASE's units but for times in fs.

    Attributes
    ----------
    start
        The structure at the beginning: species, masses, cell and whatever else every frame has.
    ensemble, timestep, steps, target_temperature
        As asked for; fs, K.
    times, potential_energies, kinetic_energies, temperatures : (n_frames,)
        fs, eV, eV, K; the first is the start. Temperatures count only degrees of freedom that can move.
    volumes, pressures : (n_frames,), optional
        Å³, GPa; of ``npt`` alone.
    positions, momenta, forces : (n_frames, n_atoms, 3)
        Positions not wrapped into the cell; of no frames (0, n_atoms, 3) where these went to a file instead.
    stopped
        ``None`` for a run that reached its end; else ``bond broken``, ``atoms too close``, ``too hot``,
        ``extrapolation`` or ``not finite``. The structure that was the reason is not among the frames.
    detail
        Which atoms or what value that was.
    stopped_at
        When, fs.
    broken_bonds
        Bonds of the first structure that were longer than 1.5 times their initial length in a frame of a run that did
        not stop for them.
    seconds
        Wall time of the integration, recording and what was before a restart included; of the whole batch for replicas.
    """

    start: Atoms
    ensemble: str
    timestep: float
    steps: int
    target_temperature: float
    times: np.ndarray
    potential_energies: np.ndarray
    kinetic_energies: np.ndarray
    temperatures: np.ndarray
    positions: np.ndarray
    momenta: np.ndarray
    forces: np.ndarray
    volumes: np.ndarray | None = None
    pressures: np.ndarray | None = None
    stopped: str | None = None
    detail: str = ""
    stopped_at: float | None = None
    broken_bonds: tuple[tuple[int, int], ...] = ()
    seconds: float = 0.0

    @property
    def n_atoms(self) -> int:
        """Number of atoms."""
        return len(self.start)

    @cached_property
    def frames(self) -> tuple[Atoms, ...]:
        """Structures with momenta, potential energy (eV) and forces (eV/Å)."""
        return tuple(self._frame(k) for k in range(len(self.positions)))

    def _frame(self, k: int) -> Atoms:
        atoms = self.start.copy()
        atoms.positions = self.positions[k]
        atoms.set_momenta(self.momenta[k])
        energy, forces = float(self.potential_energies[k]), self.forces[k].copy()
        atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=forces)
        return atoms

    @property
    def velocities(self) -> np.ndarray:
        """Velocities (n_frames, n_atoms, 3) in ASE's unit."""
        return self.momenta / self.start.get_masses()[:, None]

    @property
    def total_energies(self) -> np.ndarray:
        """Potential plus kinetic energy (n_frames,) in eV."""
        return self.potential_energies + self.kinetic_energies

    @property
    def complete(self) -> bool:
        """Whether the run reached its end."""
        return self.stopped is None

    @property
    def duration(self) -> float:
        """Time in fs until the run stopped; its full length when it did not."""
        return self.steps * self.timestep if self.stopped_at is None else self.stopped_at

    @property
    def steps_per_second(self) -> float:
        """Integration steps per second of wall time."""
        return self.duration / self.timestep / max(self.seconds, 1e-9)

    @property
    def mean_temperature(self) -> float:
        """Mean over all frames but the start, K."""
        return float(self.temperatures[1:].mean())

    @property
    def drift_per_atom(self) -> float:
        """Final minus initial total energy, eV/atom; a measure of quality for ``nve`` alone."""
        return float(self.total_energies[-1] - self.total_energies[0]) / self.n_atoms

    @property
    def drift_slope_per_atom(self) -> float:
        """Slope of the straight line fitted to the total energy, eV/atom/ps."""
        return energy_slope(self.times / 1000, self.total_energies, n_atoms=self.n_atoms)

    def after(self, time: float) -> np.ndarray:
        """Positions (n, n_atoms, 3) of the frames from ``time`` (fs) on."""
        return self.positions[self.times >= time]

    def to_dict(self) -> dict[str, object]:
        """Summary for JSON: plain numbers, no time series; drift for ``nve``, volume and pressure for ``npt`` alone."""
        summary: dict[str, object] = {
            "ensemble": self.ensemble,
            "n_atoms": self.n_atoms,
            "steps": self.steps,
            "timestep": self.timestep,
            "steps_per_second": self.steps_per_second,
            "temperature_mean": self.mean_temperature,
            "potential_energy": float(self.potential_energies[-1]),
            "total_energy": float(self.total_energies[-1]),
            "broken_bonds": [list(pair) for pair in self.broken_bonds],
            "stopped": self.stopped,
        }
        if self.volumes is not None and self.pressures is not None:
            summary |= {
                "volume_mean": float(self.volumes[1:].mean()),
                "pressure_mean": float(self.pressures[1:].mean()),
            }
        if self.ensemble == "nve":
            summary |= {
                "drift_per_atom": self.drift_per_atom,
                "drift_slope_per_atom": self.drift_slope_per_atom,
            }
        return summary


def energy_slope(times: np.ndarray, energies: np.ndarray, *, n_atoms: int) -> float:
    """Slope of the straight line through total energies, in eV/atom/ps: whether energy is conserved.

    Parameters
    ----------
    times : (n_frames,)
        ps.
    energies : (n_frames,)
        eV.
    n_atoms
        Number of atoms.
    """
    return float(np.polyfit(times, energies, 1)[0]) / n_atoms


def harmonic_temperature(
    temperature: float, difference: float, *, n_atoms: int, periodic: bool = False
) -> float:
    r"""Temperature (K) of frames whose mean potential energy is known relative to those at ``temperature``.

    By equipartition every harmonic mode holds :math:`k_B T/2` of potential energy:

    .. math:: T' = T + \frac{2\,\Delta U}{f\,k_B},\qquad f = 3n - 6 \text{ (molecules) or } 3n - 3 .

    Parameters
    ----------
    temperature
        K.
    difference
        :math:`\Delta U`, mean potential energy of the frames minus that at ``temperature``, eV.
    n_atoms
        At least 3.
    periodic
        Whether the structure is a crystal.
    """
    modes = 3 * n_atoms - (3 if periodic else 6)
    return temperature + 2 * difference / (modes * units.kB)


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
