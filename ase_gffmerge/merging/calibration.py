"""A specialist's calibration frames in batches, with its own node states and those of the growing merged model."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice

import numpy as np
import torch
from ase import Atoms
from torch import Tensor

from ase_gffmerge.forcefield.force_field import ForceField
from ase_gffmerge.graphs import batch_graphs, build_graph, predict
from ase_gffmerge.graphs.graph import AtomGraph, edge_vectors
from ase_gffmerge.merging.tangents import Dual, Tensors, pushforward
from ase_gffmerge.models.base import Geometry, Potential
from ase_gffmerge.runtime.batching import chunks


@dataclass
class CalibrationBatch:
    """One batch of one specialist's frames, walked stage by stage.

    Attributes
    ----------
    graph
        The batch.
    edges
        Edge indices; its parts that depend on the positions are replaced by those in ``geometry``.
    geometry
        These parts (the same for all models).
    merged, target
        States of the merged model and of the specialist before the current stage.
    merged_scalars, target_scalars
        Scalars that the stages so far left for the readout.
    """

    graph: AtomGraph
    edges: Geometry
    geometry: Dual
    merged: Dual
    target: Dual
    merged_scalars: list[Dual] = field(default_factory=list)
    target_scalars: list[Dual] = field(default_factory=list)

    def split(self, tensors: Tensors) -> tuple[Tensors, Geometry]:
        """Arguments of a stage from one tuple, a state followed by the parts of the geometry."""
        n = len(tensors) - len(self.geometry.value)
        return tensors[:n], self.edges.with_parts(tensors[n:])


@dataclass
class CalibrationSet:
    """All batches of one specialist.

    Attributes
    ----------
    specialist, index, weight
        Whose frames, its specialist index, and how much it counts.
    batches
        Its calibration frames, or as many of them as the layers need.
    """

    specialist: ForceField
    index: int
    weight: float
    batches: list[CalibrationBatch]

    @cached_property
    def mean_square_force(self) -> float:
        """Mean square of the specialist's force components on its frames, (eV/Å)^2."""
        forces = [predict(self.specialist.potential, batch.graph).forces for batch in self.batches]
        return max(float(torch.cat(forces).double().square().mean()), 1e-12)


MAX_EDGES, EDGES_PER_ATOM = 12_000, 24
"""Size of a batch, where an atom counts as that many edges at least: memory, and what a block's correction is taken from."""

MAX_BATCHES = 4
"""Batches per specialist: far more rows than a layer has coefficients. The readout sees all frames."""


def build_calibration(
    specialists: Sequence[ForceField], merged: Potential, weights: Sequence[float], *, directions: int
) -> list[CalibrationSet]:
    """Embed the calibration frames of all specialists in their own models and in the merged one.

    Parameters
    ----------
    specialists, weights
        Whose frames, and how much each counts.
    merged
        The merged model before its first stage is aligned.
    directions
        Random displacements of all atoms along which derivatives are taken.
    """
    return [
        CalibrationSet(specialist, k, weight, [_embedded(specialist, merged, g, directions) for g in graphs])
        for k, (specialist, weight) in enumerate(zip(specialists, weights, strict=True))
        for graphs in [calibration_graphs(specialist, index=k)]
    ]


def calibration_graphs(specialist: ForceField, *, index: int = 0) -> Iterator[AtomGraph]:
    """Graphs of a specialist's calibration frames in shuffled batches, up to :data:`MAX_BATCHES`, on its device."""
    order = np.random.default_rng(0).permutation(len(specialist.calibration))
    graphs = [_graph(specialist, index, specialist.calibration[i]) for i in order]
    for group in islice(chunks(graphs, MAX_EDGES, size=_size), MAX_BATCHES):
        yield batch_graphs(group).to(specialist.potential.device)


def _graph(specialist: ForceField, index: int, atoms: Atoms) -> AtomGraph:
    graph = build_graph(atoms, specialist.cutoff, dtype=specialist.potential.dtype)
    return replace(graph, specialist=torch.full_like(graph.specialist, index))


def _size(graph: AtomGraph) -> int:
    return max(graph.n_edges, EDGES_PER_ATOM * len(graph))


def _embedded(
    specialist: ForceField, merged: Potential, graph: AtomGraph, directions: int
) -> CalibrationBatch:
    potential = specialist.potential
    positions = Dual((graph.positions,), (_displacements(graph.positions, directions),) if directions else ())
    geometry = pushforward(lambda r: potential.edge_functions(edge_vectors(graph, r)), positions)
    ours, theirs = (_constant(model.embed(graph), directions) for model in (merged, potential))
    return CalibrationBatch(graph, potential.geometry(edge_vectors(graph), graph), geometry, ours, theirs)


def _displacements(positions: Tensor, n: int) -> Tensor:
    """Random displacements of all atoms (n, n_atoms, 3), unit normal, the same whatever the order of specialists."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, *positions.shape, generator=generator, dtype=torch.float64).to(positions)


def _constant(state: Tensors, directions: int) -> Dual:
    """A state that does not depend on the positions."""
    return Dual(tuple(state), tuple(x.new_zeros(directions, *x.shape) for x in state) if directions else ())
