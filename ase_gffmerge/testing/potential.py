"""What the merge and the calculator rely on in an architecture, as a series of checks."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
import torch
from ase import Atoms
from ase.data import covalent_radii
from torch import Tensor

from ase_gffmerge.graphs import build_graph, predict
from ase_gffmerge.graphs.graph import AtomGraph, batch_graphs, edge_vectors
from ase_gffmerge.models import Potential
from ase_gffmerge.models.base import Stage, State
from ase_gffmerge.testing.calculator.harness import (
    NotApplicable,
    check,
    derivative,
    deviation,
    require,
    run_check,
)
from ase_gffmerge.testing.calculator.robustness import global_state
from ase_gffmerge.testing.report import CheckReport

STEP = 1e-3  # Å, of central differences
CLUSTER = 7  # atoms


@dataclass(frozen=True, kw_only=True)
class PotentialSubject:
    """A potential under test, with a graph it can do.

    Attributes
    ----------
    potential
        In evaluation mode.
    graph
        In float64.
    tolerance
        Of energies in eV/atom and of forces in eV/Å.
    """

    potential: Potential
    graph: AtomGraph
    tolerance: float

    def energies(self, graph: AtomGraph) -> Tensor:
        """Per-atom energies (n_atoms,) of a graph."""
        with torch.no_grad():
            return self.potential(edge_vectors(graph), graph)[0]

    def compare(self, got: Tensor, expected: Tensor, what: str) -> str:
        """Largest difference, in words; fails beyond the tolerance.

        Parameters
        ----------
        got, expected : (n_atoms,)
            Energies in eV.
        what
            What was done, for the message.
        """
        gap = (got - expected).abs().max().item() if got.numel() else 0.0
        require(
            gap <= self.tolerance, f"{what} changes energies by {gap:.3g} eV (tolerance {self.tolerance:.1g})"
        )
        return f"to {gap:.1e} eV"


@check(3)
def energies_per_atom_in_float64(subject: PotentialSubject) -> None:
    """One float64 energy per atom, whatever the dtype of the weights: reference energies are large."""
    energies = subject.energies(subject.graph)
    shape, expected = tuple(energies.shape), (len(subject.graph),)
    require(shape == expected, f"the energies have shape {shape}, not {expected}")
    require(energies.dtype == torch.float64, f"the energies are {energies.dtype}, not float64")
    require(bool(energies.isfinite().all()), "an energy is not finite")


@check(9)
def atoms_without_neighbours(subject: PotentialSubject) -> None:
    """A graph without edges has finite energies that do not depend on positions, and no forces."""
    graph = _without_edges(subject.graph)
    require(bool(subject.energies(graph).isfinite().all()), "an isolated atom has no finite energy")
    prediction = predict(subject.potential, graph)
    require(not bool(prediction.forces.any()), "an isolated atom feels a force")


def _without_edges(graph: AtomGraph) -> AtomGraph:
    return replace(graph, edge_index=graph.edge_index[:, :0], shifts=graph.shifts[:0])


@check(9)
def geometry_enters_through_edge_vectors(subject: PotentialSubject) -> str:
    """Neither positions nor cell are read: strain, batches and other engines rely on it."""
    graph = subject.graph
    elsewhere = replace(graph, positions=graph.positions + 17.0, cell=3 * graph.cell)
    with torch.no_grad():
        energies, _ = subject.potential(edge_vectors(graph), elsewhere)
    return subject.compare(energies, subject.energies(graph), "another position and cell")


@check(11)
def hyper_parameters_and_weights_rebuild_it(subject: PotentialSubject) -> str:
    """Files hold hyper-parameters, species and a state dict, and nothing else."""
    old = subject.potential
    with torch.random.fork_rng(devices=[]):
        new = type(old)(type(old).Hyper(**old.hyper.to_dict()), old.species)
    new.to(device=old.device, dtype=old.dtype).load_state_dict(old.state_dict())
    frozen = new.eval().requires_grad_(False)  # the kernels that torch chooses depend on it
    again = PotentialSubject(potential=frozen, graph=subject.graph, tolerance=0.0)
    return again.compare(again.energies(subject.graph), subject.energies(subject.graph), "rebuilding")


@check(12)
def global_state_stays(subject: PotentialSubject) -> None:
    """A forward pass changes no dtype, random state or environment."""
    subject.energies(subject.graph)
    before = global_state()
    subject.energies(subject.graph)
    changed = [what for what, value in global_state().items() if value != before[what]]
    require(not changed, f"a forward pass changes {', '.join(changed)}")


@check(13)
def same_graph_same_bits(subject: PotentialSubject) -> None:
    """Two forward passes agree bitwise (on a CPU)."""
    first, second = (subject.energies(subject.graph) for _ in range(2))
    require(torch.equal(first, second), f"two passes differ by {(first - second).abs().max().item():.1e} eV")


@check(14)
def forces_are_the_gradient(subject: PotentialSubject) -> str:
    """Forces by autograd equal central differences of the energy."""
    forces = predict(subject.potential, subject.graph).forces
    chosen = sorted({0, len(forces) - 1})
    numerical, doubt = derivative(lambda step: _central_forces(subject, chosen, step), STEP)
    error = deviation(forces[chosen].cpu(), numerical)
    limit = 100 * subject.tolerance
    require(
        error <= limit + doubt,
        f"forces differ from central differences by {error:.3g} eV/Å (tolerance {limit:.1g} and {doubt:.1g} for the "
        "differences)",
    )
    return f"to {error:.1e} eV/Å"


def _central_forces(subject: PotentialSubject, atoms: Sequence[int], step: float) -> np.ndarray:
    """Forces (n_atoms, 3) on some atoms by central differences, eV/Å."""

    def energy(atom: int, axis: int, moved: float) -> float:
        positions = subject.graph.positions.clone()
        positions[atom, axis] += moved
        return subject.energies(replace(subject.graph, positions=positions)).sum().item()

    return np.array(
        [[(energy(i, k, -step) - energy(i, k, step)) / (2 * step) for k in range(3)] for i in atoms]
    )


@check(15)
def rotations_and_reflections(subject: PotentialSubject) -> str:
    """Energies do not depend on the orientation, nor on handedness."""
    generator = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64))[0]
    turn = turn.to(subject.graph.positions.device)
    expected, details = subject.energies(subject.graph), []
    for matrix, what in ((turn, "an orthogonal map"), (-turn, "the inverted map")):
        graph = subject.graph
        graph = replace(graph, positions=graph.positions @ matrix, cell=graph.cell @ matrix)
        details.append(subject.compare(subject.energies(graph), expected, what))
    return ", ".join(details)


@check(15)
def order_of_atoms_and_edges(subject: PotentialSubject) -> str:
    """Permuting atoms permutes energies; permuting edges changes nothing."""
    graph, n = subject.graph, len(subject.graph)
    generator = torch.Generator().manual_seed(1)
    order = torch.randperm(n, generator=generator).to(graph.positions.device)
    edges = torch.randperm(graph.n_edges, generator=generator).to(graph.positions.device)
    shuffled = replace(
        graph,
        positions=graph.positions[order],
        atomic_numbers=graph.atomic_numbers[order],
        specialist=graph.specialist[order],
        edge_index=order.argsort()[graph.edge_index][:, edges],
        shifts=graph.shifts[edges],
    )
    return subject.compare(subject.energies(shuffled), subject.energies(graph)[order], "another order")


@check(15)
def structures_in_a_batch_are_strangers(subject: PotentialSubject) -> str:
    """Energies in a batch are those of the structures alone."""
    graph = subject.graph
    if graph.n_structures > 1:
        raise NotApplicable("the graph is a batch already")
    other = replace(graph, positions=graph.positions * 1.01)
    together = subject.energies(batch_graphs([graph, other]))
    return subject.compare(together, torch.cat([subject.energies(g) for g in (graph, other)]), "batching")


@check(15)
def nothing_happens_at_the_cutoff(subject: PotentialSubject) -> str:
    """A neighbour that arrives at the cutoff brings no energy."""
    cutoff, details = subject.potential.hyper.cutoff, []
    for numbers in combinations((subject.potential.species * 2)[:3], 2):
        pair = Atoms(numbers, [[0, 0, 0], [cutoff - 1e-6, 0, 0]])
        graph = build_graph(pair, cutoff).to(subject.graph.positions.device)
        require(graph.n_edges == 2, f"hyper.cutoff={cutoff} is not the radius of the graph")
        apart = subject.energies(_without_edges(graph))
        details.append(subject.compare(subject.energies(graph), apart, "a neighbour at the cutoff"))
    return ", ".join(details)


@check(0)
def stages_chain_up_to_the_energy(subject: PotentialSubject) -> str:
    """``features`` is the chain of stages that the merge walks along."""
    potential, graph = subject.potential, subject.graph
    vectors = edge_vectors(graph).to(potential.dtype)
    with torch.no_grad():
        scalars = [potential.scalars(after) for stage, _, after in _walk(subject) if stage.emits_scalars]
        require(bool(scalars), "no stage emits scalars")
        walked = potential.energies(scalars, vectors, graph)
        return subject.compare(walked, potential(vectors, graph)[0], "walking along the stages")


@check(0)
def stages_read_the_edges_to_an_atom(subject: PotentialSubject) -> str:
    """Features of some atoms need their own edges and the features of their neighbours alone: domains rely on it."""
    potential, graph = subject.potential, subject.graph
    if potential.decomposition != "stages":
        raise NotApplicable(f"its decomposition is {potential.decomposition!r}")
    n, nodes = (len(graph) + 1) // 2, potential.node_entries
    kept = (graph.edge_index[1] < n).nonzero()[:, 0]
    part = replace(graph, edge_index=graph.edge_index[:, kept], shifts=graph.shifts[kept])
    with torch.no_grad():
        geometry = potential.geometry(edge_vectors(part).to(potential.dtype), part)
        gaps = [0.0]
        for stage, before, after in _walk(subject):
            atoms = before[:nodes] if stage.gathers else tuple(x[:n] for x in before[:nodes])
            found = stage((*atoms, *(x[kept] for x in before[nodes:])), geometry)
            expected = (*(x[:n] for x in after[:nodes]), *(x[kept] for x in after[nodes:]))
            own = (*(x[:n] for x in found[:nodes]), *found[nodes:])
            gaps += [
                float((x - y).abs().max() / (1 + y.abs().max()))
                for x, y in zip(own, expected, strict=True)
                if y.numel()
            ]
    require(
        max(gaps) <= subject.tolerance,
        f"features differ by {max(gaps):.3g} where half of the atoms are left out",
    )
    return f"to {max(gaps):.1e} of the largest feature"


def _walk(subject: PotentialSubject) -> list[tuple[Stage, State, State]]:
    """Stages with the states before and after them."""
    potential, graph = subject.potential, subject.graph
    vectors = edge_vectors(graph).to(potential.dtype)
    steps = []
    with torch.no_grad():
        state, geometry = potential.embed(graph), potential.geometry(vectors, graph)
        for _, stage in potential.named_stages():
            after = stage(state, geometry)
            steps.append((stage, state, after))
            state = after
    return steps


CHECKS = (
    stages_chain_up_to_the_energy,
    stages_read_the_edges_to_an_atom,
    energies_per_atom_in_float64,
    atoms_without_neighbours,
    geometry_enters_through_edge_vectors,
    hyper_parameters_and_weights_rebuild_it,
    global_state_stays,
    same_graph_same_bits,
    forces_are_the_gradient,
    rotations_and_reflections,
    order_of_atoms_and_edges,
    structures_in_a_batch_are_strangers,
    nothing_happens_at_the_cutoff,
)


def check_potential(
    potential: Potential, structure: Atoms | AtomGraph | None = None, *, tolerance: float | None = None
) -> CheckReport:
    """Check that an architecture, for example one of your own, does what merging and serving rely on.

    The numbers are those of :func:`check_calculator`'s points; 0 is what the merge itself needs: a chain of stages.

    Parameters
    ----------
    potential
        It is not changed.
    structure
        Atoms it knows, or their graph in float64. Default: a small cluster of its elements.
    tolerance
        Of energies in eV/atom; forces may differ from central differences by 100 times that, in eV/Å. Default: 1e-9 for a
        potential in float64, else 1e-4.

    Examples
    --------
    >>> from ase_gffmerge.models import build_potential
    >>> potential = build_potential("painn", {"channels": 4, "n_blocks": 1}, (1, 8)).double()
    >>> check_potential(potential).passed
    True
    """
    frozen = copy.deepcopy(potential).eval().requires_grad_(False)
    if structure is None:
        structure = small_cluster(frozen)
    if tolerance is None:
        tolerance = 1e-9 if frozen.dtype == torch.float64 else 1e-4
    graph = build_graph(structure, frozen.hyper.cutoff) if isinstance(structure, Atoms) else structure
    subject = PotentialSubject(potential=frozen, graph=graph.to(frozen.device), tolerance=tolerance)
    results = tuple(run_check(function, subject) for function in CHECKS)
    return CheckReport(f"{type(potential).__name__} on {len(graph)} atoms", results)


def small_cluster(potential: Potential) -> Atoms:
    """Rattled corners of a cube of the potential's elements, all different ones if there are few.

    Atoms are as far apart as bonded ones of the largest of these elements, or half the cutoff if that is less.
    """
    species = potential.species
    spread = np.linspace(0, len(species) - 1, CLUSTER).round().astype(int)
    numbers = np.array(species)[spread if len(species) > CLUSTER else np.arange(CLUSTER) % len(species)]
    side = min(2 * covalent_radii[numbers].max(), potential.hyper.cutoff / 2)
    corners = side * np.indices((2, 2, 2)).reshape(3, -1).T[:CLUSTER]
    return Atoms(numbers, corners + 0.1 * side * np.random.default_rng(0).uniform(-1, 1, corners.shape))
