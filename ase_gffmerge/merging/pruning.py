r"""Which blocks and channels a smaller potential keeps of a larger one: column subset selection on what its layers read.

A group of channels (:mod:`ase_gffmerge.models.channel_groups`) is read by layers at several places. With the moments
:math:`M = \sum_p X_p^\top X_p / \langle X_p^2\rangle` of all places p, the greedy choice takes in every step the channel
that explains most of what is left, :math:`\arg\max_j |M_j|^2 / M_{jj}`, and takes its share out,
:math:`M \to M - M_j M_j^\top / M_{jj}`: a pivoted Cholesky factorisation with look-ahead. What remains of the trace is the
share of the activations that no linear map of the kept channels gives back.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any, Self

import torch
from torch import Tensor, nn

from ase_gffmerge.errors import RecipeError
from ase_gffmerge.graphs.graph import AtomGraph, edge_vectors
from ase_gffmerge.merging.calibration import layer_inputs
from ase_gffmerge.models import Potential, build_potential
from ase_gffmerge.models.affine_maps import layer_maps
from ase_gffmerge.models.channel_groups import (
    Channels,
    Ends,
    Places,
    channel_groups,
    places,
    renamed,
    write_channels,
)
from ase_gffmerge.models.layers.readout import RandomFeatureReadout


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


def _entering_rows(potential: Potential, graph: AtomGraph) -> dict[str, Tensor]:
    """Rows that enter every affine map (n_rows, d_in + 1); the last column is 1 for scalars, 0 for components."""
    rows = {}
    for name, x in layer_inputs(potential, lambda: potential(edge_vectors(graph), graph)).items():
        for affine_map in layer_maps(name, potential.get_submodule(name)):
            part = affine_map.rows(x).double()
            constant = torch.full_like(part[:, :1], float(len(part) == len(x)))
            rows[affine_map.name] = torch.cat([part, constant], dim=1)
    return rows


def group_moments(potential: Potential, graphs: Sequence[AtomGraph]) -> dict[str, Tensor]:
    """Moments (n_channels, n_channels) of every group, all places where it is read counting the same.

    Parameters
    ----------
    potential
        With a plain readout.
    graphs
        Batches of typical structures.
    """
    totals: dict[str, Tensor] = {}
    for group, moment in channel_moments([potential], graphs):
        own = moment[:-1, :-1]
        scaled = own / own.diagonal().mean().clamp(min=torch.finfo(own.dtype).tiny)
        totals[group] = totals.get(group, torch.zeros_like(own)) + scaled
    return totals


def column_subset(moments: Tensor, number: int) -> tuple[Tensor, float]:
    """Places (number,) of channels, ascending, and the share of the activations that their span leaves out.

    Parameters
    ----------
    moments : (n, n)
        Of all channels.
    number
        How many to keep.
    """
    left, chosen = moments.double().clone(), list[int]()
    total, floor = float(left.trace()), 1e-12 * float(left.trace())
    if number == len(left):
        return torch.arange(number), 0.0
    for _ in range(number):
        diagonal = left.diagonal()
        gain = torch.where(diagonal > floor, left.square().sum(dim=0) / diagonal.clamp(min=floor), diagonal)
        gain[chosen] = -torch.inf
        best = int(gain.argmax())
        chosen.append(best)
        if diagonal[best] > floor:
            left = left - torch.outer(left[best], left[best]) / diagonal[best]
    return torch.tensor(sorted(chosen)), max(float(left.trace()), 0.0) / total if total else 0.0


def chosen_channels(
    potential: Potential, graphs: Sequence[AtomGraph], sizes: Mapping[str, int]
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Places of the channels that are kept of every group, and the share of it that is lost.

    Parameters
    ----------
    potential
        With a plain readout.
    graphs
        Batches of typical structures.
    sizes
        How many channels to keep of every group that is wanted.
    """
    found = {
        group: column_subset(moments.cpu(), sizes[group])
        for group, moments in group_moments(potential, graphs).items()
        if group in sizes
    }
    return {group: kept for group, (kept, _) in found.items()}, {
        group: lost for group, (_, lost) in found.items()
    }


@dataclass(frozen=True)
class Pruned:
    """The smaller potential with the weights of the kept channels.

    Attributes
    ----------
    student, teacher
        The smaller potential, and the larger one without a widened readout.
    blocks
        Kept blocks of the larger one.
    names
        For stages (and readouts of blocks) of the smaller one those of the larger one.
    kept, lost
        For every group the places of the kept channels, and the share of the activations that is lost.
    """

    student: Potential
    teacher: Potential
    blocks: tuple[int, ...]
    names: Mapping[str, str]
    kept: Places
    lost: Mapping[str, float]

    @classmethod
    def of(cls, teacher: Potential, graphs: Sequence[AtomGraph], sizes: Mapping[str, Any]) -> Self:
        """Choose blocks and channels.

        Parameters
        ----------
        teacher
            The larger potential.
        graphs
            Batches of typical structures.
        sizes
            Hyper-parameters of the smaller one.

        Raises
        ------
        RecipeError
            When they differ in more than numbers of channels and blocks.
        """
        plain = plain_potential(teacher)
        student = build_potential(plain.architecture, dict(sizes), plain.species)
        student = student.to(dtype=plain.dtype, device=plain.device).requires_grad_(False).eval()
        blocks = kept_blocks(plain, graphs, student.hyper.n_blocks)
        names = names_of_blocks(student, plain, blocks)
        _require_same_ends(student, plain, names)
        wanted = {renamed(group, names): n for group, n in channel_groups(student).sizes.items()}
        kept, lost = chosen_channels(plain, graphs, wanted)
        write_channels(student, plain, kept, names=names)
        return cls(student, plain, blocks, names, kept, lost)

    def outputs(self) -> dict[str, Tensor]:
        """For every map of the smaller potential the places of its outputs in the larger one."""
        ends = channel_groups(self.teacher).maps
        return {
            name: places(ends[renamed(name, self.names)].outputs, self.kept)
            for name in channel_groups(self.student).maps
        }

    def state(self, stage: str) -> list[Tensor]:
        """For every part of the state after a stage of the larger potential the places of the kept columns."""
        return [places(side, self.kept) for side in channel_groups(self.teacher).states[stage]]


def _require_same_ends(student: Potential, teacher: Potential, names: Mapping[str, str]) -> None:
    """Refuse another cutoff, and other numbers of what is no channel, such as radial functions."""

    def fixed(ends: Ends) -> list[Channels]:
        return [own for side in ends for own in side if own.group is None]

    theirs = channel_groups(teacher).maps
    same = all(
        fixed(ends) == fixed(theirs[renamed(name, names)])
        for name, ends in channel_groups(student).maps.items()
    )
    if not same or student.hyper.cutoff != teacher.hyper.cutoff:
        old, new = (own.hyper.to_dict() for own in (teacher, student))
        sizes = ("channels", "n_blocks")
        changed = ", ".join(
            f"{key} {old[key]} -> {new[key]}" for key in old if old[key] != new[key] and key not in sizes
        )
        raise RecipeError(
            f"a compression leaves channels and blocks out, and more would change here ({changed}); keep hyper to what "
            "grows with the channels, or teach a student of that size: gffmerge distill --student"
        )


def plain_potential(potential: Potential) -> Potential:
    """The same stages with the plain readout alone."""
    if not isinstance(potential.readout, RandomFeatureReadout):
        return potential
    plain = build_potential(potential.architecture, plain_hyper(potential), potential.species)
    plain.to(dtype=potential.dtype, device=potential.device)
    state = {
        name.replace("readout.mlp.", "readout."): value for name, value in potential.state_dict().items()
    }
    plain.load_state_dict({name: state[name] for name in plain.state_dict()})
    return plain.requires_grad_(False).eval()


def stages_by_block(potential: Potential) -> list[list[str]]:
    """Names of the stages of every block; what comes before the first one belongs to it."""
    found: list[list[str]] = [[]]
    for name, stage in potential.named_stages():
        found[-1].append(name)
        if stage.emits_scalars:
            found.append([])
    return [block for block in found if block]


def kept_blocks(potential: Potential, graphs: Sequence[AtomGraph], number: int) -> tuple[int, ...]:
    """First and last block, and of the others those that change the scalars most.

    Parameters
    ----------
    potential, graphs
        See :func:`group_moments`.
    number
        How many blocks to keep.
    """
    total = potential.hyper.n_blocks
    if number == total:
        return tuple(range(total))
    change = torch.zeros(total, dtype=torch.float64)
    for graph in graphs:
        scalars = [x.double() for x in potential.features(edge_vectors(graph), graph)]
        change[1:] += torch.stack(
            [(b - a).square().sum() / b.square().sum() for a, b in pairwise(scalars)]
        ).cpu()
    inner = sorted(range(1, total - 1), key=lambda i: -float(change[i]))[: number - 2]
    return tuple(sorted({0, *inner, total - 1}))


def names_of_blocks(student: Potential, teacher: Potential, blocks: Sequence[int]) -> dict[str, str]:
    """For stages and readouts of the blocks of a smaller potential the names of those that they come from.

    Parameters
    ----------
    student, teacher
        The smaller and the larger potential.
    blocks
        Kept blocks of the larger one.
    """
    theirs = stages_by_block(teacher)
    kept = [theirs[block] for block in blocks]
    names = dict(zip(chain(*stages_by_block(student)), chain(*kept), strict=True))
    for name, module in teacher.readout.named_children():
        if isinstance(module, nn.ModuleList) and len(module) == len(theirs):
            names |= {f"readout.{name}.{i}": f"readout.{name}.{block}" for i, block in enumerate(blocks)}
    return names


def plain_hyper(potential: Potential) -> dict[str, Any]:
    """Hyper-parameters of the same potential without a widened readout."""
    plain = {"readout_width": 0, "readout_blocks": 1, "readout_groups": 0, "readout_inputs": 0}
    return potential.hyper.to_dict() | plain
