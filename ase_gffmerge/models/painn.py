r"""PaiNN, the polarisable atom interaction network (Schütt, Unke, Gastegger, arXiv 2102.03150).

========================================  =======================================
equation                                  variable
========================================  =======================================
scalars s_i, vectors v_i                  ``scalars`` (n, F), ``vectors`` (n, 3, F)
φ(s) = W_2 silu(W_1 s + b_1) + b_2        ``hidden``, ``out`` of :class:`Message`
W(r) = (W_f rbf(r) + b_f) f_c(r)          ``filters``
Δs_i = Σ_j φ_s(s_j) W_s                   eq. 7
Δv_i = Σ_j v_j φ_vv W_vv + φ_vs W_vs r̂    eq. 8
Δs_i = a_ss + a_sv ⟨U v_i, V v_i⟩         eq. 9
Δv_i = a_vv U v_i                         eq. 10
========================================  =======================================

Messages of PaiNN for inference: edges in blocks that stay in the processor's cache, derivatives in closed form.

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
from copy import copy
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.functional import silu

from ase_gffmerge.graphs.graph import Topology
from ase_gffmerge.models.base import EdgeGeometry, HyperParameters, Potential, Stage, State
from ase_gffmerge.models.layers.linear import take_rows

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


NORM_OFFSET = 1e-8


@dataclass(frozen=True, kw_only=True)
class PaiNNHyper(HyperParameters):
    """Hyper-parameters of :class:`PaiNN`.

    Attributes
    ----------
    norm_offset
        ε of the norms :math:`(|V v|^2 + ε)^{1/2}`. They vanish where symmetry makes the vectors vanish, as on an inversion
        centre; within :math:`|V v| < ε^{1/2}` of it forces turn round, so that a small ε makes a cusp. The default is that
        of files that do not say; ``gffmerge train`` begins new models with a larger one.
    """

    norm_offset: float = NORM_OFFSET


class Message(Stage):
    """Sum of messages over neighbours."""

    emits_scalars = False

    def __init__(self, channels: int, n_radial: int):
        super().__init__()
        self.filters = nn.Linear(n_radial, 3 * channels)
        self.hidden = nn.Linear(channels, channels)
        self.out = nn.Linear(channels, 3 * channels)

    def forward(self, state: State, geometry: EdgeGeometry) -> State:
        """Add Δs (eq. 7) and Δv (eq. 8)."""
        scalars, vectors = state
        sender, receiver = geometry.sender, geometry.receiver
        filters = self.filters(geometry.radial) * geometry.envelope
        phi = self.out(silu(self.hidden(scalars)))
        s, vv, vs = (take_rows(phi, sender) * filters).chunk(3, dim=-1)
        messages = take_rows(vectors, sender) * vv[:, None] + vs[:, None] * geometry.angular[:, :, None]
        return scalars.index_add(0, receiver, s), vectors.index_add(0, receiver, messages)


class Update(Stage):
    """Mixing of scalars and vectors on one atom."""

    gathers = False

    def __init__(self, channels: int, norm_offset: float):
        super().__init__()
        self.norm_offset = norm_offset
        self.U = nn.Linear(channels, channels, bias=False)
        self.V = nn.Linear(channels, channels, bias=False)
        self.hidden = nn.Linear(2 * channels, channels)
        self.out = nn.Linear(channels, 3 * channels)

    def forward(self, state: State, geometry: EdgeGeometry) -> State:
        """Add Δs (eq. 9) and Δv (eq. 10)."""
        scalars, vectors = state
        u, v = self.U(vectors), self.V(vectors)
        norm = (v.square().sum(dim=1) + self.norm_offset).sqrt()
        a = self.out(silu(self.hidden(torch.cat([scalars, norm], dim=-1))))
        ss, sv, vv = a.chunk(3, dim=-1)
        return scalars + ss + sv * (u * v).sum(dim=1), vectors + vv[:, None] * u


class PaiNN(Potential):
    """PaiNN with a Bessel basis and a polynomial envelope.

    Parameters
    ----------
    hyper
        Hyper-parameters.
    species
        Atomic numbers.
    """

    architecture: ClassVar[str] = "painn"
    node_entries: ClassVar[int] = 2
    Hyper: ClassVar[type[HyperParameters]] = PaiNNHyper

    def __init__(self, hyper: PaiNNHyper, species: tuple[int, ...]):
        super().__init__(hyper, species)
        for _ in range(hyper.n_blocks):
            self.stages.append(Message(hyper.channels, hyper.n_radial))
            self.stages.append(Update(hyper.channels, hyper.norm_offset))

    def for_inference(self) -> Self:
        """Give a copy with messages in blocks (:class:`.InferenceMessage`), which shares the weights."""
        twin = copy(self)
        twin._modules = dict(self._modules)
        twin.stages = nn.ModuleList(
            InferenceMessage(stage) if type(stage) is Message else stage for stage in self.stages
        ).train(self.training)
        return twin

    def embed(self, graph: Topology) -> State:
        """Element embeddings and zero vectors."""
        scalars = self.embedded(graph)
        return scalars, scalars.new_zeros(len(scalars), 3, self.hyper.channels)

    def angular(self, directions: Tensor) -> Tensor:
        """Unit vectors as they are."""
        return directions

    def scalars(self, state: State) -> Tensor:
        """Return the scalars s (n_atoms, channels)."""
        return state[0]

    def vectors(self, state: State) -> Tensor:
        """Return the vectors v (n_atoms, 3, channels)."""
        return state[1]
