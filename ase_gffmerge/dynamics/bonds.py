"""Covalent bonds of a structure, and whether they still hold."""

from dataclasses import dataclass

import numpy as np
from ase import Atoms
from ase.geometry import find_mic
from ase.neighborlist import natural_cutoffs, neighbor_list


@dataclass(frozen=True)
class Bonds:
    """Pairs of bonded atoms.

    Attributes
    ----------
    pairs : (n_bonds, 2) int
        Atom indices, the smaller first.
    lengths : (n_bonds,) float
        Reference lengths in Å.
    """

    pairs: np.ndarray
    lengths: np.ndarray


def find_bonds(atoms: Atoms, *, tolerance: float = 1.2) -> Bonds:
    """Pairs closer than ``tolerance`` times the sum of their covalent radii (minimum image)."""
    i, j = neighbor_list("ij", atoms, natural_cutoffs(atoms, mult=tolerance))
    pairs = np.unique(np.stack([i, j], axis=1)[i < j], axis=0).reshape(-1, 2)
    return Bonds(pairs, _lengths(atoms, pairs))


def broken_bonds(atoms: Atoms, bonds: Bonds, *, stretch: float = 1.5) -> np.ndarray:
    """Pairs (n_broken, 2) of atoms whose bond is broken, or whose positions are not finite.

    Parameters
    ----------
    atoms
        The structure now.
    bonds
        Bonds of the intact structure.
    stretch
        A bond is broken when it is longer than this multiple of its reference length.
    """
    return bonds.pairs[~(_lengths(atoms, bonds.pairs) <= stretch * bonds.lengths)]


def bonds_intact(atoms: Atoms, bonds: Bonds, *, stretch: float = 1.5) -> bool:
    """Whether no bond is broken.

    Parameters
    ----------
    atoms, bonds, stretch
        As for :func:`broken_bonds`.

    Examples
    --------
    >>> from ase.build import molecule
    >>> water = molecule("H2O")
    >>> bonds = find_bonds(water)
    >>> water.positions[1] += 1.0
    >>> bonds_intact(water, bonds)
    False
    """
    return len(broken_bonds(atoms, bonds, stretch=stretch)) == 0


def _lengths(atoms: Atoms, pairs: np.ndarray) -> np.ndarray:
    """Minimum-image distances (n_pairs,) in Å."""
    vectors = atoms.positions[pairs[:, 1]] - atoms.positions[pairs[:, 0]]
    if not atoms.pbc.any() or not np.isfinite(vectors).all():
        return np.linalg.norm(vectors, axis=1)
    return find_mic(vectors, atoms.cell, atoms.pbc)[1]
