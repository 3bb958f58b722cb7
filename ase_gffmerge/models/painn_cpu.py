r"""Messages of PaiNN for inference: edges in blocks that stay in the processor's cache, derivatives in closed form.

The sums over neighbours of :class:`~ase_gffmerge.models.painn.Message` are bound by memory, not by arithmetic: step by step
they write some forty numbers per edge and channel to main memory. With :math:`b_e = f_c(r_e)\,(\mathrm{rbf}(r_e), 1)` and
the maps :math:`M = (W_f, b_f)^\top` the filters are :math:`W_e = b_e M`, and what does not depend on the edge moves to the
sender j, :math:`u_j = v_j\,\varphi_{vv,j}`:

.. math::

   \Delta s_i = \sum_e \varphi_{s,j} W_{s,e},\qquad
   \Delta v_i = \sum_e u_j W_{vv,e} + p_e \hat{\mathbf r}_e,\qquad p_e = \varphi_{vs,j} W_{vs,e}.

For gradients :math:`g^s_i, g^v_i` of the energy with respect to these sums, and :math:`q_e = g^v_i\cdot\hat{\mathbf r}_e`,

.. math::

   \frac{\partial E}{\partial(\varphi_s, \varphi_{vs}, u)_j} = \sum_e (g^s_i W_s,\ q_e W_{vs},\ g^v_i W_{vv}),\qquad
   \frac{\partial E}{\partial b_e} = (g^s_i \varphi_s,\ g^v_i\cdot u_j,\ q_e\varphi_{vs})\,M^\top,\qquad
   \frac{\partial E}{\partial\hat{\mathbf r}_e} = \langle g^v_i, p_e\rangle .

Nothing of the size of the edges times the channels is kept between the two passes.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.functional import silu

from ase_gffmerge.models.base import EdgeGeometry, Stage, State

if TYPE_CHECKING:
    from ase_gffmerge.models.painn import Message

BLOCK = 32_768
"""Edges times channels of one block: its dozen temporaries then fit into 2 MB."""


class InferenceMessage(Stage):
    """The same sums as a message layer, for weights that stay as they are.

    What fits into one block, and everything on other devices than a CPU, is left to the layer itself.

    Parameters
    ----------
    message
        A :class:`~ase_gffmerge.models.painn.Message`; its weights are shared, but those of the filters are also kept in
        another layout.
    """

    emits_scalars = False
    maps: Tensor

    def __init__(self, message: "Message"):
        super().__init__()
        self.message = message
        maps = torch.cat([message.filters.weight, message.filters.bias[:, None]], dim=1).T.contiguous()
        self.register_buffer("maps", maps.detach(), persistent=False)

    def forward(self, state: State, geometry: EdgeGeometry) -> State:
        """Add Δs and Δv."""
        scalars, vectors = state
        if scalars.device.type != "cpu" or len(geometry.sender) * scalars.shape[1] <= BLOCK:
            return self.message(state, geometry)
        phi = self.message.out(silu(self.message.hidden(scalars)))
        s, vv, vs = phi[:, None].chunk(3, dim=-1)
        nodes = torch.cat([s, vs, vectors * vv], dim=1)
        sums = BlockedSums.apply(
            nodes, geometry.enveloped, geometry.angular, self.maps, geometry.sender, geometry.receiver
        )
        for_scalars, for_vectors = sums.split((1, 3), dim=1)
        return scalars + for_scalars.squeeze(1), vectors + for_vectors


class BlockedSums(Function):
    """Δs and Δv (n_atoms, 1 + 3, channels) from nodes (φ_s, φ_vs, u), features b, directions and maps M."""

    @staticmethod
    def forward(
        ctx: Function,
        nodes: Tensor,
        features: Tensor,
        directions: Tensor,
        maps: Tensor,
        sender: Tensor,
        receiver: Tensor,
    ) -> Tensor:
        """Sum the messages of one block of edges after the other.

        Parameters
        ----------
        ctx
            Keeps what the derivatives need.
        nodes : (n_atoms, 5, channels)
            φ_s, φ_vs and u of the sending atoms.
        features, directions : (n_edges, n_radial + 1), (n_edges, 3)
            Radial functions times the envelope, and unit vectors.
        maps : (n_radial + 1, 3 channels)
            From radial functions to filters.
        sender, receiver : (n_edges,)
            Atoms of the edges.
        """
        ctx.save_for_backward(nodes, features, directions, maps, sender, receiver)
        sums = nodes.new_zeros(len(nodes), 4, nodes.shape[2])
        for block in blocks(sender, nodes.shape[2]):
            w_s, w_vv, w_vs = (features[block] @ maps).chunk(3, dim=1)
            x, r = nodes.index_select(0, sender[block]), directions[block]
            message, p = x.new_empty(len(x), 4, x.shape[2]), x[:, 1] * w_vs
            torch.mul(x[:, 0], w_s, out=message[:, 0])
            torch.mul(x[:, 2:], w_vv[:, None], out=message[:, 1:])
            for k in range(3):  # one component at a time: broadcasting over two axes is ten times slower
                message[:, 1 + k].addcmul_(p, r[:, k, None])
            sums.index_add_(0, receiver[block], message)
        return sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Function, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Derivatives with respect to nodes, features and directions; filters are evaluated again."""
        saved: tuple[Tensor, ...] = ctx.saved_tensors
        nodes, features, directions, maps, sender, receiver = saved
        for_nodes = torch.zeros_like(nodes) if ctx.needs_input_grad[0] else None
        for_features, for_directions = torch.empty_like(features), torch.empty_like(directions)
        for block in blocks(sender, nodes.shape[2]):
            filters = features[block] @ maps
            w_s, w_vv, w_vs = filters.chunk(3, dim=1)
            x, r = nodes.index_select(0, sender[block]), directions[block]
            g = gradient.index_select(0, receiver[block])
            q = along(g[:, 1:], r)
            for_directions[block] = (g[:, 1:] * (x[:, 1] * w_vs)[:, None]).sum(dim=2)
            for_filters = torch.cat([x[:, 0] * g[:, 0], inner(x[:, 2:], g[:, 1:]), x[:, 1] * q], dim=1)
            torch.mm(for_filters, maps.T, out=for_features[block])
            if for_nodes is not None:
                y = torch.empty_like(x)
                torch.mul(g[:, 0], w_s, out=y[:, 0])
                torch.mul(q, w_vs, out=y[:, 1])
                torch.mul(g[:, 1:], w_vv[:, None], out=y[:, 2:])
                for_nodes.index_add_(0, sender[block], y)
        return for_nodes, for_features, for_directions, None, None, None


def along(vectors: Tensor, directions: Tensor) -> Tensor:
    """Components (n, channels) of vectors (n, 3, channels) along directions (n, 3)."""
    x, y, z = directions[:, :, None].unbind(1)
    return (vectors[:, 0] * x).addcmul_(vectors[:, 1], y).addcmul_(vectors[:, 2], z)


def inner(one: Tensor, other: Tensor) -> Tensor:
    """Inner products (n, channels) of vectors (n, 3, channels)."""
    return (one[:, 0] * other[:, 0]).addcmul_(one[:, 1], other[:, 1]).addcmul_(one[:, 2], other[:, 2])


def blocks(edges: Tensor, channels: int) -> Iterator[slice]:
    """Slices of the edges that fit the cache."""
    size = max(BLOCK // channels, 1)
    for start in range(0, len(edges), size):
        yield slice(start, start + size)
