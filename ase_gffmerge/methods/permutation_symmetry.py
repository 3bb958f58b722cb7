r"""Which channels may change places without changing what a potential computes.

A permutation P of the channels between two maps, :math:`W_2\,\sigma(W_1 x) = (W_2 P^\top)\,\sigma(P W_1 x)`, is free
wherever nothing but elementwise products stands between them. Channels that meet in such a product must move together;
they form a *group*. Equivariance leaves the multiplicity index of an irrep to permute, never its components.

PaiNN has one group for the whole residual stream: the scalars :math:`s_c` and vectors :math:`v_c` of all blocks, the
filters, and :math:`U v`, :math:`V v` are tied by the sums over blocks and by the products :math:`a_c u_c` and
:math:`a_c \langle u_c, v_c\rangle`. The hidden layer of every two-layer network is a group of its own.

NequIP has no such stream, because its self-connection is a map as well: the features of order l after each block are a
group (a tensor is tied to its gate), so are the features of order l after ``linear_up`` (tied over all paths that start
from them through the weights of the radial network) and every hidden layer of the radial networks and of the readout.
"""

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import NamedTuple

import torch
from e3nn import o3
from torch import Tensor

from ase_gffmerge.errors import IncompatibleSpecialistsError
from ase_gffmerge.models import Potential
from ase_gffmerge.models.affine_maps import affine_maps
from ase_gffmerge.models.nequip import Interaction, natural
from ase_gffmerge.models.painn import Message


class Channels(NamedTuple):
    """Consecutive channels of one group; group ``None`` has a meaning of its own and stays where it is."""

    group: str | None
    size: int


class Ends(NamedTuple):
    """What enters and what leaves an affine map, as consecutive channels."""

    inputs: tuple[Channels, ...]
    outputs: tuple[Channels, ...]


@dataclass(frozen=True, kw_only=True)
class ChannelGroups:
    """The permutable channels of a potential.

    Attributes
    ----------
    embedding
        Group of the columns of the embedding table.
    maps
        The ends of every affine map, by the name of its :class:`~ase_gffmerge.models.affine_maps.AffineMap`.
    """

    embedding: str
    maps: Mapping[str, Ends]

    @property
    def sizes(self) -> dict[str, int]:
        """Number of channels of every group."""
        ends = (channels for both in self.maps.values() for side in both for channels in side)
        return {channels.group: channels.size for channels in ends if channels.group is not None}


Permutations = Mapping[str, Tensor]
"""For every group the old place (n_channels,) of each new channel."""


def channel_groups(potential: Potential) -> ChannelGroups:
    """The permutable channels of a potential.

    Raises
    ------
    IncompatibleSpecialistsError
        For an architecture without a declaration, or a merged potential.
    """
    if potential.architecture not in _DECLARATIONS or potential.hyper.readout_width:
        raise IncompatibleSpecialistsError(
            f"nobody has declared which channels of this {potential.architecture!r} potential may be permuted "
            f"(known: plain specialists of {', '.join(_DECLARATIONS)}); leave git_rebasin and procrustes out"
        )
    return _DECLARATIONS[potential.architecture](potential)


def permuted(potential: Potential, permutations: Permutations) -> Potential:
    """Copy of a potential with other channel order and the same energies.

    Parameters
    ----------
    potential
        Any specialist's potential.
    permutations
        For every group of :func:`channel_groups` the old place of each new channel; groups left out stay.
    """
    groups, result = channel_groups(potential), deepcopy(potential)
    for name, affine_map in affine_maps(result).items():
        inputs, outputs = (_order(side, permutations) for side in groups.maps[name])
        theta = affine_map.read()
        assert theta.shape == (len(inputs) + affine_map.has_bias, len(outputs)), name
        bias = torch.arange(len(inputs), len(theta))
        affine_map.write(theta[torch.cat([inputs, bias])][:, outputs])
    with torch.no_grad():
        columns = _order((Channels(groups.embedding, potential.hyper.channels),), permutations)
        result.embedding.copy_(potential.embedding[..., columns])
    return result


def _order(side: tuple[Channels, ...], permutations: Permutations) -> Tensor:
    """Old place of every channel of one end of a map."""
    pieces, start = [], 0
    for group, size in side:
        piece = torch.arange(size) if group is None else permutations.get(group, torch.arange(size))
        pieces.append(start + piece.cpu())
        start += size
    return torch.cat(pieces)


def _painn_channels(potential: Potential) -> ChannelGroups:
    stream = Channels("stream", potential.hyper.channels)
    radial = Channels(None, potential.hyper.n_radial)
    maps: dict[str, Ends] = {}
    for name, stage in potential.named_stages():
        hidden = Channels(f"{name}.hidden", potential.hyper.channels)
        if isinstance(stage, Message):
            maps[f"{name}.filters"] = Ends((radial,), 3 * (stream,))
            maps[f"{name}.hidden"] = Ends((stream,), (hidden,))
        else:
            maps[f"{name}.U"] = maps[f"{name}.V"] = Ends((stream,), (stream,))
            maps[f"{name}.hidden"] = Ends(2 * (stream,), (hidden,))
        maps[f"{name}.out"] = Ends((hidden,), 3 * (stream,))
    return ChannelGroups(embedding="stream", maps=maps | _readout_maps(stream))


def _nequip_channels(potential: Potential) -> ChannelGroups:
    maps: dict[str, Ends] = {}
    before: tuple[Channels, ...] = (Channels("embedding", potential.hyper.channels),)
    for name, stage in potential.named_stages():
        assert isinstance(stage, Interaction)
        up = tuple(
            Channels(f"{name}.up{order}", size) for order, size in enumerate(stage.convolution.channels)
        )
        after = tuple(Channels(f"{name}.{order}", size) for order, size in enumerate(_gated(stage)))
        for order, irrep in enumerate(_irreps(len(before))):
            maps[f"{name}.linear_up[{irrep}]"] = Ends((before[order],), (up[order],))
        for order, irrep in enumerate(_irreps(len(after))):
            pre_gate = (after[order],) if order else after
            maps[f"{name}.linear_down[{irrep}]"] = Ends(_messages(stage, up, order), pre_gate)
            if order < len(before):
                maps[f"{name}.skip[{irrep}]"] = Ends((before[order],), pre_gate)
        maps |= _radial_maps(name, stage, up)
        before = after
    return ChannelGroups(embedding="embedding", maps=maps | _readout_maps(before[0]))


def _irreps(number: int) -> list[o3.Irrep]:
    """Irreps of orders 0, 1, ... with natural parity."""
    return [irrep for _, irrep in natural(number * (1,))]


def _gated(stage: Interaction) -> list[int]:
    """Features of every order that leave the gate after a block: its scalars include one gate per tensor."""
    scalars, *tensors = (mul for mul, _ in stage.linear_down.irreps_out)
    return [scalars - sum(tensors), *tensors]


def _messages(stage: Interaction, up: tuple[Channels, ...], order: int) -> tuple[Channels, ...]:
    """Channels of the messages of one order, path by path."""
    paths = [stage.convolution.paths[i] for i in stage.convolution.order]
    return tuple(up[path.l1] for path in paths if path.l3 == order)


def _radial_maps(name: str, stage: Interaction, up: tuple[Channels, ...]) -> dict[str, Ends]:
    first, *hidden, _ = stage.radial.hs
    ends = [
        (Channels(None, first),),
        *((Channels(f"{name}.radial{i}", size),) for i, size in enumerate(hidden)),
        tuple(up[path.l1] for path in stage.convolution.paths),
    ]
    return {f"{name}.radial.layer{i}": Ends(ends[i], ends[i + 1]) for i in range(len(ends) - 1)}


def _readout_maps(scalars: Channels) -> dict[str, Ends]:
    hidden = Channels("readout.hidden", scalars.size // 2)
    return {
        "readout.hidden": Ends((scalars,), (hidden,)),
        "readout.out": Ends((hidden,), (Channels(None, 1),)),
    }


_DECLARATIONS: dict[str, Callable[[Potential], ChannelGroups]] = {
    "painn": _painn_channels,
    "nequip": _nequip_channels,
}
