r"""Predictions of a force field that does not change, the grade of extrapolation per atom, and how far specialists differ.

The grade comes from the features of the same forward pass (:mod:`ase_gffmerge.forcefield.leverage`). Disagreement is the
standard deviation of the forces of K specialists on an atom,

.. math:: \sigma_i = \sqrt{\frac1K \sum_k \lVert\mathbf F_{k,i} - \bar{\mathbf F}_i\rVert^2} .

Specialists that know different systems are no ensemble: inside the domain of only one of them they disagree although the
merged potential is good, and far from all of them they may err together. Their disagreement says whose domain an atom is
in rather than how good the merged potential is; for that there is the extrapolation grade.
"""

from collections.abc import Sequence

import numpy as np
import torch
from ase import Atoms
from torch import Tensor

from ase_gffmerge.errors import StructureError
from ase_gffmerge.forcefield.force_field import ForceField
from ase_gffmerge.graphs import Prediction, build_graph, predict
from ase_gffmerge.graphs.derivatives import assemble, differentiate
from ase_gffmerge.graphs.graph import AtomGraph, edge_vectors
from ase_gffmerge.inference.compiled import Compile, CompiledPotential


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


class Predictor:
    """Energies, forces, strain derivatives and grades of graphs; safe to call from several threads.

    Parameters
    ----------
    force_field
        Frozen, on its device; its weights are shared.
    compile
        Whether to compile, see :class:`~ase_gffmerge.inference.compiled.CompiledPotential`.
    """

    def __init__(self, force_field: ForceField, *, compile: Compile):
        compiled = CompiledPotential(force_field.potential, compile=compile)
        self._compiled = compiled if compiled.worthwhile else None
        self._eager = force_field.potential.for_inference()
        self._grade = force_field.extrapolation_grade

    def __call__(self, graph: AtomGraph, *, graded: bool = True) -> tuple[Prediction, Tensor | None]:
        """Prediction and grades (n_atoms,) as :func:`predict_graded` gives them.

        Grades are ``None`` when they are not wanted (``graded``), or the force field has none.
        """
        vectors = edge_vectors(graph)
        if self._compiled is None:
            derivatives = differentiate(self._eager, vectors, graph)
        else:
            derivatives = self._compiled(vectors, graph)
        prediction = assemble(graph, vectors, derivatives)
        if self._grade is None or not graded:
            return prediction, None
        return prediction, self._grade(prediction.readout_inputs, graph.atomic_numbers)


def force_disagreement(specialists: Sequence[ForceField], atoms: Atoms) -> np.ndarray:
    """Standard deviation of the specialists' forces, (n_atoms,) in eV/Å, over those that know all elements.

    Raises
    ------
    StructureError
        When fewer than two of them know all elements.
    """
    able = [s for s in specialists if set(atoms.numbers.tolist()) <= set(s.species)]
    if len(able) < 2:
        known = ", ".join(s.name for s in able) or "none"
        raise StructureError(
            f"disagreement needs two specialists that know every element of {atoms.get_chemical_formula()}, but only "
            f"{known} does; use the extrapolation grade instead"
        )
    forces = torch.stack([_forces(specialist, atoms) for specialist in able])
    return (forces - forces.mean(dim=0)).square().sum(dim=2).mean(dim=0).sqrt().numpy()


def _forces(specialist: ForceField, atoms: Atoms) -> torch.Tensor:
    """Forces (n_atoms, 3) of one specialist, which reads no specialist index."""
    bare = Atoms(atoms.numbers, positions=atoms.positions, cell=atoms.cell, pbc=atoms.pbc)
    graph = build_graph(bare, specialist.cutoff).to(specialist.potential.device)
    return predict_graded(specialist, graph)[0].forces.double().cpu()
