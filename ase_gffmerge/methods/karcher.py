r"""Karcher mean: the Riemannian centre of the specialists' weights, tensor by tensor.

Every weight tensor is a direction on the unit sphere and a length. The directions are averaged on the sphere, where the
centre :math:`\mu` of :math:`u_1,\dots,u_K` is the point at which the tangents towards them cancel,

.. math::

   \sum_k \log_\mu(u_k) = 0,\qquad
   \log_\mu(u) = \frac{\theta}{\sin\theta}\,(u - \mu\cos\theta),\quad \cos\theta = \mu\cdot u ,

found by steps :math:`\mu \leftarrow \exp_\mu\bigl(\tfrac1K\sum_k \log_\mu(u_k)\bigr)`; the lengths are averaged as numbers
(Karcher, Comm. Pure Appl. Math. 30, 509 (1977); for merging: the method ``karcher`` of mergekit).
"""

import torch
from torch import Tensor

from ase_gffmerge.merging.weight_space import weighted_mean
from ase_gffmerge.methods.base import MergeInputs, MergeOutput, method
from ase_gffmerge.methods.weight_space import weight_space
from ase_gffmerge.runtime.progress import Progress

MAX_STEPS, TOLERANCE = 100, 1e-12
"""Of the iteration, and the length of a step (radians) that ends it."""


def karcher_mean(vectors: Tensor) -> Tensor:
    """Centre (P,) of vectors (K, P): the centre of their directions on the sphere times the mean of their lengths.

    Vectors of length zero have no direction and count only for the length; directions that cancel have no centre, and the
    plain mean is returned.
    """
    lengths = vectors.norm(dim=1)
    directions = vectors[lengths > 0] / lengths[lengths > 0, None]
    plain = vectors.mean(0)
    center = directions.mean(0) if len(directions) else plain
    if center.norm() < 1e-8:
        return plain
    center = center / center.norm()
    for _ in range(MAX_STEPS):
        step = _log(center, directions).mean(0)
        angle = step.norm()
        if angle < TOLERANCE:
            break
        center = torch.cos(angle) * center + torch.sin(angle) * step / angle
        center = center / center.norm()
    return lengths.mean() * center


def _log(center: Tensor, directions: Tensor) -> Tensor:
    """Tangents (K, P) at the centre that lead to the directions (K, P)."""
    cosines = (directions @ center).clamp(-1.0, 1.0)[:, None]
    across = directions - cosines * center
    sines = across.norm(dim=1, keepdim=True)
    angles = torch.atan2(sines, cosines)
    return across * torch.where(sines > 0, angles / sines.clamp(min=1e-300), 1.0)


@method("karcher", citation="Karcher, 1977; mergekit")
def karcher(merge_inputs: MergeInputs, progress: Progress) -> MergeOutput:
    """Karcher mean of every weight tensor; a weight that some specialists do not know is filled in by the others' mean."""
    space = weight_space(merge_inputs)
    vectors = torch.where(space.known, space.vectors, weighted_mean(space.vectors, space.known))
    sizes = [parameter.numel() for parameter in space.potential(vectors[0]).parameters()]
    centers = []
    for i, part in enumerate(vectors.split(sizes, dim=1)):
        progress(i / len(sizes), f"tensor {i + 1} of {len(sizes)}")
        centers.append(karcher_mean(part))
    return MergeOutput(potentials=(space.potential(torch.cat(centers)),))
