r"""EMR-Merging: one elected task vector, and a binary mask and a factor per specialist.

.. math::

   \tau_p = \gamma_p \max_{k:\,\mathrm{sgn}\,\tau_{k,p} = \gamma_p} |\tau_{k,p}|,\quad
   \gamma = \mathrm{sgn} \sum_k \tau_k,\qquad
   m_k = [\tau_k \odot \tau > 0],\quad
   \lambda_k = \frac{\sum |\tau_k|}{\sum |m_k \odot \tau|},\qquad
   w_k = w_0 + \lambda_k\, m_k \odot \tau

(Huang et al., arXiv 2405.17461, algorithm 1). Nothing is tuned. Which mask a
structure gets must be chosen by whose frames it resembles, so this is not one potential energy surface: a reference for
how much K masks can keep.
"""

import torch
from torch import Tensor

from ase_gffmerge.methods.base import MergeInputs, MergeOutput, Requirement, method
from ase_gffmerge.methods.ties import elect_signs
from ase_gffmerge.methods.weight_space import WeightSpace
from ase_gffmerge.runtime.progress import Progress


def elect_task_vector(task_vectors: Tensor) -> Tensor:
    """Elected signs times the largest size that has this sign (P,) of task vectors (K, P)."""
    signs = elect_signs(task_vectors)
    return signs * (task_vectors * signs).clamp(min=0).amax(0)


def masked_and_rescaled(task_vectors: Tensor, elected: Tensor) -> Tensor:
    """What is left of every task vector (K, P): the elected one (P,), masked by sign and rescaled to its mean size."""
    masked = (task_vectors * elected > 0) * elected
    sizes = masked.abs().sum(1, keepdim=True)
    return masked * task_vectors.abs().sum(1, keepdim=True) / torch.where(sizes > 0, sizes, 1.0)


@method("emr", citation="Huang et al., arXiv 2405.17461", needs=(Requirement.BASE,), per_specialist=True)
def emr(merge_inputs: MergeInputs, progress: Progress) -> MergeOutput:
    """EMR-Merging: one potential per specialist, all made of one task vector."""
    space = WeightSpace.of(merge_inputs)
    progress(0.5, "election")
    kept = masked_and_rescaled(space.task_vectors, elect_task_vector(space.task_vectors))
    return MergeOutput(
        potentials=tuple(
            space.potential(space.origin + task_vector, references_of=k) for k, task_vector in enumerate(kept)
        )
    )
