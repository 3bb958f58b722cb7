"""PET: what holds of energies that are not invariant under rotations by construction."""

import pytest
import torch
from ase.build import bulk, molecule

from ase_gffmerge.errors import FileFormatError
from ase_gffmerge.graphs import build_graph
from ase_gffmerge.graphs.graph import edge_vectors
from ase_gffmerge.models import build_potential
from ase_gffmerge.models.layers.linear import reversed_edges
from ase_gffmerge.models.layers.readout import adaptive_cutoffs, bump_cutoff
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


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"featurizer_type": "residual"},
        {"num_neighbors_adaptive": 4},
        {"num_neighbors_adaptive": 4, "adaptive_cutoff_method": "grid"},
    ],
)
def test_all_but_rotations_holds(changes):
    report = check_potential(pet(**changes), molecule("CH3CH2OH"))
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


def test_adaptive_cutoffs_find_so_many_neighbours():
    """Whole neighbours within, parts of those in between, and those of a uniform density; all of them without any."""
    generator = torch.Generator().manual_seed(0)
    lengths = 5 * torch.rand(60, 1, generator=generator, dtype=torch.float64)
    receiver, options = torch.zeros(60, dtype=torch.long), {"neighbors": 16, "cutoff": 5.0, "width": 1.0}
    radius = adaptive_cutoffs(lengths, receiver, 2, **options)
    found = bump_cutoff(lengths, radius[0], 1.0).sum() + 16 * (radius[0] / 5) ** 3
    torch.testing.assert_close(found, torch.full_like(found, 16.0))
    assert radius[1] == 5.0
    by_grid = adaptive_cutoffs(lengths, receiver, 2, **options, method="grid")
    assert abs(by_grid[0] - radius[0]) < 0.25  # a probe's distance from the next


@pytest.mark.parametrize(
    ("words", "changes"),
    [
        ("does not divide", {"num_heads": 3}),
        ("must be one of", {"activation": "ReLU"}),
        ("positive", {"num_neighbors_adaptive": -1}),
    ],
)
def test_impossible_networks_are_refused(words, changes):
    with pytest.raises(FileFormatError, match=words):
        pet(**changes)
