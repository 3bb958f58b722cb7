"""Padded neighbourhoods: all edges of an atom side by side, and their evaluation for a chunk of atoms at a time.

A stage whose features change by what a neighbourhood holds needs, of other atoms, only the features of the senders. It can
therefore be evaluated for some atoms after the other (:class:`InferenceStage`), in memory that does not grow with them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ase_gffmerge.models.base import EdgeGeometry, Stage, State
from ase_gffmerge.models.layers.linear import JoinedLinear, take_rows


@dataclass(frozen=True)
class NeighborhoodGeometry(EdgeGeometry):
    """Edges, and the slots that they take in neighbourhoods of one width; ``angular`` are unit vectors.

    Attributes
    ----------
    edge : (n_atoms, width)
        Edge in every slot of an atom's neighbourhood; n_edges where there is none. The first slot is always empty.
    slot : (n_edges,)
        Slot of every edge, counted through all neighbourhoods.
    l_max
        Largest order of Legendre polynomials.
    """

    edge: Tensor
    slot: Tensor
    l_max: int

    @cached_property
    def chunks(self) -> "list[Chunk]":
        """All neighbourhoods in chunks, as :class:`InferenceStage` takes them."""
        return list(chunks_of(self, chunk_size(self.edge.device)))

    def padded(self, x: Tensor) -> Tensor:
        """Put rows of edges (n_edges, d) into the slots (n_atoms, width, d), zeros where there is no edge."""
        rows = torch.cat([x, x.new_zeros(1, x.shape[1])])
        return take_rows(rows, self.edge.flatten()).view(*self.edge.shape, x.shape[1])

    def from_slots(self, x: Tensor) -> Tensor:
        """Collect rows of edges (n_edges, d) from slots (n_atoms, width, d)."""
        return take_rows(x.reshape(-1, x.shape[-1]), self.slot)

    def sums(self, x: Tensor) -> Tensor:
        """Sums (n_atoms, d) over the edges of every atom."""
        return x.new_zeros(len(self.edge), x.shape[1]).index_add(0, self.receiver, x)

    @cached_property
    def slot_envelope(self) -> Tensor:
        """Envelope (n_atoms, width) of every slot, zero where there is no edge."""
        return self.padded(self.envelope).squeeze(2)

    @cached_property
    def bias(self) -> Tensor:
        """Logarithm of the envelope (n_atoms, width), minus infinity where there is no edge.

        Of the first slot, whose logits are zero, it is zero: the one in the denominator of a softmax.
        """
        present = self.slot_envelope > 0
        logarithm = torch.where(present, self.slot_envelope, 1.0).log().masked_fill(~present, -torch.inf)
        return torch.cat([torch.zeros_like(logarithm[:, :1]), logarithm[:, 1:]], dim=1)

    @cached_property
    def legendre(self) -> tuple[Tensor, ...]:
        r""":math:`P_l(\cos\vartheta)` (n_atoms, width, width) of all pairs of slots, for l = 1, 2, ..., l_max."""
        directions = self.padded(self.angular)
        cosine = directions @ directions.mT
        found = [torch.ones_like(cosine), cosine]
        for order in range(1, self.l_max):
            found.append(((2 * order + 1) * cosine * found[-1] - order * found[-2]) / (order + 1))
        return tuple(found[1 : self.l_max + 1])


def neighborhoods(receiver: Tensor, n_atoms: int) -> tuple[Tensor, Tensor]:
    """Give ``edge`` and ``slot`` of :class:`NeighborhoodGeometry` for the receivers (n_edges,) of all edges."""
    order = torch.argsort(receiver, stable=True)
    counts = torch.bincount(receiver, minlength=n_atoms)
    width = 1 + (int(counts.max()) if len(receiver) else 0)
    first = counts.cumsum(0) - counts
    slot = torch.empty_like(receiver)
    slot[order] = torch.arange(len(receiver), device=receiver.device) - first[receiver[order]]
    slot += width * receiver + 1
    edge = torch.full((n_atoms * width,), len(receiver), device=receiver.device)
    edge[slot] = torch.arange(len(receiver), device=receiver.device)
    return edge.view(n_atoms, width), slot


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
    return 4096 if device.type == "cpu" else 65536


WHOLE = 3
"""Chunks up to which all edges are evaluated at once, which needs memory but no second pass."""


@dataclass(frozen=True)
class Chunk:
    """Some atoms and all of their edges: neighbourhoods on their own.

    Attributes
    ----------
    atoms
        Consecutive ones.
    edges : (n,)
        Their edges, neighbourhood by neighbourhood.
    sender : (n,)
        Of these edges, among all atoms.
    receiver : (n,)
        Of these edges, counted from the first atom of the chunk.
    edge, slot
        See :class:`NeighborhoodGeometry`, counted within the chunk.
    """

    atoms: slice
    edges: Tensor
    sender: Tensor
    receiver: Tensor
    edge: Tensor
    slot: Tensor

    def rows(self, part: int) -> slice | Tensor:
        """Places of its part of a state: of its atoms in the first part, of its edges in others."""
        return self.edges if part else self.atoms


def chunks_of(geometry: NeighborhoodGeometry, size: int) -> Iterator[Chunk]:
    """Cut all neighbourhoods into chunks of about ``size`` edges."""
    n_edges, start = len(geometry.sender), 0
    counts = (geometry.edge < n_edges).sum(dim=1)
    number = torch.div(counts.cumsum(0) - counts, size, rounding_mode="floor")
    for n in torch.bincount(number).tolist():
        rows = geometry.edge[start : start + n]
        receiver, column = (rows < n_edges).nonzero(as_tuple=True)
        edges = rows[receiver, column]
        edge, slot = neighborhoods(receiver, n)
        yield Chunk(slice(start, start + n), edges, geometry.sender[edges], receiver, edge, slot)
        start += n


class InferenceStage(Stage):
    """The same for weights that stay as they are; what is kept between the two passes is the state, and no more.

    Intermediate results exist for a chunk of atoms at a time, which fits the processor's cache, and are made again for the
    derivatives.

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
        if len(geometry.sender) <= WHOLE * chunk_size(geometry.sender.device):
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
        ctx: Any, stage: NeighborhoodStage, own: Tensor, geometry: NeighborhoodGeometry, *entering: Tensor
    ) -> State:
        ctx.save_for_backward(*entering)
        ctx.stage, ctx.own, ctx.geometry = stage, own, geometry
        sizes, whole = (len(geometry.edge), len(geometry.sender)), list[Tensor]()
        for chunk in geometry.chunks:
            after = _chunk(stage, own, geometry, chunk, _taken(chunk, entering))
            whole = whole or [x.new_empty(n, x.shape[1]) for x, n in zip(after, sizes)]
            for i, (total, part) in enumerate(zip(whole, after, strict=False)):
                total[chunk.rows(i)] = part
        return tuple(whole)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        entering: State = ctx.saved_tensors
        totals = [torch.zeros_like(x) for x in entering]
        for chunk in ctx.geometry.chunks:
            inputs = tuple(x.detach().requires_grad_() for x in _taken(chunk, entering))
            with torch.enable_grad():
                after = _chunk(ctx.stage, ctx.own, ctx.geometry, chunk, inputs)
            own = [gradient[chunk.rows(i)] for i, gradient in enumerate(gradients)]
            found = torch.autograd.grad(after, inputs, own, allow_unused=True)
            for i, (total, part) in enumerate(zip(totals, found, strict=True)):
                if part is not None and i == 2:
                    total.index_add_(0, chunk.sender, part)
                elif part is not None:
                    total[chunk.rows(i // 3)] = part
        return None, None, None, *totals


def _taken(chunk: Chunk, entering: State) -> State:
    """Rows of a chunk: of its atoms, of the senders of its edges, and of its edges."""
    nodes, receiving, sending, *of_edges = entering
    rows = [x[chunk.atoms] for x in (nodes, receiving)]
    return *rows, sending[chunk.sender], *(x[chunk.edges] for x in of_edges)


def _chunk(
    stage: NeighborhoodStage, own: Tensor, geometry: NeighborhoodGeometry, chunk: Chunk, rows: State
) -> State:
    nodes, receiving, sending, radial, envelope, angular, *edges = rows
    local = NeighborhoodGeometry(
        chunk.sender, chunk.receiver, radial, envelope, angular, chunk.edge, chunk.slot, geometry.l_max
    )
    joined = torch.cat([radial, *edges], dim=1) @ own + receiving.index_select(0, chunk.receiver) + sending
    return stage.update((nodes, *edges), joined, local)
