"""Atoms that drifted through many cells are searched as at the origin; those that float64 cannot resolve are refused."""

import re
from functools import partial

import numpy as np
import pytest
import torch
from ase import Atoms

from ase_gffmerge.errors import StructureError
from ase_gffmerge.graphs import build_graph, find_neighbors, predict
from ase_gffmerge.graphs import graph as batches
from ase_gffmerge.graphs import neighbor_list as neighbours
from ase_gffmerge.graphs.neighbor_list import MAX_COORDINATE, find_neighbors_on_device
from ase_gffmerge.graphs.verlet import VerletGraph
from helpers.structures import skewed_crystal

CPU = torch.device("cpu")
CELLS = 10**7


def drifted(atoms: Atoms, cells: np.ndarray) -> Atoms:
    """The same crystal, described by atoms in other cells."""
    atoms = atoms.copy()
    atoms.positions += np.where(atoms.pbc, cells, 0) @ atoms.cell.array
    return atoms


@pytest.mark.parametrize("pbc", [(1, 1, 1), (1, 0, 1), (0, 0, 1)])
@pytest.mark.parametrize(("enlarged", "cells"), [(1, CELLS), (1000, CELLS // 1000)], ids=["grid", "tree"])
def test_edges_are_those_of_the_first_cell(monkeypatch, rng, pbc, enlarged, cells):
    atoms = skewed_crystal() * (1, 1, 2)
    atoms.pbc = pbc
    if enlarged > 1:
        atoms.set_cell(enlarged * atoms.cell.array)
        atoms.pbc = True
        monkeypatch.setattr(neighbours, "matscipy_neighbors", None)
    cells = np.where(pbc, rng.integers(-cells, cells + 1, (len(atoms), 3)), 0)
    (sender, receiver), shifts = find_neighbors(atoms, 4.0)
    expected = np.column_stack([receiver, sender, shifts + cells[receiver] - cells[sender]])
    (sender, receiver), shifts = find_neighbors(drifted(atoms, cells), 4.0)
    found = np.column_stack([receiver, sender, shifts])
    assert len(found)
    assert found.tolist() == sorted(expected.tolist())


@pytest.mark.parametrize("together", [True, False])
def test_energies_and_forces_are_those_at_the_origin(potential, rng, together):
    potential = potential.double()
    atoms = skewed_crystal()
    atoms.numbers = rng.choice(potential.species, len(atoms))
    cells = rng.integers(-CELLS, CELLS + 1, (1 if together else len(atoms), 3))
    far = drifted(atoms, cells)

    def results(structure: Atoms):
        graph = build_graph(structure, potential.hyper.cutoff)
        return predict(potential, graph)

    near, found = results(atoms), results(far)
    resolution = np.spacing(np.abs(far.positions).max())
    assert resolution < 1e-7
    slope = 1 + near.forces.abs().max().item()
    torch.testing.assert_close(found.energy, near.energy, rtol=0, atol=100 * slope * len(atoms) * resolution)
    torch.testing.assert_close(found.forces, near.forces, rtol=0, atol=1000 * slope * resolution)


@pytest.fixture
def searched(monkeypatch) -> list[np.ndarray]:
    """Positions that matscipy was given."""
    positions, search = [], neighbours.matscipy_neighbors

    def recorded(quantities, **given):
        positions.append(given["positions"])
        return search(quantities, **given)

    monkeypatch.setattr(neighbours, "matscipy_neighbors", recorded)
    return positions


def test_the_grid_search_never_sees_a_distant_atom(searched, rng):
    """What it costs grows with the number of cells between an atom and the first one: 21 s at 1e12 Å."""
    atoms = skewed_crystal()
    find_neighbors(drifted(atoms, rng.integers(-CELLS, CELLS + 1, (len(atoms), 3))), 4.0)
    fractional = searched[0] @ np.linalg.inv(atoms.cell.array)
    assert fractional.min() > -1e-6
    assert fractional.max() < 1 + 1e-6


def test_atoms_in_their_cell_are_searched_as_they_are(searched):
    """To the last bit."""
    atoms = skewed_crystal()
    atoms.wrap(eps=0)
    for pbc in (True, False):
        atoms.pbc = pbc
        find_neighbors(atoms, 4.0)
        assert np.array_equal(searched[-1], atoms.positions)


@pytest.mark.parametrize("distance", [1.1 * MAX_COORDINATE, 1e12, 1e160, 1e300])
@pytest.mark.parametrize("pbc", [True, False])
@pytest.mark.parametrize("search", [find_neighbors, partial(find_neighbors_on_device, device=CPU)])
def test_atoms_that_float64_cannot_resolve_are_refused(distance, pbc, search):
    atoms = skewed_crystal()
    atoms.pbc = pbc
    atoms.positions[2, 1] = -distance
    with pytest.raises(StructureError, match=rf"\[2\].* {re.escape(f'{distance:.1e}')} Å.*time step.*mean"):
        search(atoms, 4.0)
    atoms.positions[2, 1] = -0.9 * MAX_COORDINATE
    assert len(find_neighbors(atoms, 4.0)[1])


def test_candidates_that_would_still_do_are_no_way_around(monkeypatch):
    """A translation of everything moves no atom relative to another, but rounds them."""
    atoms = skewed_crystal()
    graph = VerletGraph([atoms], cutoff=3.0, skin=1.0, device=CPU, specialist=[0])
    searched = []
    monkeypatch.setattr(
        batches, "find_neighbors", lambda *given: searched.append(given) or find_neighbors(*given)
    )
    positions = torch.tensor(atoms.positions)
    assert graph.at(positions + 0.5 * MAX_COORDINATE).edge_index.shape[1]
    assert not searched
    with pytest.raises(StructureError, match="from the origin"):
        graph.at(positions + 2 * MAX_COORDINATE)
