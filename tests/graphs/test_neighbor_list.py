"""Neighbour lists against a slow search over periodic images."""

from functools import partial
from itertools import product

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from hypothesis import given, settings
from hypothesis import strategies as st

from ase_gffmerge.errors import StructureError
from ase_gffmerge.graphs import find_neighbors
from ase_gffmerge.graphs.neighbor_list import (
    enclosing_box,
    find_neighbors_on_device,
    kdtree_neighbors,
    wrap_positions,
)

CPU = torch.device("cpu")


def images(atoms: Atoms, cutoff: float) -> set[tuple[int, int, int, int, int]]:
    """All (i, j, S) with |r_j - r_i + S·cell| < cutoff, by trying every shift that can matter."""
    cell, positions = atoms.cell.array, atoms.positions
    spread = np.ptp(positions, axis=0)
    # |S_k| <= (cutoff + spread) / height_k, with 1 / height_k the norm of a reciprocal vector
    reach = [0, 0, 0]
    if atoms.pbc.any():
        reciprocal = np.linalg.pinv(np.where(atoms.pbc[:, None], cell, 0.0))
        reach = [
            int((cutoff + np.linalg.norm(spread)) * np.linalg.norm(reciprocal[:, k])) + 1 for k in range(3)
        ]
    ranges = [range(-n, n + 1) if periodic else (0,) for n, periodic in zip(reach, atoms.pbc, strict=True)]
    shifts = np.array(list(product(*ranges)))
    found = set()
    for i, j in product(range(len(atoms)), repeat=2):
        distance = np.linalg.norm(positions[j] - positions[i] + shifts @ cell, axis=1)
        for shift in shifts[distance < cutoff]:
            if i != j or shift.any():
                found.add((i, j, *shift.tolist()))
    return found


def edges(atoms: Atoms, cutoff: float) -> list[tuple[int, int, int, int, int]]:
    (sender, receiver), shifts = find_neighbors(atoms, cutoff)
    return [(i, j, *s) for i, j, s in zip(receiver.tolist(), sender.tolist(), shifts.tolist(), strict=True)]


def assert_same(atoms: Atoms, cutoff: float) -> None:
    got = edges(atoms, cutoff)
    assert len(set(got)) == len(got)
    assert set(got) == images(atoms, cutoff)


CELLS = {
    "cubic": 4.0 * np.eye(3),
    "skewed": np.array([[4.0, 0.0, 0.0], [1.9, 3.5, 0.0], [-1.4, 2.1, 3.8]]),
    "left-handed": np.array([[0.0, 4.0, 0.3], [3.7, 0.0, -0.8], [0.5, 0.2, 4.4]]),
    "smaller than the cutoff": np.array([[1.9, 0.2, 0.0], [0.4, 2.1, 0.1], [0.0, -0.3, 2.3]]),
}


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(sorted(CELLS)),
    pbc=st.tuples(*3 * [st.booleans()]),
    n_atoms=st.integers(1, 4),
    seed=st.integers(0, 2**32 - 1),
    origin=st.sampled_from([0.0, 1.0, 500.0]),
)
def test_agrees_with_images(kind, pbc, n_atoms, seed, origin):
    rng = np.random.default_rng(seed)
    positions = rng.uniform(-4.0, 6.0, (n_atoms, 3)) + origin * rng.normal(size=3)
    assert_same(Atoms(n_atoms * "H", positions, cell=CELLS[kind], pbc=pbc), 3.1)


@pytest.mark.parametrize("pbc", [(1, 0, 0), (0, 1, 1)])
def test_open_directions_need_no_cell_vector(rng, pbc):
    cell = np.where(np.array(pbc, bool)[:, None], CELLS["skewed"], 0.0)
    assert_same(Atoms("H5", rng.uniform(-3, 5, (5, 3)), cell=cell, pbc=pbc), 3.5)


def test_vacuum_cell_of_an_open_direction_is_ignored(rng):
    cell = np.diag([4.0, 4.0, 1.0])
    assert_same(Atoms("H5", rng.uniform(-8, 8, (5, 3)), cell=cell, pbc=(1, 1, 0)), 3.5)


def test_one_atom_and_none():
    assert edges(Atoms("H"), 5.0) == []
    assert edges(Atoms(), 5.0) == []
    assert len(edges(Atoms("H", cell=np.eye(3), pbc=True), 1.1)) == 6


def test_atoms_are_not_changed(rng):
    atoms = Atoms("H4", rng.uniform(-9, 9, (4, 3)), cell=CELLS["skewed"], pbc=(1, 0, 1))
    before = atoms.copy()
    find_neighbors(atoms, 5.0)
    assert atoms == before


def test_far_from_the_origin(rng):
    """Cells are counted from the atoms: from the origin there would be 10^13."""
    near = Atoms("H12", rng.uniform(0, 4, (12, 3)))
    far = near.copy()
    far.positions += 1e5
    assert sorted(edges(far, 4.0)) == sorted(edges(near, 4.0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda atoms: atoms.positions.__setitem__((2, 1), np.nan), r"atom\(s\) \[2\]"),
        (lambda atoms: atoms.positions.__setitem__((0, 0), np.inf), r"atom\(s\) \[0\]"),
        (lambda atoms: atoms.cell.__setitem__((1, 1), np.nan), "cell"),
        (lambda atoms: atoms.cell.__setitem__(1, 0.0), r"direction\(s\) \[1\]"),
        (lambda atoms: atoms.cell.__setitem__(1, 2 * atoms.cell[0]), "no independent"),
    ],
)
def test_impossible_geometry_is_named(rng, change, message):
    atoms = Atoms("H4", rng.uniform(0, 4, (4, 3)), cell=CELLS["skewed"], pbc=True)
    change(atoms)
    with pytest.raises(StructureError, match=message):
        find_neighbors(atoms, 3.0)


@pytest.mark.parametrize(
    ("cell", "pbc"),
    [
        ([[3, 0, 0], [0, 3, 0], [3, 3, 1e-2]], True),
        (1e-200 * np.eye(3), True),
        (np.diag([1e-4, 500, 500]), True),
        ([[2, 0, 0], [2, 1e-4, 0], [0, 0, 0]], (True, True, False)),
    ],
    ids=["coplanar", "vanishing", "needle", "flat sheet"],
)
@pytest.mark.parametrize("search", [find_neighbors, partial(find_neighbors_on_device, device=CPU)])
def test_cells_too_flat_to_search_are_refused(cell, pbc, search):
    """At once, and before the toolkit of the GPU is asked."""
    atoms = Atoms("Cu", cell=cell, pbc=pbc)
    with pytest.raises(StructureError, match=r"cell of Cu is only .* Å high .*niggli_reduce"):
        search(atoms, 5.0)


def test_usual_small_cells_are_searched():
    assert len(edges(bulk("Cu", a=3.6), 6.0)) == 78
    assert len(edges(bulk("Be", a=2.29, c=3.58), 5.0)) > 100
    assert_same(Atoms("H", cell=0.7 * np.eye(3), pbc=True), 3.0)


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(sorted(CELLS)),
    pbc=st.tuples(*3 * [st.booleans()]),
    n_atoms=st.integers(1, 4),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_search_for_sparse_structures_agrees(kind, pbc, n_atoms, seed):
    rng = np.random.default_rng(seed)
    positions = rng.uniform(-9.0, 9.0, (n_atoms, 3))
    atoms = Atoms(n_atoms * "H", positions, cell=CELLS[kind], pbc=pbc)
    origin, box = enclosing_box(atoms, 3.1)
    inside, cells = wrap_positions(positions, box, origin=origin, pbc=atoms.pbc)
    receiver, sender, shifts = kdtree_neighbors(inside, box, pbc=atoms.pbc, cutoff=3.1)
    shifts = shifts + cells[receiver] - cells[sender]
    found = np.column_stack([receiver, sender, shifts]).tolist()
    assert len(found) == len(set(map(tuple, found)))
    assert set(map(tuple, found)) == images(atoms, 3.1)


@pytest.mark.parametrize("size", [1e3, 1e5, 1e8])
def test_vacuum_costs_nothing(rng, size):
    """A grid would have (size / cutoff)^3 bins."""
    atoms = Atoms("H6", rng.uniform(0, 4, (6, 3)))
    expected = edges(atoms, 4.0)
    atoms.cell, atoms.pbc = [size, size, size], True
    assert edges(atoms, 4.0) == expected
    gas = Atoms("H4", [[0, 0, 0], [1, 0, 0], [size, size, size], [size, size, size + 1]])
    assert [edge[:2] for edge in edges(gas, 4.0)] == [(0, 1), (1, 0), (2, 3), (3, 2)]


def test_edges_are_ordered(rng):
    for drift in (0, 10**7):
        atoms = Atoms("H4", rng.uniform(0, 4, (4, 3)), cell=CELLS["skewed"], pbc=True)
        atoms.positions += rng.integers(-drift, drift + 1, (4, 3)) @ atoms.cell.array
        found = edges(atoms, 3.1)
        assert found == sorted(found)
        assert found
