r"""Task arithmetic: the base plus a multiple of the sum of the task vectors.

.. math:: w = w_0 + \lambda \sum_k \tau_k

(Ilharco et al., "Editing models with task arithmetic", arXiv 2212.04089). At :math:`\lambda = 1/K` this is the mean.
"""

import torch

from ase_gffmerge.merging.disagreement import DisagreementMetric
from ase_gffmerge.methods.base import MergeInputs, MergeOutput, Requirement, method
from ase_gffmerge.methods.weight_space import grid_of, tune, weight_space
from ase_gffmerge.models import Potential
from ase_gffmerge.runtime.progress import Progress

SHARES = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0)
"""Values of K λ that are tried."""


@method(
    "task_arithmetic",
    citation="Ilharco et al., arXiv 2212.04089",
    needs=(Requirement.FRAMES, Requirement.BASE),
)
def task_arithmetic(merge_inputs: MergeInputs, progress: Progress) -> MergeOutput:
    """Task arithmetic with λ of least disagreement."""
    space = weight_space(merge_inputs)
    scales = [share / len(space.specialists) for share in SHARES]

    def build(scale: float) -> Potential:
        return space.potential(space.task_arithmetic(scale))

    with torch.no_grad():
        metric = DisagreementMetric.of(space.specialists)
        return tune(build, grid_of(scale=scales), metric, progress=progress).merge_output()
