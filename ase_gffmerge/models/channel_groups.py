r"""Which channels of a potential belong together: those that may change places, or be left out, only with each other.

A permutation P of the channels between two maps, :math:`W_2\,\sigma(W_1 x) = (W_2 P^\top)\,\sigma(P W_1 x)`, is free
wherever nothing but elementwise products stands between them. Channels that meet in such a product must move together;
they form a *group*. Equivariance leaves the multiplicity index of an irrep to permute, never its components.

PaiNN has one group for the whole residual stream: the scalars :math:`s_c` and vectors :math:`v_c` of all blocks, the
filters, and :math:`U v`, :math:`V v` are tied by the sums over blocks and by the products :math:`a_c u_c` and
:math:`a_c \langle u_c, v_c\rangle`. The hidden layer of every two-layer network is a group of its own.

NequIP has no such stream, because its self-connection is a map as well: the features of order l after each block are a
group (a tensor is tied to its gate), so are the features of order l after ``linear_up`` (tied over all paths that start
from them through the weights of the radial network) and every hidden layer of the radial networks and of the readout.

EScAIP has two streams, atoms and edges; the values of every head and the hidden layers are groups, its queries and keys
stay as they are. Leaving channels out, unlike permuting them, changes what its norms divide by.

A smaller potential of the same architecture has the same groups with fewer channels each; a :class:`Selection` says which.
"""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from e3nn import o3
from torch import Tensor, nn

from ase_gffmerge.errors import IncompatibleSpecialistsError
from ase_gffmerge.models.affine_maps import adjustable_maps
from ase_gffmerge.models.base import Potential
from ase_gffmerge.models.escaip import Block, Input
from ase_gffmerge.models.nequip import Interaction, natural
from ase_gffmerge.models.painn import Message


class Channels(NamedTuple):
    """Consecutive channels of one group; group ``None`` has a meaning of its own and stays where it is.

    Of an irrep, every channel has ``components`` consecutive columns.
    """

    group: str | None
    size: int
    components: int = 1


Side = Sequence[Channels]


class Ends(NamedTuple):
    """What enters and what leaves an affine map, as consecutive channels."""

    inputs: Side
    outputs: Side


@dataclass(frozen=True, kw_only=True)
class ChannelGroups:
    """The channels of a potential by groups.

    Attributes
    ----------
    embedding
        Group of the columns of the embedding table.
    maps
        The ends of every affine map, by the name of its :class:`~ase_gffmerge.models.affine_maps.AffineMap`.
    norms
        What leaves every norm.
    states
        For every stage the columns of each part of the state after it.
    """

    embedding: str
    maps: Mapping[str, Ends]
    states: Mapping[str, Sequence[Side]]
    norms: Mapping[str, Side] = field(default_factory=dict)

    @property
    def sizes(self) -> dict[str, int]:
        """Number of channels of every group."""
        ends = (channels for both in self.maps.values() for side in both for channels in side)
        return {channels.group: channels.size for channels in ends if channels.group is not None}


Places = Mapping[str, Tensor]
"""For every group the place (n_channels,) in the old potential of each channel of the new one."""


def channels_are_declared(potential: Potential) -> bool:
    """Whether :func:`channel_groups` knows the channels of a potential."""
    return potential.architecture in _DECLARATIONS and not potential.hyper.readout_width


def channel_groups(potential: Potential) -> ChannelGroups:
    """The channels of a potential by groups.

    Raises
    ------
    IncompatibleSpecialistsError
        For an architecture without a declaration, or a widened readout.
    """
    if not channels_are_declared(potential):
        raise IncompatibleSpecialistsError(
            f"nobody has declared which channels of this {potential.architecture!r} potential may be permuted or left out "
            f"(known: plain specialists of {', '.join(_DECLARATIONS)}); leave out git_rebasin, procrustes and compress"
        )
    return _DECLARATIONS[potential.architecture](potential)


def places(side: Side, kept: Places) -> Tensor:
    """Old place of every column of one end of a map, or of a part of a state."""
    pieces, start = [torch.arange(0)], 0
    for group, size, components in side:
        piece = torch.arange(size) if group is None else kept.get(group, torch.arange(size)).cpu()
        columns = components * piece[:, None] + torch.arange(components)
        pieces.append(start + columns.flatten())
        start += components * size
    return torch.cat(pieces)


@torch.no_grad()
def write_channels(
    result: Potential, source: Potential, kept: Places, *, names: Mapping[str, str] | None = None
) -> None:
    """Give a potential the channels of another one.

    Parameters
    ----------
    result
        Of the same architecture, with as many channels as are kept; written in place.
    source
        Whose channels are read.
    kept
        For every group of ``source`` the place of each channel of ``result``; groups left out stay as they are.
    names
        For modules of ``result`` their names in ``source``, where they differ.
    """
    groups, maps = channel_groups(source), adjustable_maps(source)
    for name, affine_map in adjustable_maps(result).items():
        own = renamed(name, names or {})
        ends = groups.maps[own] if own in groups.maps else Ends((), groups.norms[own])
        inputs, outputs = (places(side, kept) for side in ends)
        theta, n_inputs = maps[own].read(), sum(channels.size for channels in ends.inputs)
        affine_map.write(theta[torch.cat([inputs, torch.arange(n_inputs, len(theta))])][:, outputs])
    columns = places((Channels(groups.embedding, source.hyper.channels),), kept)
    result.embedding.copy_(source.embedding[..., columns])
    result.references.copy_(source.references)


def renamed(name: str, names: Mapping[str, str]) -> str:
    """Name of a part of a module, by the longest beginning of it that ``names`` knows."""
    for end in sorted((i for i in range(len(name) + 1) if name[:i] in names), reverse=True):
        if end == len(name) or name[end] in ".[":
            return names[name[:end]] + name[end:]
    return name


def permuted(potential: Potential, permutations: Places) -> Potential:
    """Copy of a potential with other channel order and the same energies.

    Parameters
    ----------
    potential
        Any specialist's potential.
    permutations
        For every group of :func:`channel_groups` the old place of each new channel; groups left out stay.
    """
    result = deepcopy(potential)
    write_channels(result, potential, permutations)
    return result


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
    states = {name: ((stream,), (stream,)) for name, _ in potential.named_stages()}
    return ChannelGroups(embedding="stream", maps=maps | _readout_maps(stream), states=states)


def _nequip_channels(potential: Potential) -> ChannelGroups:
    maps: dict[str, Ends] = {}
    states: dict[str, Sequence[Side]] = {}
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
        tensors = [
            channels._replace(components=2 * order + 1) for order, channels in enumerate(after) if order
        ]
        states[name] = ((*after, *tensors),)
        before = after
    return ChannelGroups(embedding="embedding", maps=maps | _readout_maps(before[0]), states=states)


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
    hidden = Channels("readout.hidden", max(scalars.size // 2, 1))
    return {
        "readout.hidden": Ends((scalars,), (hidden,)),
        "readout.out": Ends((hidden,), (Channels(None, 1),)),
    }


def _escaip_channels(potential: Potential) -> ChannelGroups:
    channels = potential.hyper.channels
    nodes, edges = Channels("nodes", channels), Channels("edges", channels)
    radial = Channels(None, potential.hyper.n_radial)
    maps: dict[str, Ends] = {}
    norms: dict[str, Side] = {}
    states: dict[str, Sequence[Side]] = {}
    for name, stage in potential.named_stages():
        hidden = (Channels(f"{name}.hidden", channels),)
        states[name] = ((nodes,), (edges,))
        if isinstance(stage, Input):
            maps[f"{name}.hidden"] = Ends((radial, nodes, nodes), hidden)
            maps[f"{name}.out"] = Ends(hidden, (edges,))
            maps[f"{name}.orientation"] = Ends((Channels(None, stage.orientation.in_features),), (nodes,))
            continue
        assert isinstance(stage, Block)
        maps[f"{name}.hidden"] = Ends((radial, edges, nodes, nodes), hidden)
        norms |= {f"{name}.norm": hidden, f"{name}.ffn_node.norm": (nodes,)}
        values = [Channels(f"{name}.values{head}", channels // stage.heads) for head in range(stage.heads)]
        logits = Channels(None, stage.qkv.out_features - channels)
        maps[f"{name}.qkv"] = Ends(hidden, (logits, *values))
        maps[f"{name}.out_node"] = Ends(values, (nodes,))
        maps |= _feed_forward_maps(f"{name}.ffn_node", stage.ffn_node.hidden, nodes)
        if stage.ffn_edge is None:
            states[name] = ((nodes,),)
        else:
            norms[f"{name}.ffn_edge.norm"] = (edges,)
            maps[f"{name}.out_edge"] = Ends(values, (edges,))
            maps |= _feed_forward_maps(f"{name}.ffn_edge", stage.ffn_edge.hidden, edges)
    for block in range(potential.hyper.n_blocks):
        hidden = (Channels(f"readout.hidden.{block}", max(channels // 2, 1)),)
        norms[f"readout.norm.{block}"] = (nodes,)
        maps[f"readout.hidden.{block}"] = Ends((nodes,), hidden)
        maps[f"readout.out.{block}"] = Ends(hidden, (Channels(None, 1),))
    return ChannelGroups(embedding="nodes", maps=maps, states=states, norms=norms)


def _feed_forward_maps(name: str, layer: nn.Linear, stream: Channels) -> dict[str, Ends]:
    hidden = (Channels(f"{name}.hidden", layer.out_features),)
    return {
        f"{name}.hidden": Ends((stream,), hidden),
        f"{name}.out": Ends(hidden, (stream,)),
    }


_DECLARATIONS: dict[str, Callable[[Potential], ChannelGroups]] = {
    "painn": _painn_channels,
    "nequip": _nequip_channels,
    "escaip": _escaip_channels,
}
