"""What is run to judge a potential by its dynamics."""

import math
from dataclasses import dataclass

from ase_gffmerge.dynamics.batched_md import Ensemble
from ase_gffmerge.errors import DynamicsError

RECORD_FS = {"nvt": 10.0, "nve": 2.0}
"""Time between frames: 2 fs resolves every vibration up to 8000 cm⁻¹."""


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """Langevin dynamics of several seeds, then velocity Verlet for half that time.

    Attributes
    ----------
    temperature
        Of the thermostat and of all initial velocities, K.
    picoseconds
        Length of the NVT runs; those of constant energy are half as long.
    timestep
        fs.
    seeds
        Number of independent runs.
    friction
        Langevin friction in 1/fs; it slows diffusion down, and widens lines (these come from NVE runs).
    equilibration
        Fraction of an NVT run left out of averages.
    correlation_time
        Longest lag of the velocity autocorrelation, fs (at most half an NVE run).
    """

    temperature: float = 500.0
    picoseconds: float = 10.0
    timestep: float = 0.5
    seeds: int = 3
    friction: float = 0.01
    equilibration: float = 0.2
    correlation_time: float = 1000.0

    def __post_init__(self) -> None:
        """Refuse what cannot be run."""
        if self.seeds < 1:
            raise DynamicsError(f"{self.seeds} seeds: nothing would be run; give at least 1")
        if not all(0 < value < math.inf for value in (self.timestep, self.temperature, self.picoseconds)):
            raise DynamicsError(
                f"a time step of {self.timestep:g} fs, a temperature of {self.temperature:g} K or a time of "
                f"{self.picoseconds:g} ps is impossible; all must be positive and finite"
            )
        if self.steps("nve") < 10 * self.every("nve"):
            raise DynamicsError(
                f"{self.picoseconds:g} ps are too short to measure anything; give at least "
                f"{0.02 * self.every('nve') * self.timestep:g} ps"
            )

    def steps(self, ensemble: Ensemble) -> int:
        """Number of steps of a run."""
        length = self.picoseconds * (1.0 if ensemble == "nvt" else 0.5)
        return max(round(1000 * length / self.timestep), 1)

    def every(self, ensemble: Ensemble) -> int:
        """Steps between frames."""
        return max(int(RECORD_FS[ensemble] / self.timestep), 1)

    def length(self, ensemble: Ensemble) -> float:
        """Length of a run in ps."""
        return self.steps(ensemble) * self.timestep / 1000
