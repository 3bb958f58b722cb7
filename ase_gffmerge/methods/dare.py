r"""DARE: entries of the task vectors dropped at random, the others rescaled, then task arithmetic.

.. math:: \tilde\tau_k = \frac{m_k \odot \tau_k}{1 - p},\qquad m_k \sim \mathrm{Bernoulli}(1 - p)

(Yu et al., arXiv 2311.03099), so that the expectation of :math:`\tilde\tau_k` is :math:`\tau_k`. The random numbers of a
specialist are drawn from a seed of its own, made of its weights: the order of the specialists does not matter, and all
drop rates see the same numbers.
"""

import torch
from torch import Tensor

from ase_gffmerge.methods.base import MergeInputs, MergeOutput, Requirement, method
from ase_gffmerge.methods.grid_search import DisagreementMetric, grid_of, tune
from ase_gffmerge.methods.task_arithmetic import add_task_vectors
from ase_gffmerge.methods.weight_space import WeightSpace
from ase_gffmerge.models import Potential
from ase_gffmerge.runtime.progress import Progress

RATES = (0.1, 0.3, 0.5, 0.9)
SHARES = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
"""Values of p and of K λ that are tried."""


def drop_and_rescale(task_vectors: Tensor, noise: Tensor, *, rate: float) -> Tensor:
    """Drop a fraction ``rate`` < 1 of the entries and divide the others by 1 - ``rate``.

    Parameters
    ----------
    task_vectors : (K, P)
        Entries.
    noise : (K, P)
        Uniform between 0 and 1; an entry stays where it is at least ``rate``.
    """
    return torch.where(noise >= rate, task_vectors, 0.0) / (1 - rate)


@method("dare", citation="Yu et al., arXiv 2311.03099", needs=(Requirement.FRAMES, Requirement.BASE))
def dare(merge_inputs: MergeInputs, progress: Progress) -> MergeOutput:
    """DARE with drop rate and λ of least disagreement."""
    space = WeightSpace.of(merge_inputs)
    noise = torch.stack([_noise(s.fingerprint, space.origin) for s in merge_inputs.specialists])
    scales = [share / len(space.specialists) for share in SHARES]

    def build(rate: float, scale: float) -> Potential:
        dropped = drop_and_rescale(space.task_vectors, noise, rate=rate)
        return space.potential(add_task_vectors(space.origin, dropped, scale=scale))

    with torch.no_grad():
        metric = DisagreementMetric.of(space.specialists)
        return tune(build, grid_of(rate=RATES, scale=scales), metric, progress=progress).merge_output()


def _noise(fingerprint: str, like: Tensor) -> Tensor:
    """Uniform random numbers shaped like a vector, from a hexadecimal fingerprint; the same on every device."""
    generator = torch.Generator().manual_seed(int(fingerprint[:15], 16))
    return torch.rand(like.shape, generator=generator, dtype=like.dtype).to(like.device)
