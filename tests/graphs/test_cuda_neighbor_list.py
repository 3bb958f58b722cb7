"""Neighbours found on the device against matscipy's: the same edges in the same order.

Kernels of Warp for the CPU stand for those of a GPU.
"""

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule
from hypothesis import given, settings
from hypothesis import strategies as st

from ase_gffmerge.errors import StructureError
from ase_gffmerge.graphs import build_graph, find_neighbors
from ase_gffmerge.graphs import graph as batches
from ase_gffmerge.graphs import neighbor_list as device_search
from ase_gffmerge.graphs.neighbor_list import can_search_on, find_neighbors_on_device
from ase_gffmerge.graphs.verlet import VerletGraph
from helpers.structures import rattled_slab, skewed_crystal

CPU = torch.device("cpu")


def test_a_gpu_searches_when_the_toolkit_is_installed(monkeypatch):
    for installed in (True, False):
        monkeypatch.setattr(device_search, "_installed", lambda answer=installed: answer)
        assert can_search_on(torch.device("cuda:1")) is installed
        assert not can_search_on(CPU)


def wire() -> Atoms:
    return Atoms("H5", positions=3 * np.random.default_rng(0).random((5, 3)), cell=[3, 0, 0], pbc=[1, 0, 0])


def dense() -> Atoms:
    """More neighbours than anybody makes room for."""
    return Atoms("H150", positions=3 * np.random.default_rng(0).random((150, 3)))


def lost() -> Atoms:
    """Far from the origin, in cells of their own."""
    atoms = skewed_crystal() * (2, 2, 2)
    atoms.positions += np.random.default_rng(0).integers(-50, 50, (len(atoms), 3)) @ atoms.cell.array + 1e3
    return atoms


def drifted() -> Atoms:
    """Millions of cells away, each atom in one of its own."""
    atoms = skewed_crystal()
    atoms.positions += np.random.default_rng(0).integers(-(10**7), 10**7, (len(atoms), 3)) @ atoms.cell.array
    return atoms


def left_handed() -> Atoms:
    atoms = skewed_crystal()
    atoms.set_cell(atoms.cell.array[[1, 0, 2]])
    return atoms


def vacuum() -> Atoms:
    atoms = molecule("CH3CH2OH", cell=[2000] * 3, pbc=True)
    atoms.positions[3] -= 2000.0
    return atoms


STRUCTURES = {
    "molecule": lambda: molecule("CH3CH2OH"),
    "slab": rattled_slab,
    "crystal": skewed_crystal,
    "wire": wire,
    "dense": dense,
    "unwrapped": lost,
    "drifted": drifted,
    "left-handed": left_handed,
    "vacuum": vacuum,
    "own images": lambda: Atoms("H", cell=[1.2, 1.3, 1.4], pbc=True),
    "flat": lambda: Atoms("Cu2", positions=[[0, 0, 0], [1, 1, 1]], cell=[[2.5, 0, 0], [7, 2.6, 0], [-5, 9, 2.4]], pbc=True),
    "atom": lambda: Atoms("H"),
    "nothing": Atoms,
}  # fmt: skip


class TestWithTheToolkit:
    @pytest.fixture(autouse=True)
    def _toolkit(self):
        pytest.importorskip("nvalchemiops", reason="nvalchemi-toolkit-ops is not installed")

    @pytest.mark.parametrize("name", STRUCTURES)
    @pytest.mark.parametrize("cutoff", [3.5, 6.0])
    def test_edge_for_edge(self, name, cutoff):
        atoms = STRUCTURES[name]()
        for found, expected in zip(
            find_neighbors_on_device(atoms, cutoff, device=CPU), find_neighbors(atoms, cutoff), strict=True
        ):
            assert found.dtype == torch.long
            np.testing.assert_array_equal(found, expected)

    @settings(max_examples=30, deadline=None)
    @given(
        seed=st.integers(0, 2**32 - 1),
        n=st.integers(1, 12),
        pbc=st.tuples(*[st.booleans()] * 3),
        cutoff=st.floats(1.0, 6.0),
    )
    def test_any_structure(self, seed, n, pbc, cutoff):
        rng = np.random.default_rng(seed)
        cell = 3.5 * np.eye(3) + rng.uniform(-1, 1, (3, 3))
        atoms = Atoms(f"H{n}", positions=rng.uniform(-8, 8, (n, 3)), cell=cell, pbc=pbc)
        for found, expected in zip(
            find_neighbors_on_device(atoms, cutoff, device=CPU), find_neighbors(atoms, cutoff), strict=True
        ):
            np.testing.assert_array_equal(found, expected)

    def test_impossible_structures(self):
        with pytest.raises(StructureError, match="no independent cell vector"):
            find_neighbors_on_device(Atoms("H", pbc=True), 3.0, device=CPU)

    @pytest.mark.parametrize("skin", [0.0, 0.5])
    def test_the_skin_is_the_same(self, monkeypatch, rng, skin):
        """Graphs of moving structures, whose candidates were found on the device, hold the edges of a fresh search."""
        structures = [skewed_crystal(), rattled_slab(), molecule("CH3CH2OH")]
        searched = []
        monkeypatch.setattr(batches, "can_search_on", lambda device: searched.append(device) or True)
        graph = VerletGraph(structures, cutoff=3.5, skin=skin, device=CPU, specialist=[0, 0, 0])
        for _ in range(5):
            for atoms in structures:
                atoms.positions += 0.1 * rng.standard_normal(atoms.positions.shape)
            found = graph.at(torch.as_tensor(np.concatenate([atoms.positions for atoms in structures])))
            with monkeypatch.context() as patch:
                patch.setattr(batches, "can_search_on", lambda device: False)
                single = [build_graph(atoms, 3.5) for atoms in structures]
            expected = batches.batch_graphs(single)
            for key in ("edge_index", "shifts", "positions", "atomic_numbers"):
                assert torch.equal(getattr(found, key), getattr(expected, key))
        assert len(searched) > 3
