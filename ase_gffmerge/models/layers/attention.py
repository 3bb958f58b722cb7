r"""Attention within padded neighbourhoods, differentiated by hand: EScAIP's, where weights stay as they are."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.functional import gelu

from ase_gffmerge.models.layers.neighborhoods import (
    NeighborhoodGeometry,
    Scratch,
    in_slots,
    legendre,
)


class AttentionLayers(Protocol):
    """What is needed of a block.

    Attributes
    ----------
    heads, d_logits, frequencies
        Number of heads; channels of queries and keys per head, in all and of every order of Legendre polynomials.
    norm, qkv
        From features to t, and from t to queries, keys and values.
    out_edge
        Reads y; ``None`` where nothing does.
    """

    heads: int
    d_logits: int
    frequencies: tuple[int, ...]
    norm: nn.RMSNorm
    qkv: nn.Linear
    out_edge: nn.Linear | None


def legendre_slopes(polynomials: Sequence[Tensor]) -> list[Tensor | float]:
    """Derivatives of the Legendre polynomials of the orders 0, 1, 2, ... from those of the orders 1, 2, ..."""
    slopes: list[Tensor | float] = [0.0, 1.0]
    for order, p_l in enumerate(polynomials, start=1):
        slopes.append(slopes[-2] + (2 * order + 1) * p_l)
    return slopes


def by_head(x: Tensor, heads: int, d: int) -> Tensor:
    """Rows of queries, keys and values (2 heads · d + channels, m) head by head, and d^-1/2 in the queries.

    Parameters
    ----------
    x
        Weights or offsets of the layer.
    heads, d
        Number of heads, channels of q and k per head.
    """
    q, k, v = (
        part.unflatten(0, (heads, -1)) for part in x.split([heads * d, heads * d, len(x) - 2 * heads * d])
    )
    return torch.cat([d**-0.5 * q, k, v], dim=1).flatten(0, 1)


class Attention(Function):
    r"""Attention of a block within one table of neighbourhoods, with derivatives written by hand.

    Gives y (n_edges, channels), of the last block none, and :math:`\sum_j f_c(r_{ij}) y_{ij}` (n_atoms, channels). Between
    the two passes only what enters is kept. Features stand before slots, (n·heads, d, width): products of matrices with as
    few columns as a head has channels are slow.
    """

    @staticmethod
    def forward(
        ctx: Any,
        block: AttentionLayers,
        geometry: NeighborhoodGeometry,
        joined: Tensor,
        envelope: Tensor,
        directions: Tensor,
    ) -> tuple[Tensor | None, Tensor]:
        """Evaluate, and keep what enters.

        Parameters
        ----------
        block, geometry
            Whose attention, and where; with one table.
        joined : (n_edges, channels)
            What the block's hidden layer gives.
        envelope, directions : (n_edges, 1), (n_edges, 3)
            Of the geometry; derivatives are taken by them.
        """
        ctx.save_for_backward(joined, envelope, directions)
        ctx.block, ctx.geometry = block, geometry
        heads = Heads.of(block, geometry, block.norm(gelu(joined)), envelope, directions)
        y = heads.y().view(len(heads.envelope), -1, heads.envelope.shape[1])
        summed = (y @ heads.envelope[:, :, None]).squeeze(2)
        if block.out_edge is None:
            return None, summed
        return y.mT.reshape(-1, y.shape[1]).index_select(0, geometry.slot), summed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        """Evaluate again up to the softmax, and apply the chain rule."""
        of_y, of_sum = gradients
        assert of_sum is not None
        joined, envelope, directions = ctx.saved_tensors
        (edge,), slot = ctx.geometry.edges, ctx.geometry.slot
        with torch.enable_grad():
            given = joined.detach().requires_grad_()
            t = ctx.block.norm(gelu(given))
        heads = Heads.of(ctx.block, ctx.geometry, t.detach(), envelope, directions)
        y = heads.y()
        of_slots = of_sum[:, :, None] * heads.envelope[:, None]
        if of_y is not None:
            of_slots += in_slots(of_y, [edge])[0].mT
        of_envelope = (of_sum[:, None] @ y.view_as(of_slots)).squeeze(1)
        of_qkv, of_bias, of_cosines = heads.derivatives(of_slots.view_as(y), y)
        of_t = of_qkv.view(len(edge), -1, edge.shape[1]).mT @ heads.matrix
        of_directions = (of_cosines + of_cosines.mT) @ heads.directions
        of_envelope += (of_bias / heads.envelope).masked_fill_(heads.envelope <= 0, 0.0)
        rows = [x.flatten(0, 1).index_select(0, slot) for x in (of_t, of_envelope[:, :, None], of_directions)]
        (of_joined,) = torch.autograd.grad(t, given, rows[0])
        return None, None, of_joined, *rows[1:]


@dataclass(frozen=True)
class Heads:
    r"""Attention of all heads in one table of neighbourhoods, in memory that the next one uses again.

    Attributes
    ----------
    matrix : (heads · (2 d + d_v), channels)
        Maps t to queries, keys and values, head by head; d^-1/2 is in it.
    q, k, v : (n · heads, d or d_v, width)
        Of all slots; zero in the first, which no edge takes.
    sizes
        Channels of q and k of every order of Legendre polynomials.
    envelope, directions : (n, width), (n, width, 3)
        Envelope and unit vectors, zero where there is no edge.
    legendre : (n, width, width) each
        :math:`P_1, P_2, \dots` of the cosines.
    products : (n, heads, width, width) each
        :math:`q^l\cdot k^l` for l = 1, 2, ...
    weights : (n · heads, width, width)
        The softmax of the logits.
    scratch
        The memory.
    """

    matrix: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    sizes: tuple[int, ...]
    envelope: Tensor
    directions: Tensor
    legendre: tuple[Tensor, ...]
    products: tuple[Tensor, ...]
    weights: Tensor
    scratch: Scratch

    @classmethod
    def of(
        cls,
        block: AttentionLayers,
        geometry: NeighborhoodGeometry,
        t: Tensor,
        envelope: Tensor,
        directions: Tensor,
    ) -> Self:
        """Evaluate a block's attention up to its softmax.

        Parameters
        ----------
        block
            Whose weights are used.
        geometry
            With one table.
        t, envelope, directions
            Of all edges.
        """
        (edge,), scratch = geometry.edges, geometry.scratch or Scratch(t)
        (n, width), h, d = edge.shape, block.heads, block.d_logits
        matrix, offset = (by_head(x, h, d) for x in (block.qkv.weight, block.qkv.bias[:, None]))
        slots = scratch.take("slots", (n, len(matrix), width))
        torch.baddbmm(offset, matrix.expand(n, -1, -1), in_slots(t, [edge])[0].mT, out=slots)
        slots[:, :, 0] = 0.0
        slots = slots.view(n * h, -1, width)
        q, k, v = slots.split([d, d, slots.shape[1] - 2 * d], dim=1)
        places = in_slots(torch.cat([envelope, directions], dim=1), [edge])[0]
        envelope, vectors = places[:, :, 0].contiguous(), places[:, :, 1:]
        # minus infinity without an edge, and where round-off is below zero
        bias = envelope.clamp(min=0.0).log()
        bias[:, 0] = 0.0
        polynomials, shape = legendre(vectors @ vectors.mT, geometry.l_max), (n * h, width, width)
        parts = zip(q.split(block.frequencies, 1), k.split(block.frequencies, 1), strict=True)
        logits, *products = (
            torch.bmm(q_l.mT, k_l, out=scratch.take(f"products {order}", shape)).view(n, h, width, width)
            for order, (q_l, k_l) in enumerate(parts)
        )
        logits += bias[:, None, None]
        for p_l, product in zip(polynomials, products, strict=True):
            logits.addcmul_(p_l[:, None], product)
        weights = torch.softmax(logits.view(shape), dim=-1, out=scratch.take("weights", shape))
        return cls(
            matrix,
            q,
            k,
            v,
            block.frequencies,
            envelope,
            vectors,
            polynomials,
            tuple(products),
            weights,
            scratch,
        )

    def y(self) -> Tensor:
        """Weighted sums of the values, (n · heads, d_v, width)."""
        return self.v @ self.weights.mT

    def derivatives(self, of_y: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Derivatives by queries, keys and values, by the logarithms of the envelope, and by the cosines.

        Parameters
        ----------
        of_y : (n · heads, d_v, width)
            Derivatives by y.
        y
            The result.

        Returns
        -------
        of_qkv : (n · heads, 2 d + d_v, width)
        of_bias : (n, width)
        of_cosines : (n, width, width)
        """
        n, width, d = len(self.envelope), self.envelope.shape[1], self.q.shape[1]
        shape = n, len(of_y) // n, width, width
        of_qkv = self.scratch.take("of slots", (len(of_y), 2 * d + of_y.shape[1], width))
        of_qkv[:, 2 * d :] = of_y @ self.weights
        of_logits = torch.bmm(of_y.mT, self.v, out=self.scratch.take("of logits", tuple(self.weights.shape)))
        of_logits.sub_((of_y * y).sum(dim=1)[:, :, None]).mul_(self.weights)
        by_atom, product = of_logits.view(shape), self.scratch.take("products 0", shape)
        of_cosines, first = torch.zeros_like(self.weights[:n]), 0
        for order, (size, slope) in enumerate(zip(self.sizes, legendre_slopes(self.legendre), strict=False)):
            of_product = of_logits
            if order:
                torch.mul(by_atom, self.products[order - 1], out=product)
                of_cosines += slope * product.sum(dim=1)
                torch.mul(by_atom, self.legendre[order - 1][:, None], out=product)
                of_product = product.view_as(of_logits)
            rows = slice(first, first + size)
            of_qkv[:, rows] = self.k[:, rows] @ of_product.mT
            of_qkv[:, d + first : d + first + size] = self.q[:, rows] @ of_product
            first += size
        of_qkv[:, :, 0] = 0.0
        return of_qkv, by_atom.sum(dim=(1, 2)), of_cosines
