"""What a run of molecular dynamics did."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from ase_gffmerge.dynamics.energies import energy_slope


@dataclass(frozen=True)
class Sample:
    """One moment of a run.

    Attributes
    ----------
    step
        Steps done.
    time
        fs.
    total_energy, potential_energy
        eV.
    temperature
        K.
    """

    step: int
    time: float
    total_energy: float
    potential_energy: float
    temperature: float


@dataclass(frozen=True, kw_only=True)
class MDResult:
    """What a run of molecular dynamics did.

    Attributes
    ----------
    ensemble, steps, timestep
        As asked for; time step in fs.
    n_atoms
        Number of atoms.
    seconds
        Wall time of the integration, writing included.
    times, total_energies, temperatures : (n_samples,)
        fs, eV, K; the first sample is the start. Temperatures count only degrees of freedom that can move.
    potential_energy
        Of the last structure, eV.
    broken_bonds
        Bonds of the initial structure found longer than 1.5 times their initial length in any sample.
    """

    ensemble: str
    steps: int
    timestep: float
    n_atoms: int
    seconds: float
    times: np.ndarray
    total_energies: np.ndarray
    temperatures: np.ndarray
    potential_energy: float
    broken_bonds: tuple[tuple[int, int], ...]

    @property
    def steps_per_second(self) -> float:
        """Integration steps per second of wall time."""
        return self.steps / max(self.seconds, 1e-9)

    @property
    def mean_temperature(self) -> float:
        """Mean over all samples but the start, K."""
        return float(self.temperatures[1:].mean())

    @property
    def drift_per_atom(self) -> float:
        """Final minus initial total energy, eV/atom; a measure of quality for ``nve`` alone."""
        return float(self.total_energies[-1] - self.total_energies[0]) / self.n_atoms

    @property
    def drift_slope_per_atom(self) -> float:
        """Slope of the straight line fitted to the total energy, eV/atom/ps."""
        return energy_slope(self.times / 1000, self.total_energies, n_atoms=self.n_atoms)

    def to_dict(self) -> dict[str, Any]:
        """Summary for JSON: plain numbers, no time series; drift for ``nve`` alone."""
        summary: dict[str, Any] = {
            "ensemble": self.ensemble,
            "n_atoms": self.n_atoms,
            "steps": self.steps,
            "timestep": self.timestep,
            "steps_per_second": self.steps_per_second,
            "temperature_mean": self.mean_temperature,
            "potential_energy": self.potential_energy,
            "total_energy": float(self.total_energies[-1]),
            "broken_bonds": [list(pair) for pair in self.broken_bonds],
        }
        if self.ensemble == "nve":
            summary |= {
                "drift_per_atom": self.drift_per_atom,
                "drift_slope_per_atom": self.drift_slope_per_atom,
            }
        return summary
