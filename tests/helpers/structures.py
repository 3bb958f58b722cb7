"""Structures of every periodicity, some of them awkward for neighbor lists; architectures that this project trains."""

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, fcc111, molecule
from ase.calculators.calculator import Calculator

OWN_ARCHITECTURES = ("painn", "nequip")
"""Architectures that this project trains; those of other packages are tested in ``tests/integrations``."""
WITH_ESCAIP = (*OWN_ARCHITECTURES, pytest.param("escaip", marks=[pytest.mark.slow, pytest.mark.nightly]))
"""The same with EScAIP, whose tests take longer; those of merges take minutes and leave it out."""


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


# -- structures of the calculator's contract --


def crystal() -> Atoms:
    """Skewed, rattled, and smaller than the cutoff."""
    atoms = bulk("Cu", "fcc", a=3.7) * (2, 1, 1)
    atoms.numbers[1] = 13
    atoms.set_cell(
        atoms.cell @ np.add(np.eye(3), [[0.03, 0.05, 0], [0, -0.04, 0.06], [0.02, 0, 0.05]]), scale_atoms=True
    )
    atoms.rattle(0.1, seed=3)
    return atoms


def slab() -> Atoms:
    atoms = fcc111("Al", (2, 1, 2), vacuum=5.0)
    atoms.info.clear()  # ASE's notes on the surface do not fit into files
    atoms.rattle(0.1, seed=4)
    return atoms


def cluster() -> Atoms:
    atoms = molecule("CH3OH")
    atoms.rattle(0.05, seed=5)
    return atoms


STRUCTURES = {"crystal": crystal, "slab": slab, "cluster": cluster}


def everything(atoms: Atoms, calc: Calculator) -> dict:
    """All results of a copy of ``atoms``."""
    atoms = atoms.copy()
    atoms.calc = calc
    atoms.get_potential_energy()
    return calc.results
