"""What molecular dynamics recorded: energies, temperatures and, where they were kept, frames."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from ase import Atoms, units
from ase.calculators.singlepoint import SinglePointCalculator


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
    """

    step: int
    time: float
    potential_energy: float
    kinetic_energy: float
    temperature: float

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
        Wall time of the integration, recording included; of the whole batch for replicas.
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
        return self.steps / max(self.seconds, 1e-9)

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
        """Summary for JSON: plain numbers, no time series; drift for ``nve`` alone."""
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
