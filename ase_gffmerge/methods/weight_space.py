"""Copies of the specialists that a method may change, and hyper-parameters chosen without labels.

Hyper-parameters are chosen by disagreement with the specialists on their own calibration frames
(:mod:`ase_gffmerge.merging.disagreement`): no labels, no test frames.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import torch

from ase_gffmerge.forcefield.force_field import ForceField
from ase_gffmerge.merging.average import align_references, working_copies
from ase_gffmerge.merging.disagreement import DisagreementMetric
from ase_gffmerge.merging.weight_space import WeightSpace
from ase_gffmerge.methods.base import MergeInputs, MergeOutput
from ase_gffmerge.models import Potential
from ase_gffmerge.runtime.progress import Progress


def aligned_copies(merge_inputs: MergeInputs) -> list[ForceField]:
    """Copies of the specialists on the device of the inputs, in one precision and on one zero of energy."""
    specialists = working_copies(merge_inputs.specialists, merge_inputs.device)
    with torch.no_grad():
        align_references(specialists)
    return specialists


def weight_space(merge_inputs: MergeInputs) -> WeightSpace:
    """Weights of copies of the specialists, and those of their base if it is at hand."""
    return WeightSpace.of(aligned_copies(merge_inputs), merge_inputs.base)


Settings = Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One choice of hyper-parameters.

    Attributes
    ----------
    settings
        The hyper-parameters.
    potential
        What they make.
    disagreement
        D, see the module.
    """

    settings: Settings
    potential: Potential
    disagreement: float

    def merge_output(self) -> MergeOutput:
        """The potential with its settings, as a method returns it."""
        return MergeOutput(potentials=(self.potential,), settings=dict(self.settings))


def tune(
    build: Callable[..., Potential],
    grid: Sequence[Settings],
    metric: DisagreementMetric,
    *,
    progress: Progress,
) -> Trial:
    """Try every point of a grid and keep the one of least disagreement, the first one among equals.

    Parameters
    ----------
    build
        Makes a potential from settings given as keyword arguments.
    grid
        Settings to try, at least one.
    metric
        Measures what they make.
    progress
        Called with a fraction (0 to 1) and the settings.
    """

    def trials() -> Iterator[Trial]:
        """One after the other, since only the best so far is kept."""
        for i, settings in enumerate(grid):
            progress(i / len(grid), ", ".join(f"{name} {value:g}" for name, value in settings.items()))
            potential = build(**settings)
            yield Trial(settings=settings, potential=potential, disagreement=metric.disagreement(potential))

    return min(trials(), key=lambda trial: trial.disagreement)


def grid_of(**values: Sequence[float]) -> list[Settings]:
    """All combinations of the values of several settings."""
    return [dict(zip(values, choice, strict=True)) for choice in product(*values.values())]
