"""What energies along a trajectory say: whether they are conserved, and how hot other frames are."""

import numpy as np
from ase import units


def energy_slope(times: np.ndarray, energies: np.ndarray, *, n_atoms: int) -> float:
    """Slope of the straight line through total energies (eV) at times (ps), in eV/atom/ps."""
    return float(np.polyfit(times, energies, 1)[0]) / n_atoms


def kinetic_energies(velocities: np.ndarray, masses: np.ndarray) -> np.ndarray:
    """Kinetic energies (n_frames,) in eV from velocities (n_frames, n_atoms, 3) in ASE's unit and masses in u."""
    return 0.5 * np.einsum("n,tni,tni->t", masses, velocities, velocities)


def harmonic_temperature(
    temperature: float, difference: float, *, n_atoms: int, periodic: bool = False
) -> float:
    r"""Temperature (K) of frames whose mean potential energy is known relative to those at ``temperature``.

    By equipartition every harmonic mode holds :math:`k_B T/2` of potential energy:

    .. math:: T' = T + \frac{2\,\Delta U}{f\,k_B},\qquad f = 3n - 6 \text{ (molecules) or } 3n - 3 .

    Parameters
    ----------
    difference
        :math:`\Delta U`, mean potential energy of the frames minus that at ``temperature``, eV.
    n_atoms
        At least 3.
    """
    modes = 3 * n_atoms - (3 if periodic else 6)
    return temperature + 2 * difference / (modes * units.kB)
