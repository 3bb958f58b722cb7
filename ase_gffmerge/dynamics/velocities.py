"""Initial momenta, and the degrees of freedom that carry them."""

import numpy as np
from ase import Atoms
from ase.md import thermalize_momenta
from ase.md.velocitydistribution import Stationary, ZeroRotation


def new_momenta(atoms: Atoms, temperature: float, *, rng: np.random.Generator) -> None:
    """Draw Maxwell-Boltzmann momenta in place; without constraints, stop overall motion and, of molecules, rotation.

    Parameters
    ----------
    atoms
        The structure.
    temperature
        Of every internal vibration, K: the energy removed is not given to them.
    rng
        Source of randomness.
    """
    thermalize_momenta(atoms, temperature, rng=rng)
    if atoms.constraints or len(atoms) == 1:
        return
    Stationary(atoms, preserve_temperature=False)
    if not atoms.pbc.any():
        with np.errstate(divide="ignore", invalid="ignore"):
            ZeroRotation(atoms, preserve_temperature=False)


def degrees_of_freedom(atoms: Atoms, *, at_rest: bool) -> int:
    """Degrees of freedom that carry kinetic energy; ``at_rest``: (angular) momentum stays zero."""
    n = atoms.get_number_of_degrees_of_freedom()
    if at_rest and not atoms.constraints and len(atoms) > 1:
        n -= 3 if atoms.pbc.any() else 3 + np.count_nonzero(atoms.get_moments_of_inertia() > 1e-6)
    return max(int(n), 1)
