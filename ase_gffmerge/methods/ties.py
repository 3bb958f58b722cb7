r"""TIES: task vectors trimmed, their signs elected, and the mean of those that agree.

====================================================  ==========================
equation (arXiv 2306.01708, algorithm 1)              function
====================================================  ==========================
keep the largest entries of every task vector         :func:`trim`
:math:`\gamma = \mathrm{sgn} \sum_k \hat\tau_k`       :func:`elect_signs`
mean over the k with :math:`\mathrm{sgn}\,\hat\tau_k = \gamma`  :func:`disjoint_mean`
:math:`w = w_0 + \lambda\,\tau`                       :func:`ties`
====================================================  ==========================
"""

import math

import torch
from torch import Tensor

from ase_gffmerge.methods.base import MergeInputs, MergeOutput, Requirement, method
from ase_gffmerge.methods.grid_search import DisagreementMetric, grid_of, tune
from ase_gffmerge.methods.weight_space import WeightSpace, weighted_mean
from ase_gffmerge.models import Potential
from ase_gffmerge.runtime.progress import Progress

DENSITIES = (0.1, 0.2, 0.5, 0.8, 1.0)
SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
"""Values of the density and of λ that are tried."""


def trim(task_vectors: Tensor, known: Tensor, *, density: float) -> Tensor:
    """Set all but the largest entries of every task vector to zero.

    Parameters
    ----------
    task_vectors, known : (K, P)
        Entries, and whether they belong to the specialist at all.
    density
        Fraction of the known entries that is kept (rounded up; entries as large as the last one stay too).
    """
    kept = [math.ceil(density * int(row.sum())) for row in known]
    sizes = task_vectors.abs()
    least = [row.kthvalue(len(row) - n + 1).values for row, n in zip(sizes, kept, strict=True)]
    return torch.where(sizes >= torch.stack(least)[:, None], task_vectors, 0.0)


def elect_signs(task_vectors: Tensor) -> Tensor:
    """Sign (P,) of the larger total among task vectors (K, P); zero where they cancel."""
    return task_vectors.sum(0).sign()


def disjoint_mean(task_vectors: Tensor, signs: Tensor) -> Tensor:
    """Mean (P,) of the non-zero entries of task vectors (K, P) that have the elected sign; zero where none has."""
    return weighted_mean(task_vectors, task_vectors * signs > 0)


@method("ties", citation="Yadav et al., arXiv 2306.01708", needs=(Requirement.FRAMES, Requirement.BASE))
def ties(merge_inputs: MergeInputs, progress: Progress) -> MergeOutput:
    """TIES with density and λ of least disagreement."""
    space = WeightSpace.of(merge_inputs)

    def build(density: float, scale: float) -> Potential:
        trimmed = trim(space.task_vectors, space.known, density=density)
        return space.potential(space.origin + scale * disjoint_mean(trimmed, elect_signs(trimmed)))

    with torch.no_grad():
        metric = DisagreementMetric.of(space.specialists)
        grid = grid_of(density=DENSITIES, scale=SCALES)
        return tune(build, grid, metric, progress=progress).merge_output()
