"""Runs that explode stop with an error that says so; none of them hangs."""

import numpy as np
import pytest
from ase import Atoms, units
from ase.calculators.calculator import CalculationFailed
from ase.md import VelocityVerlet, thermalize_momenta

from ase_gffmerge.dynamics.ase_md import run_md
from ase_gffmerge.dynamics.integrators import Conditions
from ase_gffmerge.errors import GFFMergeError, StructureError
from ase_gffmerge.graphs import neighbor_list as neighbours
from helpers.structures import cluster, crystal


def boxed() -> Atoms:
    """A molecule in a periodic cell: a grid of a few bins."""
    atoms = cluster()
    atoms.center(vacuum=3.0)
    atoms.pbc = True
    return atoms


@pytest.fixture(autouse=True)
def _bounded(monkeypatch):
    """Fail instead of waiting: what a search on a grid costs grows with the distance of atoms from their cell."""
    search = neighbours.matscipy_neighbors

    def bounded(quantities, *, positions, **given):
        assert np.abs(positions).max() < 1e6
        return search(quantities, positions=positions, **given)

    monkeypatch.setattr(neighbours, "matscipy_neighbors", bounded)


@pytest.mark.parametrize("build", [cluster, boxed, crystal])
@pytest.mark.parametrize("distance", [1e12, 1e200])
def test_lost_atoms_fail_and_leave_nothing_behind(calc, build, distance):
    atoms = build()
    atoms.calc = calc
    forces, place = atoms.get_forces(), atoms.positions[1, 0]
    atoms.positions[1, 0] = distance
    with pytest.raises(CalculationFailed, match=r"atom\(s\) \[1\] .*time step") as caught:
        atoms.get_forces()
    assert isinstance(caught.value, StructureError)
    assert calc.results == {}
    with pytest.raises(CalculationFailed, match=r"structure 1: .*time step|atom\(s\) \[1\]"):
        calc.evaluate([build(), atoms])
    atoms.positions[1, 0] = place
    np.testing.assert_array_equal(atoms.get_forces(), forces)


def test_translating_everything_is_refused_whatever_was_evaluated_before(calc):
    """The list of candidates would still do."""
    atoms = crystal()
    atoms.calc = calc
    atoms.get_forces()
    atoms.positions += 1e12
    with pytest.raises(CalculationFailed, match="time step"):
        atoms.get_forces()


@pytest.mark.parametrize("build", [cluster, boxed, crystal])
def test_dynamics_with_an_absurd_time_step_ends(painn_calc, build):
    atoms = build()
    atoms.calc = painn_calc
    thermalize_momenta(atoms, temperature_K=300, rng=np.random.default_rng(0))
    with pytest.raises(CalculationFailed, match="time step"):
        VelocityVerlet(atoms, 1e12 * units.fs).run(5)
    atoms = build()
    atoms.calc = painn_calc
    with pytest.raises(GFFMergeError, match="time step"):
        run_md(atoms, Conditions(ensemble="nve", temperature=300, timestep=1e12), steps=5)
