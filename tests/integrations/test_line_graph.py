"""Bonds and angles against loops over edges."""

import numpy as np
import pytest
import torch
from ase.build import bulk, molecule

from ase_gffmerge.graphs import build_graph
from ase_gffmerge.graphs.graph import edge_vectors
from ase_gffmerge.models.layers.linear import angles_between, undirected
from helpers.structures import rattled_slab, skewed_crystal

STRUCTURES = {
    "molecule": lambda: molecule("CH3CH2OH"),
    "slab": rattled_slab,
    "crystal": skewed_crystal,
    "one atom": lambda: bulk("Cu"),
    "far apart": lambda: molecule("H2", positions=[[0, 0, 0], [0, 0, 90.0]]),
}


@pytest.fixture(params=sorted(STRUCTURES))
def graph(request):
    return build_graph(STRUCTURES[request.param](), 4.0)


def test_a_bond_is_an_edge_and_its_reverse(graph):
    bond, edge = undirected(graph.edge_index, graph.shifts)
    sender, receiver = graph.edge_index
    ends = [
        (int(i), int(j), *map(int, shift)) for i, j, shift in zip(receiver, sender, graph.shifts, strict=True)
    ]
    for i, j, *shift in ends:
        there, back = ends.index((i, j, *shift)), ends.index((j, i, *(-s for s in shift)))
        assert bond[there] == bond[back]
    assert sorted(bond.tolist()) == sorted(2 * list(range(len(ends) // 2)))
    assert bond[edge].tolist() == list(range(len(edge)))


def test_angles_are_all_ordered_pairs_at_an_atom(graph):
    lengths = edge_vectors(graph).norm(dim=1)
    chosen = (lengths < 3.0).nonzero().squeeze(1)
    receiver = graph.edge_index[1]
    found = {tuple(pair) for pair in angles_between(receiver, chosen).T.tolist()}
    pairs = {
        (a, b) for a in chosen.tolist() for b in chosen.tolist() if a != b and receiver[a] == receiver[b]
    }
    assert found == pairs
    assert len(angles_between(receiver, chosen).T) == len(pairs)


def test_no_edges_make_no_bonds_and_no_angles():
    nothing = torch.zeros(2, 0, dtype=torch.long)
    bond, edge = undirected(nothing, torch.zeros(0, 3))
    assert len(bond) == len(edge) == 0
    assert angles_between(nothing[1], nothing[0]).shape == (2, 0)


def test_images_in_a_flat_batch_do_not_mix():
    from ase_gffmerge.graphs import batch_graphs

    first, second = (build_graph(bulk("Cu", a=a), 4.0) for a in (3.6, 3.7))
    batch = batch_graphs([first, second])
    bond, edge = undirected(batch.edge_index, batch.shifts)
    alone = [undirected(graph.edge_index, graph.shifts)[1] for graph in (first, second)]
    assert len(edge) == sum(map(len, alone))
    owner = batch.structure_index[batch.edge_index[1]]
    assert np.array_equal(owner[edge][bond], owner)
