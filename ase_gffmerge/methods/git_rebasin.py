r"""Git Re-Basin by activation matching (Ainsworth, Hayase, Srinivasa, arXiv 2209.04836, section 3.1).

Networks that compute the same may differ by the order of their hidden channels, and then their mean is no good. For
every group of channels that may change places (:mod:`.channel_groups`) the order of each specialist is chosen such
that its activations resemble those of a reference specialist on the calibration frames of all:

.. math:: P_k = \arg\max_P \sum_l \bigl\langle P,\ S^{(l)}_{{\rm ref},k}\bigr\rangle ,

a linear assignment, summed over all layers l that the group enters. For the channels a of one specialist and b of another

.. math:: S^{(l)}_{ab} = \frac{\mathrm{cov}(x_a, x_b)}{(\sigma_a\,\sigma_b)^{p}}\,\bar v^{\,p-1}

with the mean variance :math:`\bar v` of all channels there, which puts layers into one unit. p = 0 is the covariance, the
paper's least-squares matching, p = 1 the correlation; p is chosen by the disagreement with the specialists on their
calibration frames. Components of vectors and tensors have no mean that survives a rotation, so theirs is not taken out.

The permuted specialists have the same energies and forces as before;
their mean is the merged potential. The reference is the specialist that all others resemble most, so the order in which
specialists are given does not matter.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ase_gffmerge.errors import IncompatibleSpecialistsError
from ase_gffmerge.forcefield.force_field import ForceField, symbols
from ase_gffmerge.graphs import batch_graphs, build_graph
from ase_gffmerge.graphs.graph import AtomGraph
from ase_gffmerge.merging.average import mean_potential
from ase_gffmerge.merging.disagreement import DisagreementMetric
from ase_gffmerge.merging.pruning import channel_moments
from ase_gffmerge.merging.recipe import PRESETS
from ase_gffmerge.methods.base import MergeInputs, MergeOutput, Requirement, method
from ase_gffmerge.methods.weight_space import aligned_copies, grid_of, tune
from ase_gffmerge.models.channel_groups import permuted
from ase_gffmerge.runtime.devices import chunks
from ase_gffmerge.runtime.progress import Progress

TIE = 1e-9
"""Bonus for a channel that stays where it is, where 1 is the similarity of a channel to itself."""

POWERS = (0.0, 0.5, 1.0)
"""Values of p that are tried."""

MAX_ATOMS = 500


DEAD = 1e-12
"""Channels whose variance is below this fraction of their mean square are constant, and resemble nothing."""

Similarities = Mapping[str, Tensor]
"""For every group the similarity (n_specialists, n_specialists, n_channels, n_channels) of channels."""


@method("git_rebasin", citation="Ainsworth et al., arXiv 2209.04836", needs=(Requirement.FRAMES,))
@torch.no_grad()
def git_rebasin(merge_inputs: MergeInputs, progress: Progress) -> MergeOutput:
    """Mean of the specialists after their hidden channels were brought into one order."""
    moved, settings = in_one_order(merge_inputs, progress)
    return MergeOutput(potentials=(mean_potential(moved, PRESETS["mean"]),), settings=settings)


@torch.no_grad()
def in_one_order(
    merge_inputs: MergeInputs, progress: Progress
) -> tuple[list[ForceField], dict[str, float | str]]:
    """Copies of the specialists that compute the same with their hidden channels in one order, and what was chosen."""
    specialists = aligned_copies(merge_inputs)
    progress(0.0, "activations on the frames of all specialists")
    graphs = [graph for specialist in _with_common_frames(specialists) for graph in _batches(specialist)]
    moments = channel_moments([specialist.potential for specialist in specialists], graphs)

    def moved(power: float) -> list[ForceField]:
        _, orders = matched_orders(similarities(moments, len(specialists), power=power))
        return [
            replace(specialist, potential=permuted(specialist.potential, order))
            for specialist, order in zip(specialists, orders, strict=True)
        ]

    trial = tune(
        lambda power: mean_potential(moved(power), PRESETS["mean"]),
        grid_of(power=POWERS),
        DisagreementMetric.of(specialists),
        progress=lambda x, text: progress(0.5 + 0.5 * x, text),
    )
    reference, orders = matched_orders(similarities(moments, len(specialists), **trial.settings))
    found: dict[str, float | str] = {
        "reference": specialists[reference].name,
        "moved": _fraction_moved(orders),
    }
    return moved(**trial.settings), found | dict(trial.settings)


def matched_orders(similarity: Similarities) -> tuple[int, list[dict[str, Tensor]]]:
    """Reference specialist, and the order of channels that makes each specialist resemble it.

    Returns
    -------
    reference
        The one whose channels find the best partners in all others.
    orders
        Per specialist and group the old place of each new channel.
    """
    n = len(next(iter(similarity.values())))
    candidates = [_orders_for(reference, similarity, n) for reference in range(n)]
    reference = max(range(n), key=lambda r: round(candidates[r][0], 6))
    return reference, candidates[reference][1]


def _orders_for(reference: int, similarity: Similarities, n: int) -> tuple[float, list[dict[str, Tensor]]]:
    """Summed similarity of all matched channels, and the orders that match them to a reference."""
    score = 0.0
    orders: list[dict[str, Tensor]] = [{} for _ in range(n)]
    for group, blocks in similarity.items():
        for k in range(n):
            matrix = blocks[reference, k].cpu()
            stay = TIE * torch.eye(len(matrix), dtype=matrix.dtype)
            rows, columns = linear_sum_assignment((matrix + stay).numpy(), maximize=True)
            orders[k][group] = torch.as_tensor(columns)
            score += float(matrix[rows, columns].sum())
    return score, orders


def _fraction_moved(orders: Sequence[Mapping[str, Tensor]]) -> float:
    """Fraction of all channels that are not where they were."""
    moved = torch.cat([order != torch.arange(len(order)) for groups in orders for order in groups.values()])
    return float(moved.double().mean())


def _batches(specialist: ForceField) -> Iterator[AtomGraph]:
    """Calibration frames in batches."""
    potential = specialist.potential
    for frames in chunks(specialist.calibration, MAX_ATOMS):
        graphs = [build_graph(atoms, specialist.cutoff, dtype=potential.dtype) for atoms in frames]
        yield batch_graphs(graphs).to(potential.device)


def _with_common_frames(specialists: Sequence[ForceField]) -> list[ForceField]:
    """Specialists with their calibration frames, cut down to the elements that all of them know."""
    common = set.intersection(*(set(s.species) for s in specialists))
    trimmed = []
    for specialist in specialists:
        kept = [atoms[np.isin(atoms.numbers, list(common))] for atoms in specialist.calibration]
        trimmed.append(specialist.with_calibration([atoms for atoms in kept if len(atoms)]))
    if not any(specialist.calibration for specialist in trimmed):
        names = "; ".join(f"{s.name} knows {symbols(s.species)}" for s in specialists)
        raise IncompatibleSpecialistsError(
            f"git_rebasin compares the specialists on the same atoms, but they share no element ({names}); "
            "use a method that does not compare them"
        )
    return trimmed


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
