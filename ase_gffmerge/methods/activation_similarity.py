r"""How much the hidden channels of several specialists resemble each other on the same atoms.

For the channels a of one specialist and b of another, where a group of channels (:mod:`.permutation_symmetry`) enters
layer l,

.. math:: S^{(l)}_{ab} = \frac{\mathrm{cov}(x_a, x_b)}{(\sigma_a\,\sigma_b)^{p}}\,\bar v^{\,p-1}

with the mean variance :math:`\bar v` of all channels there, which puts layers into one unit. p = 0 is the covariance, p = 1
the correlation. Components of vectors and tensors have no mean that survives a rotation, so theirs is not taken out.
Second moments are all one needs, and they add up over batches.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ase_gffmerge.graphs.graph import AtomGraph, edge_vectors
from ase_gffmerge.merging.activations import layer_inputs
from ase_gffmerge.methods.permutation_symmetry import channel_groups
from ase_gffmerge.models import Potential
from ase_gffmerge.models.affine_maps import layer_maps

DEAD = 1e-12
"""Channels whose variance is below this fraction of their mean square are constant, and resemble nothing."""

Similarities = Mapping[str, Tensor]
"""For every group the similarity (n_specialists, n_specialists, n_channels, n_channels) of channels."""


def channel_moments(potentials: Sequence[Potential], graphs: Sequence[AtomGraph]) -> list[tuple[str, Tensor]]:
    """Second moments of all channels of all specialists together, for every place where a group enters a layer.

    Parameters
    ----------
    potentials
        One per specialist, of one architecture.
    graphs
        Batches with edge vectors, of elements that all of them know.

    Returns
    -------
    list of (group, moments)
        Moments (K c + 1, K c + 1) of the c channels of K specialists; the last row belongs to the constant 1.
    """
    maps = channel_groups(potentials[0]).maps
    totals: dict[tuple[str, int], Tensor] = {}
    for graph in graphs:
        entering = [_entering_rows(potential, graph) for potential in potentials]
        for name, ends in maps.items():
            sizes = [channels.size for channels in ends.inputs]
            parts = zip(*(rows[name].split([*sizes, 1], dim=1) for rows in entering), strict=True)
            *blocks, ones = (torch.stack(part, dim=1) for part in parts)
            for i, block in enumerate(blocks):
                z = torch.cat([block.flatten(1), ones[:, 0]], dim=1)
                totals[name, i] = z.T @ z + totals.get((name, i), 0.0)
    groups = {(name, i): maps[name].inputs[i].group for name, i in totals}
    return [(group, totals[place]) for place, group in groups.items() if group is not None]


def similarities(moments: Sequence[tuple[str, Tensor]], n: int, *, power: float) -> Similarities:
    """Similarity of the channels of ``n`` specialists, summed over the places of each group.

    Parameters
    ----------
    moments
        From :func:`channel_moments`.
    n
        Number of specialists.
    power
        p, from covariances (0) to correlations (1).
    """
    totals: dict[str, Tensor] = {}
    for group, moment in moments:
        totals[group] = _similarity(moment, n, power) + totals.get(group, 0.0)
    return totals


def _entering_rows(potential: Potential, graph: AtomGraph) -> dict[str, Tensor]:
    """Rows that enter every affine map (n_rows, d_in + 1); the last column is 1 for scalars, 0 for components."""
    rows = {}
    for name, x in layer_inputs(potential, lambda: potential(edge_vectors(graph), graph)).items():
        for affine_map in layer_maps(name, potential.get_submodule(name)):
            part = affine_map.rows(x).double()
            constant = torch.full_like(part[:, :1], float(len(part) == len(x)))
            rows[affine_map.name] = torch.cat([part, constant], dim=1)
    return rows


def _similarity(moment: Tensor, n: int, power: float) -> Tensor:
    square, total, count = moment[:-1, :-1], moment[:-1, -1], moment[-1, -1]
    covariance = square - torch.outer(total, total) / count.clamp(min=1)
    variance = covariance.diagonal()
    alive = variance > DEAD * square.diagonal()
    variance = torch.where(alive, variance, torch.inf)
    typical = variance[alive].mean() if alive.any() else torch.ones_like(count)
    scale = (variance / typical).pow(-power / 2) / typical.sqrt() * alive
    size = len(square) // n
    return (scale[:, None] * covariance * scale).reshape(n, size, n, size).transpose(1, 2)
