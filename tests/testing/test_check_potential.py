"""Checks of an architecture: the package's own pass, and each broken promise is caught by its check."""

import pytest
import torch
from ase.build import molecule

from ase_gffmerge.graphs import build_graph
from ase_gffmerge.models import build_potential
from ase_gffmerge.models.painn import Message, PaiNN
from ase_gffmerge.testing import check_potential
from ase_gffmerge.testing.potential import small_cluster

HYPER = {"channels": 4, "n_blocks": 1, "n_radial": 4, "cutoff": 3.0}


class ReadsPositions(PaiNN):
    def energies(self, scalars, vectors, graph):
        return super().energies(scalars, vectors, graph) + 0.1 * graph.positions[:, 0]


class SingleEnergies(PaiNN):
    def energies(self, scalars, vectors, graph):
        return super().energies(scalars, vectors, graph).float()


class NoEnvelope(PaiNN):
    def geometry(self, vectors, graph):
        geometry = super().geometry(vectors, graph)
        geometry.envelope.fill_(1.0)
        return geometry


class Crossing(PaiNN):
    """The structures of a batch know of each other."""

    def energies(self, scalars, vectors, graph):
        return super().energies(scalars, vectors, graph) + 0.01 * len(graph)


class Oriented(PaiNN):
    def angular(self, directions):
        return directions * directions.new_tensor([1.0, 1.0, 1.1])


class Detached(PaiNN):
    def geometry(self, vectors, graph):
        vectors = torch.cat([vectors[:1].detach(), vectors[1:]])
        return super().geometry(vectors, graph)


class Random(PaiNN):
    def energies(self, scalars, vectors, graph):
        return super().energies(scalars, vectors, graph) + 1e-12 * torch.rand(len(graph), dtype=torch.float64)


class Forgets(PaiNN):
    """Weights outside the state dict."""

    def __init__(self, hyper, species):
        super().__init__(hyper, species)
        self.hidden_shift = torch.rand(1, dtype=torch.float64)

    def energies(self, scalars, vectors, graph):
        return super().energies(scalars, vectors, graph) + self.hidden_shift


class OrderMatters(PaiNN):
    def energies(self, scalars, vectors, graph):
        return super().energies(scalars, vectors, graph) + 0.01 * torch.arange(len(graph))


class Lonely(PaiNN):
    def energies(self, scalars, vectors, graph):
        return super().energies(scalars, vectors, graph) / float(graph.n_edges > 0 or "nan")


class Shortcut(PaiNN):
    """The energy does not come from the chain of stages alone."""

    def forward(self, vectors, graph):
        energies, scalars = super().forward(vectors, graph)
        return energies + 0.1, scalars


class SlightlyWrongForces(PaiNN):
    """Right energies; a ten-thousandth more of every force."""

    def energies(self, scalars, vectors, graph):
        energies = super().energies(scalars, vectors, graph)
        return energies.detach() + (1 + 1e-4) * (energies - energies.detach())


class TwoHops(Message):
    def forward(self, state, geometry):
        return super().forward(super().forward(state, geometry), geometry)


class FarSighted(PaiNN):
    """A stage reads the neighbours' neighbours."""

    def __init__(self, hyper, species):
        super().__init__(hyper, species)
        self.stages[0] = TwoHops(hyper.channels, hyper.n_radial)


class Reticent(PaiNN):
    """The stage that reads neighbours denies it."""

    def __init__(self, hyper, species):
        super().__init__(hyper, species)
        self.stages[0].gathers = False


BROKEN = [
    (FarSighted, "stages_read_the_edges_to_an_atom"),
    (Reticent, "stages_read_the_edges_to_an_atom"),
    (SlightlyWrongForces, "forces_are_the_gradient"),
    (ReadsPositions, "geometry_enters_through_edge_vectors"),
    (SingleEnergies, "energies_per_atom_in_float64"),
    (NoEnvelope, "nothing_happens_at_the_cutoff"),
    (Crossing, "structures_in_a_batch_are_strangers"),
    (Oriented, "rotations_and_reflections"),
    (Detached, "forces_are_the_gradient"),
    (Random, "same_graph_same_bits"),
    (Random, "global_state_stays"),
    (Forgets, "hyper_parameters_and_weights_rebuild_it"),
    (OrderMatters, "order_of_atoms_and_edges"),
    (Lonely, "atoms_without_neighbours"),
    (Shortcut, "stages_chain_up_to_the_energy"),
]


def water():
    atoms = molecule("H2O")
    atoms.rattle(0.05, seed=0)
    return atoms


@pytest.mark.parametrize("as_graph", [True, False])
@pytest.mark.parametrize("architecture", ["painn", "nequip"])
def test_the_package_s_own_architectures_pass(architecture, as_graph):
    hyper = HYPER | ({"tensor_channels": 2} if architecture == "nequip" else {})
    potential = build_potential(architecture, hyper, (1, 8)).double()
    report = check_potential(potential, build_graph(water(), 3.0) if as_graph else water())
    report.raise_if_failed()
    assert not report.of("skipped")
    assert potential.training, "the caller's potential stays as it was"
    assert check_potential(potential.float(), water(), tolerance=1e-4).passed


@pytest.mark.parametrize("species", [(8,), (1, 8), tuple(range(1, 90))], ids=len)
@pytest.mark.parametrize("architecture", ["painn", "nequip"])
def test_a_structure_is_made_if_none_is_given(architecture, species):
    torch.manual_seed(0)
    hyper = HYPER | ({"tensor_channels": 2} if architecture == "nequip" else {})
    potential = build_potential(architecture, hyper, species).double()
    check_potential(potential).raise_if_failed()
    assert check_potential(potential.float()).passed, "with a tolerance that suits float32"
    atoms = small_cluster(potential)
    assert set(atoms.numbers) <= set(species)
    assert len(set(atoms.numbers)) == min(len(species), len(atoms))
    graph = build_graph(atoms, potential.hyper.cutoff)
    assert set(graph.edge_index[0].tolist()) == set(range(len(atoms))), "every atom has a neighbour"


@pytest.mark.parametrize(("broken", "name"), BROKEN)
@pytest.mark.parametrize("build", [water, lambda: None], ids=["water", "default"])
def test_each_broken_promise_is_caught_by_its_check(broken, name, build):
    torch.manual_seed(0)
    report = check_potential(broken(broken.Hyper(**HYPER), (1, 8)).double(), build())
    assert name in {result.name for result in report.failed}, str(report)
