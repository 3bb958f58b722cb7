"""Evaluation of a force field that does not change, as fast as the machine allows."""

from torch import Tensor

from ase_gffmerge.forcefield.force_field import ForceField
from ase_gffmerge.graphs import Prediction
from ase_gffmerge.graphs.derivatives import assemble
from ase_gffmerge.graphs.graph import AtomGraph, edge_vectors
from ase_gffmerge.inference.compiled import Compile, CompiledPotential


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
        self._evaluate = CompiledPotential(force_field.potential, compile=compile)
        self._grade = force_field.extrapolation_grade

    def __call__(self, graph: AtomGraph, *, graded: bool = True) -> tuple[Prediction, Tensor | None]:
        """Prediction and grades (n_atoms,) as :func:`~ase_gffmerge.inference.predict.predict_graded` gives them.

        Grades are ``None`` when they are not wanted (``graded``), or the force field has none.
        """
        vectors = edge_vectors(graph)
        prediction = assemble(graph, vectors, self._evaluate(vectors, graph))
        if self._grade is None or not graded:
            return prediction, None
        return prediction, self._grade(prediction.readout_inputs, graph.atomic_numbers)
