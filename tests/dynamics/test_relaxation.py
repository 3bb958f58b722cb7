"""Relaxations with ASE's optimisers: of atoms, of cells under pressure, with parts of the cell or its symmetry kept."""

from pathlib import Path

import numpy as np
import pytest
from ase import Atoms, units
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.io import read

from ase_gffmerge.dynamics.ase_md import OPTIMIZERS, CellFreedom, relax
from ase_gffmerge.errors import ArgumentError, StructureError


def copper(*, rattle: float = 0.0, stretch: float = 1.0) -> Atoms:
    atoms = bulk("Cu", cubic=True)
    atoms.set_cell(atoms.cell.array * [[1, 1, 1], [1, 1, 1], [stretch] * 3], scale_atoms=True)
    if rattle:
        atoms.rattle(rattle, seed=1)
    atoms.calc = EMT()
    return atoms


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_finds_the_crystal(optimizer: str) -> None:
    atoms = copper(rattle=0.1)
    steps, converged = relax(atoms, fmax=0.01, optimizer=optimizer)
    assert converged
    assert steps > 1
    assert np.abs(atoms.get_forces()).max() < 0.01
    assert atoms.get_potential_energy() == pytest.approx(copper().get_potential_energy(), abs=1e-3)


def test_the_cell_takes_up_the_pressure() -> None:
    atoms = copper()
    relax(atoms, fmax=1e-4, cell=CellFreedom(pressure=5.0))
    assert -atoms.get_stress()[:3] / units.GPa == pytest.approx(5.0, abs=0.01)


def test_volume_and_axes_are_kept() -> None:
    atoms = copper(stretch=1.05)
    volume = atoms.get_volume()
    relax(atoms, fmax=1e-3, cell=CellFreedom(constant_volume=True))
    assert atoms.get_volume() == pytest.approx(volume, rel=1e-6)
    assert np.ptp(atoms.cell.lengths()) < 0.02
    atoms = copper(stretch=1.05)
    before = atoms.cell.array.copy()
    relax(atoms, fmax=1e-3, cell=CellFreedom(strains=("zz",)))
    assert atoms.cell.array[:2] == pytest.approx(before[:2])
    assert atoms.cell.array[2, 2] < before[2, 2] - 0.05


def test_symmetry_is_kept() -> None:
    pytest.importorskip("spglib")
    from ase.spacegroup.symmetrize import check_symmetry

    atoms = copper(stretch=1.05)
    group = check_symmetry(atoms).number
    relax(atoms, fmax=1e-3, cell=CellFreedom(), fix_symmetry=True, optimizer="fire", steps=50)
    assert check_symmetry(atoms).number >= group


def test_every_step_is_written_and_told(tmp_path: Path) -> None:
    path, steps = tmp_path / "way.traj", []
    taken, _ = relax(copper(rattle=0.1), fmax=0.05, trajectory=path, on_step=steps.append)
    assert len(read(path, ":")) == taken + 1 == len(steps)


def test_what_is_impossible_is_refused() -> None:
    with pytest.raises(ArgumentError, match="xx, yy, zz"):
        CellFreedom(strains=("a",))
    with pytest.raises(ArgumentError, match="bfgs, lbfgs"):
        relax(copper(), optimizer="newton")
    with pytest.raises(StructureError, match="three directions"):
        relax(Atoms("Cu2", positions=[[0, 0, 0], [0, 0, 2.3]], calculator=EMT()), cell=CellFreedom())
