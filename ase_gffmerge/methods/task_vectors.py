r"""Methods that add task vectors to the base, as they are or edited: task arithmetic, TIES, DARE and EMR-Merging.

Task arithmetic: the base plus a multiple of the sum of the task vectors.

.. math:: w = w_0 + \lambda \sum_k \tau_k

(Ilharco et al., "Editing models with task arithmetic", arXiv 2212.04089). At :math:`\lambda = 1/K` this is the mean.

TIES: task vectors trimmed, their signs elected, and the mean of those that agree.

====================================================  ==========================
equation (arXiv 2306.01708, algorithm 1)              function
====================================================  ==========================
keep the largest entries of every task vector         :func:`trim`
:math:`\gamma = \mathrm{sgn} \sum_k \hat\tau_k`       :func:`elect_signs`
mean over the k with :math:`\mathrm{sgn}\,\hat\tau_k = \gamma`  :func:`disjoint_mean`
:math:`w = w_0 + \lambda\,\tau`                       :func:`ties`
====================================================  ==========================

DARE: entries of the task vectors dropped at random, the others rescaled, then task arithmetic.

.. math:: \tilde\tau_k = \frac{m_k \odot \tau_k}{1 - p},\qquad m_k \sim \mathrm{Bernoulli}(1 - p)

(Yu et al., arXiv 2311.03099), so that the expectation of :math:`\tilde\tau_k` is :math:`\tau_k`. The random numbers of a
specialist are drawn from a seed of its own, made of its weights: the order of the specialists does not matter, and all
drop rates see the same numbers.

EMR-Merging: one elected task vector, and a binary mask and a factor per specialist.

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

import math

import torch
from torch import Tensor

from ase_gffmerge.merging.disagreement import DisagreementMetric
from ase_gffmerge.merging.weight_space import weighted_mean
from ase_gffmerge.methods.base import MergeInputs, MergeOutput, Requirement, method
from ase_gffmerge.methods.weight_space import grid_of, tune, weight_space
from ase_gffmerge.models import Potential
from ase_gffmerge.runtime.progress import Progress

MULTIPLES = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0)
"""Values of K λ that are tried."""


@method(
    "task_arithmetic",
    citation="Ilharco et al., arXiv 2212.04089",
    needs=(Requirement.FRAMES, Requirement.BASE),
)
def task_arithmetic(merge_inputs: MergeInputs, progress: Progress) -> MergeOutput:
    """Task arithmetic with λ of least disagreement."""
    space = weight_space(merge_inputs)
    scales = [share / len(space.specialists) for share in MULTIPLES]

    def build(scale: float) -> Potential:
        return space.potential(space.task_arithmetic(scale))

    with torch.no_grad():
        metric = DisagreementMetric.of(space.specialists)
        return tune(build, grid_of(scale=scales), metric, progress=progress).merge_output()


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
    space = weight_space(merge_inputs)

    def build(density: float, scale: float) -> Potential:
        trimmed = trim(space.task_vectors, space.known, density=density)
        return space.potential(space.origin + scale * disjoint_mean(trimmed, elect_signs(trimmed)))

    with torch.no_grad():
        metric = DisagreementMetric.of(space.specialists)
        grid = grid_of(density=DENSITIES, scale=SCALES)
        return tune(build, grid, metric, progress=progress).merge_output()


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
    space = weight_space(merge_inputs)
    noise = torch.stack([_noise(s.fingerprint, space.origin) for s in merge_inputs.specialists])
    scales = [share / len(space.specialists) for share in SHARES]

    def build(rate: float, scale: float) -> Potential:
        dropped = drop_and_rescale(space.task_vectors, noise, rate=rate)
        return space.potential(space.origin + scale * dropped.sum(0))

    with torch.no_grad():
        metric = DisagreementMetric.of(space.specialists)
        return tune(build, grid_of(rate=RATES, scale=scales), metric, progress=progress).merge_output()


def _noise(fingerprint: str, like: Tensor) -> Tensor:
    """Uniform random numbers shaped like a vector, from a hexadecimal fingerprint; the same on every device."""
    generator = torch.Generator().manual_seed(int(fingerprint[:15], 16))
    return torch.rand(like.shape, generator=generator, dtype=like.dtype).to(like.device)


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
    space = weight_space(merge_inputs)
    progress(0.5, "election")
    kept = masked_and_rescaled(space.task_vectors, elect_task_vector(space.task_vectors))
    return MergeOutput(
        potentials=tuple(
            space.potential(space.origin + task_vector, references_of=k) for k, task_vector in enumerate(kept)
        )
    )
