"""Copies of structures with displaced atoms and strained cells."""

import numpy as np
from ase import Atoms


def displaced(atoms: Atoms, *, rattle: float, strain: float, rng: np.random.Generator) -> Atoms:
    """Return a copy with normally displaced atoms and, for a structure periodic in three directions, a strained cell.

    Parameters
    ----------
    atoms
        Not changed.
    rattle
        Standard deviation of every coordinate in Å.
    strain
        Largest component of the symmetric strain; each is uniform between minus and plus this.
    rng
        Source of randomness.
    """
    copy = Atoms(atoms.numbers, positions=atoms.positions, cell=atoms.cell, pbc=atoms.pbc)
    if atoms.pbc.all():
        random = rng.uniform(-strain, strain, (3, 3))
        symmetric = np.triu(random) + np.triu(random, 1).T
        copy.set_cell(atoms.cell.array @ (np.eye(3) + symmetric), scale_atoms=True)
    copy.positions += rattle * rng.standard_normal(copy.positions.shape)
    return copy
