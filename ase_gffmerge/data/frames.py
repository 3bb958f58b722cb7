"""Frames made of frames: without labels, spread evenly, displaced."""

import numpy as np
from ase import Atoms


def bare(atoms: Atoms, *, wrap: bool = False) -> Atoms:
    """Return a copy with species, positions, cell and periodicity alone, on request wrapped into its cell."""
    copy = Atoms(atoms.numbers, positions=atoms.positions, cell=atoms.cell, pbc=atoms.pbc)
    if wrap and atoms.pbc.any():
        copy.wrap()
    return copy


def evenly(available: int, n: int) -> list[int]:
    """Return at most ``n`` indices, ascending, spread evenly over those below ``available``."""
    if not available:
        return []
    return np.unique(np.linspace(0, available - 1, min(n, available)).round().astype(int)).tolist()


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
    copy = bare(atoms)
    if atoms.pbc.all():
        random = rng.uniform(-strain, strain, (3, 3))
        symmetric = np.triu(random) + np.triu(random, 1).T
        copy.set_cell(atoms.cell.array @ (np.eye(3) + symmetric), scale_atoms=True)
    copy.positions += rattle * rng.standard_normal(copy.positions.shape)
    return copy
