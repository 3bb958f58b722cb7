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
"""

from copy import copy
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from ase_gffmerge.graphs.graph import Topology
from ase_gffmerge.models.base import EdgeGeometry, HyperParameters, Potential, Stage, State
from ase_gffmerge.models.layers.linear import take_rows
from ase_gffmerge.models.painn_cpu import InferenceMessage

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
    Hyper: ClassVar[type[HyperParameters]] = PaiNNHyper

    def __init__(self, hyper: PaiNNHyper, species: tuple[int, ...]):
        super().__init__(hyper, species)
        for _ in range(hyper.n_blocks):
            self.stages.append(Message(hyper.channels, hyper.n_radial))
            self.stages.append(Update(hyper.channels, hyper.norm_offset))

    def for_inference(self) -> Self:
        """Give a copy with messages in blocks (:mod:`.painn_cpu`), which shares the weights."""
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
