"""A specialist's calibration frames in batches, with its own node states and those of the growing merged model."""

from collections.abc import Sequence
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
    """What one specialist knows.

    Attributes
    ----------
    specialist, index, weight
        Whose territory, its specialist index, and how much it counts.
    scenes
        Its calibration frames, or as many of them as the layers need, in batches.
    """

    specialist: ForceField
    index: int
    weight: float
    scenes: list[CalibrationBatch]

    @cached_property
    def mean_square_force(self) -> float:
        """Mean square of the specialist's force components on its frames, (eV/Å)^2."""
        forces = [predict(self.specialist.potential, scene.graph).forces for scene in self.scenes]
        return max(float(torch.cat(forces).double().square().mean()), 1e-12)


MAX_EDGES, EDGES_PER_ATOM = 12_000, 24
"""Size of a batch, where an atom counts as that many edges at least: memory, and what a stage's correction is taken from."""

MAX_SCENES = 4
"""Batches per specialist: far more rows than a layer has coefficients. The readout sees all frames."""


def build_calibration(
    specialists: Sequence[ForceField], merged: Potential, weights: Sequence[float], *, probes: int
) -> list[CalibrationSet]:
    """Build graphs of calibration frames, in shuffled batches up to :data:`MAX_SCENES`, and embed them in both models."""
    calibration_sets = []
    for k, (specialist, weight) in enumerate(zip(specialists, weights, strict=True)):
        order = np.random.default_rng(0).permutation(len(specialist.calibration))
        graphs = [_graph(specialist, k, specialist.calibration[i]) for i in order]
        batches = islice(chunks(graphs, MAX_EDGES, size=_size), MAX_SCENES)
        scenes = [_scene(specialist, merged, batch, probes=probes) for batch in batches]
        calibration_sets.append(CalibrationSet(specialist, k, weight, scenes))
    return calibration_sets


def _graph(specialist: ForceField, index: int, atoms: Atoms) -> AtomGraph:
    graph = build_graph(atoms, specialist.cutoff, dtype=specialist.potential.dtype)
    return replace(graph, specialist=torch.full_like(graph.specialist, index))


def _size(graph: AtomGraph) -> int:
    return max(graph.n_edges, EDGES_PER_ATOM * len(graph))


def _scene(
    specialist: ForceField, merged: Potential, graphs: Sequence[AtomGraph], *, probes: int
) -> CalibrationBatch:
    potential = specialist.potential
    batch = batch_graphs(graphs).to(potential.device)
    positions = Dual((batch.positions,), (_displacements(batch.positions, probes),) if probes else ())

    geometry = pushforward(lambda r: potential.edge_functions(edge_vectors(batch, r)), positions)
    batch.edge_vectors = edge_vectors(batch)
    edges = potential.geometry(batch)
    ours, theirs = (_constant(model.embed(batch), probes) for model in (merged, potential))
    return CalibrationBatch(batch, edges, geometry, ours, theirs)


def _displacements(positions: Tensor, probes: int) -> Tensor:
    """Random displacements of all atoms (probes, n_atoms, 3), unit normal, the same whatever the order of specialists."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(probes, *positions.shape, generator=generator, dtype=torch.float64).to(positions)


def _constant(state: Tensors, probes: int) -> Dual:
    """A state that does not depend on the positions."""
    return Dual(tuple(state), tuple(x.new_zeros(probes, *x.shape) for x in state) if probes else ())
