r"""EScAIP, the efficiently scaled attention interatomic potential (Qu and Krishnapriyan, arXiv 2410.24169), conservative.

Every edge ij (from atom i to its neighbour j) carries features, and the edges of one atom attend to each other. With
features h of the atoms and e of the edges, radial functions b, the envelope :math:`f_c`, heads a and Legendre polynomials
:math:`P_l` (the products :math:`Y_l\cdot Y_l'` of the spherical harmonics by which the authors multiply q and k), a block is

.. math::

   t_{ij} &= \mathrm{RMSNorm}\big(\mathrm{gelu}(W_t\,[b_{ij};\, e_{ij};\, h_i;\, h_j])\big),\qquad
   (q, k, v)_{ij} = W_{qkv}\, t_{ij} \\
   s^a_{i,jk} &= d^{-1/2} \sum_l P_l(\cos\vartheta_{jik})\; q^{al}_{ij}\cdot k^{al}_{ik},\qquad
   y^a_{ij} = \frac{\sum_k f_c(r_{ik})\, e^{s^a_{i,jk}}\, v^a_{ik}}{1 + \sum_k f_c(r_{ik})\, e^{s^a_{i,jk}}} \\
   h_i' &= h_i + W_h \sum_j f_c(r_{ij})\, y_{ij},\qquad e_{ij}' = e_{ij} + W_e\, y_{ij},\qquad
   x \to x + W_2\,\mathrm{gelu}(W_1\,\mathrm{RMSNorm}(x)) \text{ for } x = h, e .

========================================  ================================================
equation                                  variable
========================================  ================================================
h (n_atoms, C), e (n_edges, C)            ``state``
b, f_c, P_l                               ``geometry.radial``, ``.envelope``, ``Table.legendre``
W_t, W_qkv, W_h, W_e                      ``hidden``, ``qkv``, ``out_node``, ``out_edge``
d, numbers of channels of q^{al}          sum of ``frequency_list``, its entries
========================================  ================================================

Differences to the authors' network, all for conserved energies: forces are derivatives; all neighbours within the cutoff
take part, and not the nearest 30; the envelope stands before every exponential (as its logarithm in a plain softmax, which
has derivatives of every order), and a one in the denominator, so that energies have two continuous derivatives where a
neighbour comes or goes, also the first one. Neighbourhoods are padded to a few common widths for matrix products
(:mod:`.neighborhoods`); slots without an edge have the factor 0 and bring nothing.
"""

from copy import copy
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from e3nn.o3 import SphericalHarmonics
from torch import Tensor, nn
from torch.nn.functional import gelu

from ase_gffmerge.graphs.graph import Topology, TracedTopology
from ase_gffmerge.models.base import HyperParameters, Potential, State
from ase_gffmerge.models.layers import eager_e3nn, keep_plain
from ase_gffmerge.models.layers.attention import Attention
from ase_gffmerge.models.layers.linear import JoinedLinear
from ase_gffmerge.models.layers.neighborhoods import (
    InferenceStage,
    NeighborhoodGeometry,
    NeighborhoodStage,
    Table,
    neighborhoods,
    neighborhoods_of_width,
)

NORM_OFFSET = 1e-6


@dataclass(frozen=True, kw_only=True)
class EScAIPHyper(HyperParameters):
    """Hyper-parameters of :class:`EScAIP`, named as the authors do; ``channels`` are their ``hidden_size``.

    Attributes
    ----------
    atten_num_heads
        Heads of the attention, a divisor of ``channels``.
    frequency_list
        Channels of queries and keys per head for every order l = 0, 1, ... of Legendre polynomials.
    ffn_hidden_layer_multiplier
        Width of the feed-forward networks over ``channels``.
    """

    atten_num_heads: int = 4
    frequency_list: tuple[int, ...] = (8, 4, 4)
    ffn_hidden_layer_multiplier: int = 2

    def __post_init__(self) -> None:
        """Raise ``TypeError`` or ``ValueError`` for values that make no network."""
        super().__post_init__()
        listed = self.frequency_list
        if not isinstance(listed, tuple | list) or not all(type(n) is int for n in listed):
            raise TypeError(f"frequency_list must be a list of whole numbers, not {listed!r}")
        if not listed or min(listed) < 0 or not any(listed):
            raise ValueError(f"frequency_list must be counts, not all of them zero, not {list(listed)}")
        if self.channels % self.atten_num_heads:
            raise ValueError(
                f"atten_num_heads {self.atten_num_heads} does not divide {self.channels} channels"
            )
        object.__setattr__(self, "frequency_list", tuple(listed))  # files hold lists


class FeedForward(nn.Module):
    """A network of one hidden layer on what a norm gives, added to its input."""

    def __init__(self, channels: int, multiplier: int):
        super().__init__()
        self.norm = nn.RMSNorm(channels, eps=NORM_OFFSET)
        self.hidden = nn.Linear(channels, multiplier * channels)
        self.out = nn.Linear(multiplier * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, channels) to (n, channels)."""
        return x + self.out(gelu(self.hidden(self.norm(x))))


class Input(NeighborhoodStage):
    r"""First features of the edges, and bond-orientational order of the atoms.

    An atom is given :math:`|\sum_j f_c(r_{ij}) Y_l(\hat{\mathbf r}_{ij})|^2` for every l.
    """

    emits_scalars = False

    def __init__(self, hyper: EScAIPHyper):
        super().__init__()
        orders = range(len(hyper.frequency_list))
        self.orders = [2 * order + 1 for order in orders]
        with eager_e3nn():
            self.harmonics = SphericalHarmonics(list(orders), normalize=False, normalization="norm")
        self.hidden = JoinedLinear(hyper.n_radial + 2 * hyper.channels, hyper.channels)
        self.out = nn.Linear(hyper.channels, hyper.channels)
        self.orientation = nn.Linear(len(hyper.frequency_list), hyper.channels)

    def update(self, state: State, joined: Tensor, geometry: NeighborhoodGeometry) -> State:
        """Change h, and add e."""
        summed = geometry.sums(geometry.envelope * self.harmonics(geometry.angular)).square()
        orders = [x.sum(dim=1) for x in summed.split(self.orders, dim=1)]
        return state[0] + self.orientation(torch.stack(orders, dim=1)), self.out(gelu(joined))


class Block(NeighborhoodStage):
    """Attention within neighbourhoods, and feed-forward networks.

    Parameters
    ----------
    hyper
        Hyper-parameters.
    last
        Whether it leaves out the edges, which nothing reads any more.
    """

    def __init__(self, hyper: EScAIPHyper, *, last: bool):
        super().__init__()
        channels, self.heads, self.frequencies = hyper.channels, hyper.atten_num_heads, hyper.frequency_list
        self.d_logits = sum(self.frequencies)
        self.hidden = JoinedLinear(hyper.n_radial + 3 * channels, channels)
        self.norm = nn.RMSNorm(channels, eps=NORM_OFFSET)
        self.qkv = nn.Linear(channels, 2 * self.heads * self.d_logits + channels)
        self.out_node = nn.Linear(channels, channels, bias=False)
        self.ffn_node = FeedForward(channels, hyper.ffn_hidden_layer_multiplier)
        self.out_edge: nn.Linear | None = None
        self.ffn_edge: FeedForward | None = None
        if not last:
            self.out_edge = nn.Linear(channels, channels)
            self.ffn_edge = FeedForward(channels, hyper.ffn_hidden_layer_multiplier)

    def update(self, state: State, joined: Tensor, geometry: NeighborhoodGeometry) -> State:
        """Change h and e; the last block gives h alone."""
        nodes, edges = state
        if geometry.scratch is None:
            y = self.attention(self.norm(gelu(joined)), geometry)
            summed = geometry.sums(y * geometry.envelope)
        else:
            y, summed = Attention.apply(self, geometry, joined, geometry.envelope, geometry.angular)
        nodes = self.ffn_node(nodes + self.out_node(summed))
        if self.out_edge is None or self.ffn_edge is None:
            return (nodes,)
        return nodes, self.ffn_edge(edges + self.out_edge(y))

    def attention(self, t: Tensor, geometry: NeighborhoodGeometry) -> Tensor:
        """Map t (n_edges, channels) to y (n_edges, channels)."""
        slots = zip(geometry.in_slots(self.qkv(t)), geometry.tables, strict=True)
        return geometry.from_slots([self.attend(qkv, table) for qkv, table in slots])

    def attend(self, qkv: Tensor, table: Table) -> Tensor:
        """Map queries, keys and values (n, width, ...) to y (n, width, channels)."""
        size = self.heads * self.d_logits
        slots = qkv.split([size, size, qkv.shape[2] - 2 * size], dim=2)
        q, k, v = (x.unflatten(2, (self.heads, -1)).transpose(1, 2) for x in slots)
        q = self.d_logits**-0.5 * q
        parts = zip(q.split(self.frequencies, dim=3), k.split(self.frequencies, dim=3), strict=True)
        products = [q_l @ k_l.mT for q_l, k_l in parts]
        logits = products[0] + table.bias[:, None, None]
        for p_l, product in zip(table.legendre, products[1:], strict=True):
            logits = torch.addcmul(logits, p_l[:, None], product)
        return (torch.softmax(logits, dim=-1) @ v).transpose(1, 2).flatten(2)


class BlockReadouts(nn.Module):
    r"""Energy :math:`e_i = \sum_l w_l\cdot\mathrm{gelu}(W_l\,\mathrm{RMSNorm}(h^l_i) + b_l) + c_l`, of every block."""

    def __init__(self, channels: int, n_blocks: int):
        super().__init__()
        self.norm = nn.ModuleList(nn.RMSNorm(channels, eps=NORM_OFFSET) for _ in range(n_blocks))
        width = max(channels // 2, 1)
        self.hidden = nn.ModuleList(nn.Linear(channels, width) for _ in range(n_blocks))
        self.out = nn.ModuleList(nn.Linear(width, 1, bias=i == 0) for i in range(n_blocks))

    def forward(self, scalars: list[Tensor], species: Tensor) -> Tensor:
        """Map L tensors (n_atoms, channels) to energies (n_atoms,) in eV."""
        terms = [
            out(gelu(hidden(norm(x))))
            for x, norm, hidden, out in zip(scalars, self.norm, self.hidden, self.out, strict=True)
        ]
        return torch.stack(terms).sum(dim=0).squeeze(-1)


class EScAIP(Potential):
    """EScAIP with a Bessel basis and a polynomial envelope.

    Parameters
    ----------
    hyper
        Hyper-parameters.
    species
        Atomic numbers.
    """

    architecture: ClassVar[str] = "escaip"
    pads_neighborhoods: ClassVar[bool] = True
    Hyper: ClassVar[type[HyperParameters]] = EScAIPHyper
    hyper: EScAIPHyper

    def __init__(self, hyper: EScAIPHyper, species: tuple[int, ...]):
        super().__init__(hyper, species)
        self.stages.append(Input(hyper))
        for block in range(hyper.n_blocks):
            self.stages.append(Block(hyper, last=block == hyper.n_blocks - 1))
        keep_plain(self)

    def for_inference(self) -> Self:
        """Give a copy that evaluates neighbourhoods in chunks (:class:`InferenceStage`), which shares the weights."""
        twin = copy(self)
        twin._modules = dict(self._modules)
        twin.stages = nn.ModuleList(
            InferenceStage(stage) for stage in self.stages if isinstance(stage, NeighborhoodStage)
        ).train(self.training)
        return twin

    def own_readout(self) -> nn.Module:
        """Read the atoms' features after every block."""
        return BlockReadouts(self.hyper.channels, self.hyper.n_blocks)

    def embed(self, graph: Topology) -> State:
        """Element embeddings; the first stage adds features of the edges."""
        return (self.embedded(graph),)

    def angular(self, directions: Tensor) -> Tensor:
        """Unit vectors as they are."""
        return directions

    def geometry(self, vectors: Tensor, graph: Topology) -> NeighborhoodGeometry:
        """Give every edge a slot in its receiver's neighbourhood."""
        sender, receiver = graph.edge_index
        radial, envelope, angular = self.edge_functions(vectors)
        if isinstance(graph, TracedTopology):
            places = neighborhoods_of_width(receiver, len(graph), graph.width)
        else:
            places = neighborhoods(receiver, len(graph))
        l_max = len(self.hyper.frequency_list) - 1
        return NeighborhoodGeometry(sender, receiver, radial, envelope, angular, *places, len(graph), l_max)

    def scalars(self, state: State) -> Tensor:
        """Return the features h of the atoms (n_atoms, channels)."""
        return state[0]
