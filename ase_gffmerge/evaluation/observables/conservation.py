"""Whether the energy of a trajectory is conserved."""

import numpy as np


def energy_slope(times: np.ndarray, energies: np.ndarray, *, n_atoms: int) -> float:
    """Slope of the straight line through total energies (eV) at times (ps), in eV/atom/ps."""
    return float(np.polyfit(times, energies, 1)[0]) / n_atoms
