"""Where a force field extrapolates: a grade per atom from the features of a forward pass."""

from copy import copy

import torch
from torch import Tensor

from ase_gffmerge.forcefield.force_field import ForceField
from ase_gffmerge.graphs import Prediction, predict
from ase_gffmerge.graphs.graph import AtomGraph, edge_vectors


@torch.no_grad()
def grades(force_field: ForceField, graph: AtomGraph) -> Tensor | None:
    """Extrapolation grade of every atom of a graph or a batch of graphs.

    Parameters
    ----------
    force_field
        A force field with an extrapolation grade.
    graph
        On the device of the force field; it is not changed.

    Returns
    -------
    Tensor or None
        (n_atoms,), where 1 is the edge of the calibration set; ``None`` when the force field has no gauge.
    """
    if force_field.extrapolation_grade is None:
        return None
    graph = copy(graph)
    graph.edge_vectors = edge_vectors(graph).to(force_field.potential.dtype)
    return force_field.extrapolation_grade(force_field.potential.features(graph), graph.atomic_numbers)


def predict_graded(force_field: ForceField, graph: AtomGraph) -> tuple[Prediction, Tensor | None]:
    """Energies, forces and strain derivatives, with the grades (n_atoms,) of the same forward pass if there is a gauge.

    Geometry is in the type of the graph up to the edge vectors, whatever type the weights have: vectors far from the origin
    keep their digits, and forces sum to zero, also in float32.
    """
    potential, extrapolation_grade = force_field.potential, force_field.extrapolation_grade
    kept: list[Tensor] = []

    def energies(graph: AtomGraph) -> Tensor:
        graph.edge_vectors = graph.edge_vectors.to(potential.dtype)
        if extrapolation_grade is None:
            return potential(graph)
        scalars = potential.features(graph)
        kept.extend(x.detach() for x in scalars)
        return potential.energies(scalars, graph)

    prediction = predict(energies, graph)
    return prediction, None if extrapolation_grade is None else extrapolation_grade(
        kept, graph.atomic_numbers
    )
