"""Evaluation of a force field that does not change, as fast as the machine allows."""

from dataclasses import replace

from torch import Tensor

from ase_gffmerge.forcefield.force_field import ForceField
from ase_gffmerge.graphs import Prediction
from ase_gffmerge.graphs.graph import AtomGraph
from ase_gffmerge.inference.compiled import Compile, CompiledPotential
from ase_gffmerge.inference.predict import predict_graded


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
        self._graded = replace(force_field, potential=force_field.potential.for_inference())
        self._bare = replace(self._graded, extrapolation_grade=None)
        self._compiled = CompiledPotential(force_field.potential, compile=compile)

    def __call__(self, graph: AtomGraph, *, graded: bool = True) -> tuple[Prediction, Tensor | None]:
        """Prediction and grades (n_atoms,) as :func:`~ase_gffmerge.inference.predict.predict_graded` gives them.

        Grades are ``None`` when they are not wanted (``graded``), or there is no gauge.
        """
        compiled, force_field = self._compiled(graph), self._graded if graded else self._bare
        if compiled is None:
            return predict_graded(force_field, graph)
        (prediction, scalars), extrapolation_grade = compiled, force_field.extrapolation_grade
        return prediction, None if extrapolation_grade is None else extrapolation_grade(
            scalars, graph.atomic_numbers
        )
