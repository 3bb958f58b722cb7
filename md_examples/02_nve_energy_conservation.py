"""Energy conservation: forces are the exact gradient of one energy, so NVE dynamics keeps the total energy.

Two checks: no drift over a picosecond, and a fluctuation that falls with the square of the time step, as
velocity Verlet promises for any smooth potential.
"""

import numpy as np
from ase import Atoms, units
from ase.md import VelocityVerlet

from ase_gffmerge import GFFMergeCalculator
from ase_gffmerge.dynamics.integrators import new_momenta
from ase_gffmerge.forcefield.force_field import bundled_test_frames

TEMPERATURE = 300


def total_energies(start: Atoms, calc: GFFMergeCalculator, *, timestep: float, steps: int) -> np.ndarray:
    """Total energy (eV) after every step of ``timestep`` fs, from the positions and momenta of ``start``."""
    atoms = start.copy()
    atoms.calc = calc
    dynamics = VelocityVerlet(atoms, timestep * units.fs)
    return np.array([atoms.get_total_energy() for _ in dynamics.irun(steps)])


def main() -> None:
    """Run ethanol at 300 K."""
    calc = GFFMergeCalculator(["rmd17-ethanol", "rmd17-malonaldehyde"], dtype="float64")
    start = bundled_test_frames("rmd17-ethanol")[0]
    new_momenta(start, TEMPERATURE, rng=np.random.default_rng(0))

    energies = total_energies(start, calc, timestep=0.5, steps=2000)
    times = 0.0005 * np.arange(len(energies))
    drift = np.polyfit(times, energies, 1)[0] / len(start)
    print(f"1 ps of NVE: drift {1e6 * drift:+.1f} µeV/atom/ps, fluctuation {1e3 * energies.std():.2f} meV")
    assert abs(drift) < 1e-3

    coarse, fine = (
        total_energies(start, calc, timestep=dt, steps=round(100 / dt)).std() for dt in (0.5, 0.25)
    )
    print(f"half the time step: fluctuation smaller by a factor of {coarse / fine:.2f} (4 in theory)")
    assert 3.5 < coarse / fine < 4.5


if __name__ == "__main__":
    main()
