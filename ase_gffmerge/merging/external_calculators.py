"""Merge the networks inside any ASE calculators, which evaluate their frames themselves while hooks watch the layers.

For force fields without an integration: their networks are merged as modules of any kind are (:mod:`.module_layers`), whose
examples are frames and which the calculators evaluate. Derivatives are differences between a frame and a displaced twin.
Corrections of whole blocks and a readout of random features need a potential that can be differentiated, and are not part
of it.
"""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.calculator import Calculator
from torch import nn

from ase_gffmerge.data.frames import bare
from ase_gffmerge.errors import FramesError, IncompatibleSpecialistsError
from ase_gffmerge.inference.predict import FramePredictions
from ase_gffmerge.integrations.base import adapters_by_architecture
from ase_gffmerge.merging.disagreement import disagreement
from ase_gffmerge.merging.module_calls import averaged_names, evaluating
from ase_gffmerge.merging.module_inputs import check_modules
from ase_gffmerge.merging.module_layers import ModuleProblem, align_modules
from ase_gffmerge.merging.module_views import average_into, own_modules
from ase_gffmerge.merging.report import Disagreement, LayerReport
from ase_gffmerge.runtime.progress import Progress, no_progress, part_of

MAX_ROWS = 4096
"""Rows of a layer that are kept of one frame, chosen at random."""

STEP = 0.01
"""Displacement of the twins in Å (standard deviation): large against round-off of float32, small against curvature."""

Module = Callable[[Any], nn.Module]  # of whichever class the calculator is


@dataclass(frozen=True, kw_only=True)
class HookedMerge:
    """Calculators merged into one.

    Attributes
    ----------
    calculator
        A copy of the first calculator with the merged weights.
    layers
        Least-squares problems in the order they were solved.
    averaged
        Parameters that no layer covers and that were averaged.
    disagreements
        How the mean and the merged calculator differ from each calculator on its frames.
    """

    calculator: Calculator
    layers: tuple[LayerReport, ...]
    averaged: tuple[str, ...]
    disagreements: tuple[Disagreement, ...]


def merge_calculators(
    calculators: Sequence[Calculator],
    calibration: Sequence[Sequence[Atoms]],
    *,
    module: Module,
    ridge: float = 1e-5,
    derivative_weight: float = 1.0,
    progress: Progress = no_progress,
) -> HookedMerge:
    """Merge fine-tuned networks that ASE calculators hold.

    Parameters
    ----------
    calculators
        At least two of one kind, which can be copied by :func:`copy.deepcopy`. They are not changed.
    calibration
        For each of them frames that it knows; labels are not used.
    module
        Finds the network in a calculator, for example ``lambda calc: calc.model``. Layers must be its submodules, called as
        modules, and take the same rows in the same order whenever a frame is evaluated.
    ridge
        Relative ridge, anchored at the mean of the weights.
    derivative_weight
        Weight of the derivatives against the values.
    progress
        Called with a fraction (0 to 1) and a description.

    Raises
    ------
    IncompatibleSpecialistsError
        For fewer than two calculators, or networks of different parameters.
    FramesError
        When a calculator has no frames.
    """
    adapters_by_architecture()  # whose modules register the layers of their packages
    networks = [module(calculator) for calculator in calculators]
    check_modules(networks)
    own_modules(networks, ())
    if len(calibration) != len(networks) or not all(calibration):
        raise FramesError(
            f"each of the {len(networks)} calculators needs frames that it knows; give one list of structures for each"
        )
    merged = deepcopy(calculators[0])
    target = module(merged)
    average_into(target, networks)
    mean = deepcopy(merged)
    holders = dict(zip(map(id, (*networks, target)), (*calculators, merged), strict=True))
    problem = ModuleProblem(
        models=networks,
        views=[target] * len(networks),
        examples=calibration,
        run=lambda network, atoms: evaluate(holders[id(network)], atoms),
        mask=lambda k, atoms: None,
        weights=[1.0] * len(networks),
        ridge=ridge,
        twin=lambda atoms, seed: twin(atoms, seed=seed),
        derivative_weight=derivative_weight,
        max_rows=MAX_ROWS,
    )
    with evaluating([*networks, target]):
        found = align_modules(problem, progress=part_of(progress, 0.0, 0.9))
    if not found.reached:
        raise IncompatibleSpecialistsError(
            "evaluating a frame called no layer that a merge knows; is this the network that the calculator evaluates, "
            "and not a compiled or copied one?"
        )
    progress(0.9, "report")
    disagreements = tuple(
        disagreement(f"{k}", kind, predictions(calculator, frames), reference)
        for k, (own, frames) in enumerate(zip(calculators, calibration, strict=True))
        for reference in [predictions(own, frames)]
        for kind, calculator in (("mean", mean), ("merged", merged))
    )
    progress(1.0, "done")
    return HookedMerge(
        calculator=merged,
        layers=found.reports,
        averaged=averaged_names(
            networks, target, reached=found.solved, recalibrated=found.recalibrated, own=()
        ),
        disagreements=disagreements,
    )


def evaluate(calculator: Calculator, atoms: Atoms) -> tuple[float, np.ndarray]:
    """Energy (eV) and forces (eV/Å), always computed anew."""
    copy = bare(atoms)
    calculator.reset()
    forces = calculator.get_property("forces", copy)
    return float(calculator.get_property("energy", copy)), np.array(forces)


def predictions(calculator: Calculator, frames: Sequence[Atoms]) -> FramePredictions:
    """Energies and forces of frames; stresses, which not every calculator has, are not asked for."""
    found = [evaluate(calculator, atoms) for atoms in frames]
    return FramePredictions(
        numbers=[atoms.numbers for atoms in frames],
        energies=np.array([energy for energy, _ in found]),
        forces=[forces for _, forces in found],
        stresses=[None] * len(found),
    )


def twin(atoms: Atoms, *, seed: int) -> Atoms:
    """Copy with all atoms displaced by about :data:`STEP`."""
    copy = bare(atoms)
    copy.rattle(STEP, seed=seed)
    return copy
