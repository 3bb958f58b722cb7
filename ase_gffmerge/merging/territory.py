"""A specialist's calibration frames in batches, with its own node states and those of the growing merged model."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from torch_geometric.data import Batch

from ase_gffmerge.evaluation.errors import chunks
from ase_gffmerge.graphs import batch_graphs, build_graph
from ase_gffmerge.graphs.batches import edge_vectors
from ase_gffmerge.models.potential import EdgeGeometry, Potential, State
from ase_gffmerge.specialist import Specialist


@dataclass
class Scene:
    """One batch of one specialist's frames, walked stage by stage.

    Attributes
    ----------
    graph
        The batch, with ``edge_vectors``.
    geometry
        Radial and angular functions (the same for all models).
    merged, target
        States of the merged model and of the specialist before the current stage.
    merged_scalars, target_scalars
        Scalars that the stages so far left for the readout.
    """

    graph: Batch
    geometry: EdgeGeometry
    merged: State
    target: State
    merged_scalars: list[Tensor]
    target_scalars: list[Tensor]


@dataclass
class Territory:
    """What one specialist knows: its potential and its scenes."""

    specialist: Specialist
    index: int
    weight: float
    scenes: list[Scene]


def survey(
    specialists: Sequence[Specialist], merged: Potential, weights: Sequence[float], *, max_atoms: int
) -> list[Territory]:
    """Build graphs of all calibration frames and embed them in both models."""
    return [
        Territory(specialist, k, weight, [_scene(specialist, k, merged, frames) for frames in chunks(specialist.calibration, max_atoms)])
        for k, (specialist, weight) in enumerate(zip(specialists, weights, strict=True))
    ]


def _scene(specialist: Specialist, index: int, merged: Potential, frames: Sequence) -> Scene:
    potential = specialist.potential
    graphs = [build_graph(atoms, specialist.cutoff, dtype=potential.dtype, specialist=index) for atoms in frames]
    for graph in graphs:
        graph.specialist.fill_(index)
    graph = batch_graphs(graphs).to(potential.device)
    graph.edge_vectors = edge_vectors(graph)
    return Scene(graph, potential.geometry(graph), merged.embed(graph), potential.embed(graph), [], [])
