"""Padded neighbourhoods: all edges of an atom side by side, and their evaluation for a chunk of atoms at a time.

A stage whose features change by what a neighbourhood holds needs, of other atoms, only the features of the senders. It can
therefore be evaluated for some atoms after the other (:class:`InferenceStage`), in memory that does not grow with them.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.autograd.graph import get_gradient_edge

from ase_gffmerge.models.base import EdgeGeometry, Stage, State
from ase_gffmerge.models.layers.linear import JoinedLinear, take_rows


@dataclass(frozen=True)
class Table:
    """Neighbourhoods of some atoms, padded to one width.

    Attributes
    ----------
    edge : (n, width)
        Edge in every slot; n_edges where there is none. The first slot is always empty.
    bias : (n, width)
        Logarithm of the envelope, minus infinity where there is no edge. Of the first slot, whose logits are zero, it is 0:
        the one in the denominator of a softmax.
    legendre : (n, width, width) each
        :math:`P_l` of the cosines of all pairs of slots, for l = 1, 2, ...
    """

    edge: Tensor
    bias: Tensor
    legendre: tuple[Tensor, ...]


class Scratch:
    """Memory for intermediate results of the kind of ``like``, for one chunk after the other: it stays in the cache."""

    def __init__(self, like: Tensor):
        self.like, self.buffers = like, dict[str, Tensor]()

    def take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Give an uninitialised tensor in memory of this name, whose last content is lost."""
        size, found = math.prod(shape), self.buffers.get(name)
        if found is None or len(found) < size:
            found = self.buffers[name] = self.like.new_empty(size)
        return found[:size].view(shape)


@dataclass(frozen=True)
class NeighborhoodGeometry(EdgeGeometry):
    """Edges, and the slots that they take in padded neighbourhoods; ``angular`` are unit vectors.

    Attributes
    ----------
    edges
        For neighbourhoods of every width, see :attr:`Table.edge`.
    slot : (n_edges,)
        Slot of every edge, counted through all neighbourhoods.
    n_atoms
        How many neighbourhoods there are.
    l_max
        Largest order of Legendre polynomials.
    scratch
        Of one chunk, whose derivatives are taken once and backwards with weights that stay as they are; else ``None``.
    """

    edges: tuple[Tensor, ...]
    slot: Tensor
    n_atoms: int
    l_max: int
    scratch: "Scratch | None" = None

    @cached_property
    def chunks(self) -> "list[Chunk]":
        """All neighbourhoods in chunks, as :class:`InferenceStage` takes them."""
        return list(chunks_of(self, chunk_size(self.slot.device)))

    def in_slots(self, x: Tensor) -> list[Tensor]:
        """Put rows of edges (n_edges, d) into the slots (n, width, d) of all tables, zeros where there is no edge."""
        return in_slots(x, self.edges)

    def from_slots(self, tables: Sequence[Tensor]) -> Tensor:
        """Collect rows of edges (n_edges, d) from the slots (n, width, d) of all tables."""
        return from_slots(tables, self.slot)

    def sums(self, x: Tensor) -> Tensor:
        """Sums (n_atoms, d) over the edges of every atom."""
        return x.new_zeros(self.n_atoms, x.shape[1]).index_add(0, self.receiver, x)

    @property
    def tables(self) -> list[Table]:
        """Envelope and angles in the slots of all tables; made once for all blocks."""
        if torch.compiler.is_compiling():  # which does not trace locks, and finds what is computed twice
            return self._made()
        return self._tables

    @cached_property
    def _tables(self) -> list[Table]:
        return self._made()

    def _made(self) -> list[Table]:
        parts = self.in_slots(torch.cat([self.envelope, self.angular], dim=1))
        tables = []
        for edge, part in zip(self.edges, parts, strict=True):
            envelope, directions = part[:, :, 0], part[:, :, 1:]
            present = envelope > 0
            logarithm = torch.where(present, envelope, 1.0).log().masked_fill(~present, -torch.inf)
            bias = torch.cat([torch.zeros_like(logarithm[:, :1]), logarithm[:, 1:]], dim=1)
            tables.append(Table(edge, bias, legendre(directions @ directions.mT, self.l_max)))
        return tables


def in_slots(x: Tensor, edges: Sequence[Tensor]) -> list[Tensor]:
    """Put rows of edges (n_edges, d) into slots (n, width, d), see :meth:`NeighborhoodGeometry.in_slots`."""
    rows = torch.cat([x, x.new_zeros(1, x.shape[1])])
    taken = take_rows(rows, torch.cat([edge.flatten() for edge in edges]))
    parts = taken.split([edge.numel() for edge in edges])
    return [part.view(*edge.shape, x.shape[1]) for part, edge in zip(parts, edges, strict=True)]


def from_slots(tables: Sequence[Tensor], slot: Tensor) -> Tensor:
    """Collect rows of edges (n_edges, d) from slots (n, width, d), see :meth:`NeighborhoodGeometry.from_slots`."""
    return take_rows(torch.cat([x.flatten(0, 1) for x in tables]), slot)


def legendre(x: Tensor, l_max: int) -> tuple[Tensor, ...]:
    """Legendre polynomials of the orders 1, 2, ..., l_max by Bonnet's recursion."""
    found = [torch.ones_like(x), x]
    for order in range(1, l_max):
        found.append(((2 * order + 1) * x * found[-1] - order * found[-2]) / (order + 1))
    return tuple(found[1 : l_max + 1])


EDGES_PER_TABLE, TABLES = 2500, 4
"""Edges of a structure per width of its neighbourhoods, and the largest number of widths: each costs some operations."""


def neighborhoods(receiver: Tensor, n_atoms: int) -> tuple[tuple[Tensor, ...], Tensor]:
    """Give ``edges`` and ``slot`` of :class:`NeighborhoodGeometry` for the receivers (n_edges,) of all edges.

    Atoms with similar numbers of neighbours share a table, so that few slots of large structures stay empty.
    """
    n_edges, device = len(receiver), receiver.device
    order = torch.argsort(receiver, stable=True)
    counts = torch.bincount(receiver, minlength=n_atoms)
    first = counts.cumsum(0) - counts
    place = torch.empty_like(receiver)
    place[order] = torch.arange(n_edges, device=device) - first[receiver[order]] + 1
    start, shape = torch.empty_like(counts), list[tuple[int, int]]()
    for atoms in torch.argsort(counts, stable=True).tensor_split(min(1 + n_edges // EDGES_PER_TABLE, TABLES)):
        width = 1 + (int(counts[atoms].max()) if len(atoms) else 0)
        start[atoms] = sum(n * m for n, m in shape) + width * torch.arange(len(atoms), device=device)
        shape.append((len(atoms), width))
    slot = start[receiver] + place
    edge = torch.full((sum(n * m for n, m in shape),), n_edges, device=device)
    edge[slot] = torch.arange(n_edges, device=device)
    tables = zip(edge.split([n * m for n, m in shape]), shape, strict=True)
    return tuple(table.view(size) for table, size in tables), slot


def neighborhoods_of_width(receiver: Tensor, n_atoms: int, width: int) -> tuple[tuple[Tensor, ...], Tensor]:
    """Give the same as one table of a given width, without a look at any value: it can be traced and recorded.

    Parameters
    ----------
    receiver : (n_edges,)
        Of all edges.
    n_atoms, width
        Shape of the table. Edges for which it is too narrow must be without envelope and of padding atoms, the last one
        among them: no attention sees these edges, and they are given what its first slot holds.
    """
    count = torch.arange(len(receiver), device=receiver.device)
    order = torch.argsort(receiver, stable=True)
    counts = receiver.new_zeros(n_atoms).scatter_add(0, receiver, torch.ones_like(receiver))
    first = counts.cumsum(0) - counts
    place = torch.empty_like(receiver).scatter(0, order, count - first[receiver[order]] + 1)
    slot = torch.where(place < width, receiver * width + place, (n_atoms - 1) * width)
    edge = torch.full_like(receiver[:1], len(receiver)).repeat(n_atoms * width).scatter(0, slot, count)
    edge = edge.view(n_atoms, width)
    return (torch.cat([torch.full_like(edge[:, :1], len(receiver)), edge[:, 1:]], dim=1),), slot


class NeighborhoodStage(Stage):
    """A stage in which an atom's features and those of its edges change by what its neighbourhood holds.

    Attributes
    ----------
    hidden
        Reads radial functions and features of every edge, of its receiver and of its sender.
    """

    hidden: JoinedLinear

    def forward(self, state: State, geometry: NeighborhoodGeometry) -> State:
        """Change features of atoms and edges."""
        nodes, *edges = state
        own = [(x, None) for x in (geometry.radial, *edges)]
        joined = self.hidden([*own, (nodes, geometry.receiver), (nodes, geometry.sender)])
        return self.update(state, joined, geometry)

    def update(self, state: State, joined: Tensor, geometry: NeighborhoodGeometry) -> State:
        """Change features without looking at other neighbourhoods.

        Parameters
        ----------
        state, geometry
            Of some atoms and all of their edges.
        joined : (n_edges, channels)
            What ``hidden`` gives.
        """
        raise NotImplementedError


def chunk_size(device: torch.device) -> int:
    """Edges that are evaluated at a time; on a GPU more, for the work to fill it."""
    return 3072 if device.type == "cpu" else 65536


WHOLE = 4
"""Chunks up to which all edges are evaluated at once, which needs more memory and less time."""


def evaluated_whole(n_edges: int, device: torch.device) -> bool:
    """Whether a structure is small enough for all of its edges to be evaluated at once."""
    return n_edges <= WHOLE * chunk_size(device)


@dataclass(frozen=True)
class Chunk:
    """Some atoms and all of their edges: neighbourhoods on their own.

    Attributes
    ----------
    atoms : (n_atoms,)
        Atoms with similar numbers of edges.
    edges : (n,)
        Their edges, neighbourhood by neighbourhood.
    sender : (n,)
        Of these edges, among all atoms.
    receiver : (n,)
        Of these edges, counted within the chunk.
    tables, slot
        ``edges`` and ``slot`` of :class:`NeighborhoodGeometry`, counted within the chunk; one table.
    """

    atoms: Tensor
    edges: Tensor
    sender: Tensor
    receiver: Tensor
    tables: tuple[Tensor, ...]
    slot: Tensor

    def rows(self, part: int) -> Tensor:
        """Places of its part of a state: of its atoms in the first part, of its edges in others."""
        return self.edges if part else self.atoms


def chunks_of(geometry: NeighborhoodGeometry, size: int) -> Iterator[Chunk]:
    """Cut all neighbourhoods, in the order of their numbers of edges, into chunks of about ``size`` edges."""
    counts = torch.bincount(geometry.receiver, minlength=geometry.n_atoms)
    atoms = torch.argsort(counts, stable=True)
    rank = torch.empty_like(atoms)
    rank[atoms] = torch.arange(geometry.n_atoms, device=atoms.device)
    rank, counts = rank[geometry.receiver], counts[atoms]
    number = torch.div(counts.cumsum(0) - counts, size, rounding_mode="floor")
    _, number, sizes = torch.unique_consecutive(number, return_inverse=True, return_counts=True)
    n_edges = torch.zeros_like(sizes).index_add(0, number, counts)
    of_edges = torch.argsort(rank, stable=True).split(n_edges.tolist())
    start = 0
    for own, edges in zip(atoms.split(sizes.tolist()), of_edges, strict=True):
        receiver = rank[edges] - start
        start += len(own)
        tables, slot = neighborhoods_of_width(receiver, len(own), 1 + int(counts[start - 1]))
        yield Chunk(own, edges, geometry.sender[edges], receiver, tables, slot)


class InferenceStage(Stage):
    """The same for weights that stay as they are, and derivatives that are taken once.

    Intermediate results exist for a chunk of atoms at a time, which fits the processor's cache. What the derivatives need of
    all chunks is kept, but for what attention makes of pairs of edges: that is made again.

    Parameters
    ----------
    stage
        Whose weights are shared.
    """

    def __init__(self, stage: NeighborhoodStage):
        super().__init__()
        self.stage, self.emits_scalars = stage, stage.emits_scalars

    def forward(self, state: State, geometry: NeighborhoodGeometry) -> State:
        """Change features of atoms and edges."""
        if evaluated_whole(len(geometry.sender), geometry.sender.device):
            changed: State = self.stage(state, geometry)
            return changed
        layer, channels = self.stage.hidden, state[0].shape[1]
        own, receiving, sending = layer.weight.split(
            [layer.in_features - 2 * channels, channels, channels], 1
        )
        nodes, *edges = state
        of_nodes = nodes, nodes @ receiving.T + layer.bias, nodes @ sending.T
        return tuple(_Chunks.apply(self.stage, own.T, geometry, *of_nodes, *geometry.parts, *edges))


class _Chunks(Function):
    """A stage for one chunk after the other: features of all atoms and edges, from what enters it."""

    @staticmethod
    def forward(
        ctx: Any,
        stage: NeighborhoodStage,
        own: Tensor,
        geometry: NeighborhoodGeometry,
        nodes: Tensor,
        receiving: Tensor,
        sending: Tensor,
        *of_edges: Tensor,
    ) -> State:
        ctx.own, ctx.geometry, ctx.kept = own, geometry, []
        scratch = Scratch(nodes.detach())
        ctx.shapes = [x.shape for x in (nodes, receiving, sending, *of_edges)]
        sizes, whole = (geometry.n_atoms, len(geometry.sender)), list[Tensor]()
        for chunk in geometry.chunks:
            radial, envelope, angular, *edges = (x.index_select(0, chunk.edges) for x in of_edges)
            joined = torch.cat([radial, *edges], dim=1) @ own
            joined += receiving.index_select(0, chunk.atoms).index_select(0, chunk.receiver)
            joined += sending.index_select(0, chunk.sender)
            entering = nodes.index_select(0, chunk.atoms), joined, envelope, angular, *edges
            with torch.enable_grad():
                inputs = tuple(x.detach().requires_grad_() for x in entering)
                local = _within(chunk, geometry, inputs, scratch)
                after = stage.update((inputs[0], *inputs[4:]), inputs[1], local)
            whole = whole or [x.new_empty(n, x.shape[1]) for x, n in zip(after, sizes)]
            for i, (total, part) in enumerate(zip(whole, after, strict=False)):
                total.index_copy_(0, chunk.rows(i), part.detach())
            inputs = inputs if len(after) > 1 else inputs[:4]  # nothing reads features of edges any more
            ctx.kept.append((inputs, [get_gradient_edge(x) for x in after]))
        return tuple(whole)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        nodes, receiving, sending, radial, envelope, angular, *edges = (
            gradients[0].new_zeros(shape) for shape in ctx.shapes
        )
        widths = [radial.shape[1], *(x.shape[1] for x in edges)]
        for chunk, (inputs, after) in zip(ctx.geometry.chunks, ctx.kept, strict=True):
            own = [gradient.index_select(0, chunk.rows(i)) for i, gradient in enumerate(gradients)]
            of_nodes, joined, *others = torch.autograd.grad(
                after, inputs, own, allow_unused=True, retain_graph=True
            )
            nodes.index_copy_(0, chunk.atoms, of_nodes)
            of_atoms = joined.new_zeros(len(chunk.atoms), joined.shape[1])
            receiving.index_copy_(0, chunk.atoms, of_atoms.index_add_(0, chunk.receiver, joined))
            sending.index_add_(0, chunk.sender, joined)
            parts = [*(joined @ ctx.own.T).split(widths, dim=1), *others[:2]]
            for part, direct in zip(parts[1 : 1 + len(edges)], others[2:], strict=False):
                part += direct
            for total, part in zip((radial, *edges, envelope, angular), parts, strict=True):
                if part is not None:
                    total.index_copy_(0, chunk.edges, part)
        return None, None, None, nodes, receiving, sending, radial, envelope, angular, *edges


def _within(
    chunk: Chunk, geometry: NeighborhoodGeometry, inputs: State, scratch: Scratch
) -> NeighborhoodGeometry:
    """Geometry of a chunk alone, without radial functions: they have been used."""
    envelope, angular = inputs[2:4]
    return NeighborhoodGeometry(
        chunk.sender,
        chunk.receiver,
        envelope.new_empty(len(envelope), 0),
        envelope,
        angular,
        chunk.tables,
        chunk.slot,
        len(chunk.atoms),
        geometry.l_max,
        scratch=scratch,
    )
