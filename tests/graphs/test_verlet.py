"""Neighbour lists that last: exactly the edges of a fresh search, with fewer searches."""

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, fcc111, molecule
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ase_gffmerge.errors import StructureError
from ase_gffmerge.graphs import build_graph
from ase_gffmerge.graphs import graph as batches
from ase_gffmerge.graphs.verlet import VerletCache, strain_maps

CUTOFF = 4.0


def tiny_cell() -> Atoms:
    return bulk("Cu", a=3.6)


def far_molecule() -> Atoms:
    atoms = molecule("CH3CH2OH")
    atoms.positions += 3e4
    return atoms


def box_of_vacuum() -> Atoms:
    return Atoms("CO", [[0, 0, 0], [1.1, 0, 0]], cell=[1e6, 1e6, 1e6], pbc=True)


def wire() -> Atoms:
    return Atoms("CuAl", [[0, 0, 0], [0.3, 0, 1.5]], cell=[0, 0, 3.0], pbc=(False, False, True))


STRUCTURES = {
    "molecule": lambda: molecule("CH3CH2OH"),
    "far from the origin": far_molecule,
    "crystal": lambda: bulk("Cu", cubic=True) * (2, 2, 1),
    "smaller than the cutoff": tiny_cell,
    "slab": lambda: fcc111("Al", (2, 2, 2), vacuum=6.0),
    "slab in a vacuum that counts as periodic": lambda: fcc111("Al", (2, 1, 2), vacuum=300.0, periodic=True),
    "wire": wire,
    "box of vacuum": box_of_vacuum,
}


def cache(skin: float = 1.0) -> VerletCache:
    return VerletCache(cutoff=CUTOFF, skin=skin, device=torch.device("cpu"))


@pytest.fixture
def searches(monkeypatch) -> list[Atoms]:
    """Grows with every search for neighbours."""
    made = []
    plain = batches.find_neighbors
    monkeypatch.setattr(
        batches, "find_neighbors", lambda atoms, cutoff: made.append(atoms) or plain(atoms, cutoff)
    )
    return made


def assert_fresh(verlet: VerletCache, atoms: Atoms) -> None:
    """The graph is the one that knows no past: same numbers, same edges in the same order."""
    got, fresh = verlet.graph(atoms), build_graph(atoms, CUTOFF)
    for key in (
        "positions",
        "atomic_numbers",
        "specialist",
        "cell",
        "edge_index",
        "shifts",
        "structure_index",
    ):
        assert torch.equal(getattr(got, key), getattr(fresh, key)), key


def strain(size: float, rng: np.random.Generator) -> np.ndarray:
    return np.eye(3) + size * rng.standard_normal((3, 3))


@pytest.mark.parametrize("kind", STRUCTURES)
@pytest.mark.parametrize("cell_size", [0.0, 0.002])
def test_walks_of_atoms_and_cell(kind, cell_size, rng, searches):
    atoms, verlet, n_steps = STRUCTURES[kind](), cache(), 40
    for _ in range(n_steps):
        atoms.rattle(0.03, rng=rng)
        atoms.set_cell(atoms.cell.array @ strain(cell_size, rng), scale_atoms=True)
        assert_fresh(verlet, atoms)
    mine = len(searches) - n_steps  # the other half is the comparison
    assert mine < n_steps / 2


@settings(max_examples=60, deadline=None)
@given(
    pbc=st.tuples(*3 * [st.booleans()]),
    seed=st.integers(0, 2**32 - 1),
    skin=st.sampled_from([0.0, 0.2, 1.0, 4.0]),
    moved=st.sampled_from([0.0, 0.05, 0.3, 2.0]),
    strained=st.sampled_from([0.0, 0.01, 0.1, 0.5]),
    together=st.booleans(),
)
def test_any_two_structures_in_a_row(pbc, seed, skin, moved, strained, together):
    rng = np.random.default_rng(seed)
    cell = 3.0 * np.eye(3) + rng.normal(size=(3, 3)) * 0.5
    atoms = Atoms("H4", rng.uniform(-6, 6, (4, 3)), cell=cell, pbc=pbc)
    verlet = cache(skin)
    for _ in range(3):
        assume(
            1 / np.linalg.norm(np.linalg.inv(atoms.cell.array), axis=0).max() > 0.5
        )  # no endless rows of images
        assert_fresh(verlet, atoms)
        atoms.positions += moved * rng.standard_normal((4, 3)) + 10 * moved * rng.standard_normal(3)
        atoms.set_cell(atoms.cell.array @ strain(strained, rng), scale_atoms=together)


def test_a_list_lasts_until_an_atom_has_moved_half_a_skin(searches):
    atoms, verlet = bulk("Cu", cubic=True) * 2, cache()
    verlet.graph(atoms)
    for moved, expected in ((0.5, 1), (0.015, 1), (0.005, 2)):  # 1/32 of it moves the mean
        atoms.positions[0, 1] += moved
        verlet.graph(atoms)
        assert len(searches) == expected


def test_moving_or_turning_everything_costs_nothing(searches):
    atoms, verlet = bulk("Cu", cubic=True), cache()
    atoms.positions += 1e4
    verlet.graph(atoms)
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    atoms.positions = atoms.positions @ rotation + 5.0
    atoms.set_cell(atoms.cell.array @ rotation)
    got = verlet.graph(atoms)
    assert len(searches) == 1
    fresh = build_graph(atoms, CUTOFF)
    assert torch.equal(got.edge_index, fresh.edge_index)
    assert torch.equal(got.shifts, fresh.shifts)


def test_a_shrinking_cell_is_noticed_without_any_displacement(searches):
    """Atoms follow the cell exactly, so that only its strain brings new pairs within the cutoff."""
    atoms, verlet = bulk("Cu", a=3.6), cache(0.5)
    for _ in range(30):
        assert_fresh(verlet, atoms)
        atoms.set_cell(0.99 * atoms.cell.array, scale_atoms=True)
    assert 2 < len(searches) - 30 < 10


def test_the_cell_of_an_open_direction_does_not_matter(searches):
    atoms, verlet = fcc111("Al", (2, 2, 2), vacuum=6.0), cache()
    verlet.graph(atoms)
    atoms.cell[2] *= 3
    assert verlet.graph(atoms).cell[0, 2, 2] == atoms.cell[2, 2]
    assert len(searches) == 1


def test_without_a_skin_every_call_searches(searches):
    atoms, verlet = tiny_cell(), cache(0.0)
    for expected in (1, 2, 3):
        verlet.graph(atoms)
        assert len(searches) == expected
        atoms.set_cell(0.9999 * atoms.cell.array)


def test_wrapping_between_steps():
    atoms, verlet = bulk("Cu", cubic=True), cache()
    atoms.positions += 1.7
    assert_fresh(verlet, atoms)
    atoms.wrap()
    assert_fresh(verlet, atoms)


@pytest.mark.parametrize(
    "edit",
    [
        lambda atoms: atoms.numbers.__setitem__(1, 8),
        lambda atoms: atoms.append("H"),
        lambda atoms: atoms.pop(0),
        lambda atoms: atoms.pbc.__setitem__(2, False),
        lambda atoms: atoms.cell.__setitem__((0, 0), 3.0),
        lambda atoms: atoms.positions.__setitem__(0, [1.0, 1.0, 9.0]),
        lambda atoms: atoms.set_array("specialist", np.arange(len(atoms))),
        lambda atoms: atoms.positions.__imul__(1.5),
    ],
)
def test_edits_in_place(edit):
    atoms, verlet = bulk("Cu", cubic=True), cache()
    assert_fresh(verlet, atoms)
    edit(atoms)
    assert_fresh(verlet, atoms)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda atoms: atoms.positions.__setitem__((0, 0), np.nan),
        lambda atoms: atoms.cell.__setitem__((0, 0), np.inf),
        lambda atoms: atoms.cell.__setitem__(0, 0.0),
    ],
)
def test_an_impossible_structure_leaves_nothing_behind(spoil):
    atoms, verlet = bulk("Cu", cubic=True), cache()
    verlet.graph(atoms)
    bad = atoms.copy()
    spoil(bad)
    for _ in range(2):
        with pytest.raises(StructureError):
            verlet.graph(bad)
    atoms.positions[0, 0] += 0.1
    assert_fresh(verlet, atoms)


def test_strain_maps_take_cells_to_cells(rng):
    before, after = (torch.tensor(3 * np.eye(3) + rng.normal(size=(5, 3, 3)) * 0.3) for _ in range(2))
    periodic = torch.tensor([[1, 1, 1], [1, 1, 0], [0, 0, 1], [0, 0, 0], [1, 0, 1]], dtype=torch.bool)
    maps = strain_maps(before, after, periodic=periodic)
    assert torch.allclose((before @ maps)[periodic], after[periodic], atol=1e-12)
    assert torch.equal(maps[3], torch.eye(3, dtype=torch.float64))
    across = torch.linalg.cross(before[1, 0], before[1, 1])
    assert torch.allclose(across @ maps[1], across, atol=1e-10)
