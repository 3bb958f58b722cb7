r"""Orthogonal Procrustes: the hidden basis of every layer is turned before weights are averaged.

For two specialists, layer by layer with weights (d_out, d_in),

.. math:: W = a\,W_A P + (1-a)\,W_B ,\qquad P = U V^\top ,\qquad U S V^\top = \mathrm{svd}(W_A^\top W_B) ,

where P is the orthogonal matrix that takes :math:`W_A P` closest to :math:`W_B` (Schönemann, doi:10.1007/BF02289451).
More specialists are all turned to one reference, :math:`W = (1-a) W_{\rm ref} + \frac{a}{K-1}\sum_k W_k P_k`. The
reference and a are chosen by the disagreement with the specialists on their calibration frames.

The alignment is local to a layer, and not a change of basis of the network: a rotation of hidden channels would have to
be undone in the layer before, and the activations, gates and elementwise products of message passing networks commute
with permutations of channels (see :mod:`.git_rebasin`) but with no other rotation. Equivariance is kept, for in an
``o3.Linear`` P acts on the multiplicity index of one irrep. Layers that take the radial basis, which is no hidden basis
but the same in all specialists, and all biases and embeddings are averaged.
"""

from collections.abc import Sequence
from copy import deepcopy

import torch
from torch import Tensor

from ase_gffmerge.merging.average import mean_potential
from ase_gffmerge.merging.disagreement import DisagreementMetric
from ase_gffmerge.merging.recipe import PRESETS
from ase_gffmerge.methods.base import MergeInputs, MergeOutput, Requirement, method
from ase_gffmerge.methods.weight_space import aligned_copies, grid_of, tune
from ase_gffmerge.models import Potential
from ase_gffmerge.models.affine_maps import affine_maps
from ase_gffmerge.models.channel_groups import channel_groups
from ase_gffmerge.runtime.progress import Progress

SHARES = (0.25, 0.5, 0.75)
"""Values of a that are tried, beside the one that gives all specialists the same say."""


def turned(theta: Tensor, reference: Tensor) -> Tensor:
    r"""Turn the input basis of a map towards a reference.

    Parameters
    ----------
    theta, reference : (d_in, d_out)
        :math:`W_A^\top` and :math:`W_B^\top`.

    Returns
    -------
    Tensor
        :math:`(W_A P)^\top` (d_in, d_out), float64.
    """
    theta = theta.double()
    u, _, vt = torch.linalg.svd(theta @ reference.double().T)
    return (u @ vt).T @ theta


@method("procrustes", citation="Schönemann, doi:10.1007/BF02289451", needs=(Requirement.FRAMES,))
@torch.no_grad()
def procrustes(merge_inputs: MergeInputs, progress: Progress) -> MergeOutput:
    """Mean of weights whose input bases were turned, layer by layer, towards those of one specialist."""
    specialists = aligned_copies(merge_inputs)
    mean = mean_potential(specialists, PRESETS["mean"])

    def build(reference: float, share: float) -> Potential:
        return merge_turned(mean, [s.potential for s in specialists], reference=int(reference), share=share)

    equal_say = (len(specialists) - 1) / len(specialists)
    grid = grid_of(reference=range(len(specialists)), share=sorted({*SHARES, equal_say}))
    trial = tune(build, grid, DisagreementMetric.of(specialists), progress=progress)
    name = specialists[int(trial.settings["reference"])].name
    return MergeOutput(potentials=(trial.potential,), settings=dict(trial.settings) | {"reference": name})


def merge_turned(
    mean: Potential, potentials: Sequence[Potential], *, reference: int, share: float
) -> Potential:
    """The merged potential for one reference and one share of the others.

    Parameters
    ----------
    mean
        Of the specialists, for everything that is no affine map.
    potentials
        The specialists'.
    reference
        Which of them the others are turned to.
    share
        a, what the others count together.
    """
    merged = deepcopy(mean)
    ends = channel_groups(potentials[0]).maps
    maps = [affine_maps(potential) for potential in potentials]
    for name, affine_map in affine_maps(merged).items():
        if all(channels.group is None for channels in ends[name].inputs):
            continue
        theta = affine_map.read()
        d = len(theta) - affine_map.has_bias
        weights = [their[name].read()[:d].double() for their in maps]
        target = weights.pop(reference)
        others = torch.stack([turned(weight, target) for weight in weights]).mean(0)
        weight = share * others + (1 - share) * target
        affine_map.write(torch.cat([weight.to(theta), theta[d:]]))
    return merged
