"""Predictions of a force field and where it extrapolates: a grade per atom from the features of the same forward pass."""

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
        On the device of the force field.

    Returns
    -------
    Tensor or None
        (n_atoms,), where 1 is the edge of the calibration set; ``None`` when the force field has no grade.
    """
    if force_field.extrapolation_grade is None:
        return None
    features = force_field.potential.features(edge_vectors(graph), graph)
    return force_field.extrapolation_grade(features, graph.atomic_numbers)


def predict_graded(force_field: ForceField, graph: AtomGraph) -> tuple[Prediction, Tensor | None]:
    """Energies, forces and strain derivatives, with the grades (n_atoms,) of the same forward pass if there are any."""
    prediction, grade = predict(force_field.potential, graph), force_field.extrapolation_grade
    return prediction, None if grade is None else grade(prediction.readout_inputs, graph.atomic_numbers)
