"""A slab and a crystal that are awkward for neighbour lists."""

import numpy as np
from ase import Atoms
from ase.build import bulk, fcc111

OWN_ARCHITECTURES = ("painn", "nequip")
"""Architectures that this project trains; those of other packages are tested in ``tests/integrations``."""


def rattled_slab() -> Atoms:
    slab = fcc111("Al", (2, 1, 2), vacuum=4.0, periodic=False)
    slab.rattle(0.1, seed=1)
    return slab


def skewed_crystal() -> Atoms:
    """Four elements in a cell smaller than the cutoff."""
    crystal = bulk("Al", cubic=True)
    crystal.numbers[:] = [1, 6, 8, 13]
    strain = np.array([[0.02, 0.1, -0.05], [0, 0.03, 0.2], [0.1, 0, -0.04]])
    crystal.set_cell(crystal.cell @ (np.eye(3) + strain), scale_atoms=True)
    crystal.rattle(0.15, seed=2)
    return crystal
