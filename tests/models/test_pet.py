"""PET: what holds of energies that are not invariant under rotations by construction."""

import pytest
import torch
from ase.build import bulk, molecule

from ase_gffmerge.errors import FileFormatError
from ase_gffmerge.graphs import build_graph
from ase_gffmerge.graphs.graph import edge_vectors
from ase_gffmerge.models import build_potential
from ase_gffmerge.models.layers.linear import reversed_edges
from ase_gffmerge.testing import check_potential

SMALL = {
    "cutoff": 4.0,
    "cutoff_width": 1.0,
    "d_pet": 8,
    "d_node": 12,
    "d_head": 6,
    "d_feedforward": 10,
    "num_heads": 2,
}


def pet(**changes):
    torch.manual_seed(0)
    return build_potential("pet", {**SMALL, **changes}, (1, 6, 8)).double().eval().requires_grad_(False)


@pytest.mark.parametrize("featurizer", ["feedforward", "residual"])
def test_all_but_rotations_holds(featurizer):
    report = check_potential(pet(featurizer_type=featurizer), molecule("CH3CH2OH"))
    assert {result.name for result in report.failed} == {"rotations_and_reflections"}, str(report)


@pytest.mark.parametrize("atoms", [molecule("CH3CH2OH"), bulk("C"), bulk("C", cubic=True)])
def test_edges_are_reversed(atoms):
    graph = build_graph(atoms, 4.0)
    reverse = reversed_edges(graph.edge_index, graph.shifts)
    assert torch.equal(graph.edge_index[:, reverse], graph.edge_index.flip(0))
    torch.testing.assert_close(edge_vectors(graph)[reverse], -edge_vectors(graph))


def test_an_edge_without_a_reverse_is_given_itself():
    edges = torch.tensor([[0, 1, 2], [1, 0, 0]])
    assert reversed_edges(edges, torch.zeros(3, 3)).tolist() == [1, 0, 2]


@pytest.mark.parametrize(
    ("words", "changes"),
    [("does not divide", {"num_heads": 3}), ("must be one of", {"activation": "ReLU"})],
)
def test_impossible_networks_are_refused(words, changes):
    with pytest.raises(FileFormatError, match=words):
        pet(**changes)
