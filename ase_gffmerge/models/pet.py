r"""PET, the point-edge transformer (Pozdnyakov and Ceriotti, arXiv 2305.19302), as the package ``metatrain`` builds it.

An atom i and its edges ij are the tokens of a transformer. Features are h of the atoms and m of the edges. In a layer,

.. math::

   t_{ij} &= W_2\,\mathrm{silu}(W_1\,[W_r\,[\mathbf r_{ij};\, r_{ij}];\; b_{z_j};\; m_{ij}]),\qquad
   (q, k, v) = W_{qkv}\,\mathrm{norm}(x) \;\text{ of } x = h_i, t_{i1}, t_{i2}, \dots \\
   y_a &= \sum_b \frac{f_b\, e^{s\,q_a\cdot k_b}\, v_b}{\sum_c f_c\, e^{s\,q_a\cdot k_c}},\qquad
   f = 1 \text{ of the atom, and the cutoff function of } r_{ij} \text{ of an edge,}

with feed-forward networks after every attention. The edge ji brings what the layer made of it to the edge ij. Energies are
read from features after two layers of heads, :math:`e_i = w\cdot g_i + c + \sum_j f_{ij}\,(w'\cdot g_{ij} + c')`: linear in
:math:`x_i = [g_i;\; \sum_j f_{ij}\,g_{ij};\; \sum_j f_{ij}]`, which are the scalars here.

Edge vectors enter as they are, so that energies are *not* invariant under rotations by construction: a trained network has
learned to be so, about. They are under translations and permutations, and forces are derivatives of the energy.

==================================  ===========================================
equation                            variable
==================================  ===========================================
h (n_atoms, d_node), m, f           ``state``
:math:`W_r, W_1, W_2, b`            ``edges``, ``compress``, ``neighbors``
s                                   ``scale``: over the root of the size of a head
==================================  ===========================================
"""

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from ase_gffmerge.graphs.graph import Topology
from ase_gffmerge.models.base import HyperParameters, Potential, Stage, State
from ase_gffmerge.models.layers.linear import reversed_edges, take_rows
from ase_gffmerge.models.layers.neighborhoods import from_slots, in_slots, neighborhoods
from ase_gffmerge.models.layers.readout import (
    LinearReadouts,
    adaptive_cutoffs,
    bump_cutoff,
    cosine_cutoff,
)

NORMS = {"RMSNorm": nn.RMSNorm, "LayerNorm": nn.LayerNorm}
CHOICES = {
    "normalization": tuple(NORMS),
    "activation": ("SwiGLU", "SiLU"),
    "transformer_type": ("PreLN", "PostLN"),
    "featurizer_type": ("feedforward", "residual"),
    "cutoff_function": ("Bump", "Cosine"),
    "adaptive_cutoff_method": ("solver", "grid"),
}
OFFSET, LEAST_FACTOR = 1e-15, 1e-15
"""Added to the squares of lengths; and least factor of an edge in the attention."""


@dataclass(frozen=True, kw_only=True)
class PETHyper(HyperParameters):
    """Hyper-parameters of :class:`PET`, named and with defaults as in ``metatrain``.

    Attributes
    ----------
    channels, n_blocks
        Of the scalars, which follow: 2 d_head + 1, and as many as there are layers that are read.
    d_pet, d_node, d_head, d_feedforward
        Features of edges, atoms and heads, and of the hidden layers between.
    num_heads, num_attention_layers, num_gnn_layers
        Heads of an attention, attentions of a layer, and layers.
    normalization, activation, transformer_type
        ``RMSNorm`` or ``LayerNorm``, ``SwiGLU`` or ``SiLU``, before the attention (``PreLN``) or after it (``PostLN``).
    attention_temperature
        Over which products of queries and keys are divided.
    featurizer_type
        ``feedforward``: the last layer is read; ``residual``: every layer, which begins from elements.
    cutoff_function, cutoff_width
        ``Bump`` or ``Cosine``, and over which length (Å) it falls.
    num_neighbors_adaptive, adaptive_cutoff_method, cutoff_width_adaptive
        About how many neighbours every atom has, by a cutoff of its own; how it is found, ``solver`` or ``grid``, and over
        which length (Å) a neighbour is counted in part. ``None``: those within ``cutoff``.
    """

    cutoff: float = 4.5
    channels: int = 257
    n_blocks: int = 1
    d_pet: int = 128
    d_node: int = 256
    d_head: int = 128
    d_feedforward: int = 256
    num_heads: int = 8
    num_attention_layers: int = 2
    num_gnn_layers: int = 2
    normalization: str = "RMSNorm"
    activation: str = "SwiGLU"
    transformer_type: str = "PreLN"
    attention_temperature: float = 1.0
    featurizer_type: str = "feedforward"
    cutoff_function: str = "Bump"
    cutoff_width: float = 0.5
    num_neighbors_adaptive: int | None = None
    adaptive_cutoff_method: str = "solver"
    cutoff_width_adaptive: float = 1.0

    def __post_init__(self) -> None:
        """Raise ``TypeError`` or ``ValueError`` for values that make no network."""
        object.__setattr__(self, "channels", 2 * self.d_head + 1)
        object.__setattr__(self, "n_blocks", self.num_gnn_layers if self.residual else 1)
        super().__post_init__()
        for name, known in CHOICES.items():
            if (value := getattr(self, name)) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, not {value!r}")
        if self.num_neighbors_adaptive is not None and not self.num_neighbors_adaptive > 0:
            raise ValueError(f"num_neighbors_adaptive must be positive, not {self.num_neighbors_adaptive!r}")
        if self.d_pet % self.num_heads:
            raise ValueError(f"num_heads {self.num_heads} does not divide d_pet {self.d_pet}")

    @property
    def residual(self) -> bool:
        """Whether every layer is read."""
        return self.featurizer_type == "residual"


@dataclass(frozen=True)
class TokenGeometry:
    """Edges, and the slots of all tokens: the atoms', then the edges'.

    Attributes
    ----------
    species : (n_atoms,)
        Rows of the elements.
    sender, receiver, reverse : (n_edges,)
        Atoms of an edge, and the edge of the other direction.
    slots, slot
        See :attr:`.NeighborhoodGeometry.edges`, of tokens.
    vectors : (n_edges, 3)
        Å.
    """

    species: Tensor
    sender: Tensor
    receiver: Tensor
    reverse: Tensor
    slots: tuple[Tensor, ...]
    slot: Tensor
    vectors: Tensor

    @property
    def parts(self) -> State:
        """The edge vectors."""
        return (self.vectors,)

    def with_parts(self, parts: State) -> Self:
        """Replace the edge vectors."""
        return replace(self, vectors=parts[0])

    @property
    def lengths(self) -> Tensor:
        """Of the edges (n_edges, 1) in Å."""
        return (self.vectors.square().sum(dim=1, keepdim=True) + OFFSET).sqrt()


def cutoff_factors(geometry: TokenGeometry, hyper: PETHyper) -> Tensor:
    """Cutoff function of the lengths (n_edges, 1); that of an edge ends at the mean of its atoms' cutoffs."""
    lengths, cutoff = geometry.lengths, hyper.cutoff
    function = cosine_cutoff if hyper.cutoff_function == "Cosine" else bump_cutoff
    if hyper.num_neighbors_adaptive is None:
        return function(lengths, cutoff, hyper.cutoff_width)
    own = adaptive_cutoffs(
        lengths,
        geometry.receiver,
        len(geometry.species),
        neighbors=hyper.num_neighbors_adaptive,
        cutoff=cutoff,
        width=hyper.cutoff_width_adaptive,
        method=hyper.adaptive_cutoff_method,
    )
    mean = 0.5 * (take_rows(own, geometry.receiver) + take_rows(own, geometry.sender))
    return function(lengths, mean, hyper.cutoff_width)


class Start(Stage):
    """First features of the edges, by the elements of their senders, and cutoff factors."""

    emits_scalars = False

    def __init__(self, hyper: PETHyper, n_species: int):
        super().__init__()
        self.hyper, self.gathers = hyper, hyper.num_neighbors_adaptive is not None
        self.elements = nn.Parameter(torch.randn(n_species, hyper.d_pet))

    def forward(self, state: State, geometry: TokenGeometry) -> State:
        """Add m and f to the atoms' features."""
        messages = take_rows(self.elements, geometry.species[geometry.sender])
        return state[0], messages, cutoff_factors(geometry, self.hyper)


class FeedForward(nn.Module):
    """A network of one hidden layer, gated (``SwiGLU``) or not."""

    def __init__(self, d_in: int, hidden: int, activation: str):
        super().__init__()
        self.gated = activation == "SwiGLU"
        self.w_in = nn.Linear(d_in, hidden * (1 + self.gated))
        self.w_out = nn.Linear(hidden, d_in)

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, d_in) to (n, d_in)."""
        x = self.w_in(x)
        if self.gated:
            value, gate = x.chunk(2, dim=-1)
            x = value * torch.sigmoid(gate)
        else:
            x = silu(x)
        mapped: Tensor = self.w_out(x)
        return mapped


class Attention(nn.Module):
    """Attention among the tokens of every atom, and feed-forward networks."""

    def __init__(self, hyper: PETHyper):
        super().__init__()
        d, d_node, norm = hyper.d_pet, hyper.d_node, NORMS[hyper.normalization]
        self.heads, self.before = hyper.num_heads, hyper.transformer_type == "PreLN"
        self.scale = 1 / (math.sqrt(d // hyper.num_heads) * hyper.attention_temperature)
        self.input_linear, self.output_linear = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.norm_attention, self.norm_mlp = norm(d), norm(d)
        self.mlp = FeedForward(d, hyper.d_feedforward, hyper.activation)
        self.expanded = d_node != d
        if self.expanded:
            self.center_contraction, self.center_expansion = nn.Linear(d_node, d), nn.Linear(d, d_node)
            self.norm_center_features = norm(d_node)
            self.center_mlp = FeedForward(d_node, 2 * d_node, hyper.activation)

    def forward(self, nodes: Tensor, edges: Tensor, bias: list[Tensor], geometry: TokenGeometry) -> State:
        """Change features of atoms (n_atoms, d_node) and edges (n_edges, d_pet)."""
        contracted = self.center_contraction(nodes) if self.expanded else nodes
        tokens = torch.cat([contracted, edges])
        sizes = (len(nodes), len(edges))
        if self.before:
            new_nodes, new_edges = self._attend(self.norm_attention(tokens), bias, geometry).split(sizes)
            new_edges = edges + new_edges
            new_edges = new_edges + self.mlp(self.norm_mlp(new_edges))
        else:
            tokens = self.norm_attention(tokens + self._attend(tokens, bias, geometry))
            new_nodes, new_edges = self.norm_mlp(tokens + self.mlp(tokens)).split(sizes)
        if self.expanded:
            new_nodes = nodes + self.center_expansion(new_nodes)
            new_nodes = new_nodes + self.center_mlp(self.norm_center_features(new_nodes))
        return new_nodes, new_edges

    def _attend(self, tokens: Tensor, bias: list[Tensor], geometry: TokenGeometry) -> Tensor:
        """Map all tokens (n_atoms + n_edges, d_pet) to what the attention gives."""
        tables = []
        for table, own in zip(in_slots(self.input_linear(tokens), geometry.slots), bias, strict=True):
            q, k, v = table.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            weights = torch.softmax(self.scale * (q @ k.mT) + own[:, None, None], dim=-1)
            tables.append((weights @ v).transpose(1, 2).flatten(2))
        attended: Tensor = self.output_linear(from_slots(tables, geometry.slot))
        return attended


class Layer(Stage):
    """Attention among an atom and its edges, and what the reversed edges bring; messages of the ``first`` tell elements."""

    emits_scalars = False

    def __init__(self, hyper: PETHyper, n_species: int, *, first: bool):
        super().__init__()
        d, self.residual = hyper.d_pet, hyper.residual
        self.edges = nn.Linear(4, d)
        self.compress = nn.ModuleList([nn.Linear((2 if first else 3) * d, d), nn.Linear(d, d)])
        self.neighbors = None if first else nn.Parameter(torch.randn(n_species, d))
        self.elements = (
            nn.Parameter(torch.randn(n_species, hyper.d_node)) if self.residual and not first else None
        )
        self.attentions = nn.ModuleList(Attention(hyper) for _ in range(hyper.num_attention_layers))
        self.combine = nn.ModuleList()
        if not self.residual:
            self.combine_norm = nn.LayerNorm(2 * d)
            self.combine.extend([nn.Linear(2 * d, 2 * d), nn.Linear(2 * d, d)])

    def forward(self, state: State, geometry: TokenGeometry) -> State:
        """Change h and m; a layer that is read by itself gives the edges' features after h."""
        nodes, messages, factors = state
        if self.elements is not None:
            nodes = take_rows(self.elements, geometry.species)
        joined = [self.edges(torch.cat([geometry.vectors, geometry.lengths], dim=1))]
        if self.neighbors is not None:
            joined.append(take_rows(self.neighbors, geometry.species[geometry.sender]))
        first, second = self.compress
        edges = second(silu(first(torch.cat([*joined, messages], dim=1))))
        bias = self.bias(factors, geometry)
        for attention in self.attentions:
            nodes, edges = attention(nodes, edges, bias, geometry)
        returned = take_rows(edges, geometry.reverse)
        if self.residual:
            return nodes, edges, 0.5 * (messages + returned), factors
        hidden, out = self.combine
        both = self.combine_norm(torch.cat([edges, returned], dim=1))
        return nodes, messages + edges + out(silu(hidden(both))), factors

    def bias(self, factors: Tensor, geometry: TokenGeometry) -> list[Tensor]:
        """Logarithms of the factors in all slots (n, width), minus infinity where there is no token or no factor."""
        ones = factors.new_ones(len(geometry.species), 1)
        tables = in_slots(torch.cat([ones, factors]), geometry.slots)
        return [
            table.squeeze(2).clamp(LEAST_FACTOR).log().masked_fill(table.squeeze(2) <= 0, -torch.inf)
            for table in tables
        ]


class Heads(Stage):
    """What energies are linear in: features of the atoms, and sums of those of their edges."""

    def __init__(self, hyper: PETHyper):
        super().__init__()
        self.node, self.edge = (
            nn.ModuleList([nn.Linear(d, hyper.d_head), nn.Linear(hyper.d_head, hyper.d_head)])
            for d in (hyper.d_node, hyper.d_pet)
        )

    def forward(self, state: State, geometry: TokenGeometry) -> State:
        """Change h to x."""
        nodes, edges, *rest = state
        factors = rest[-1]
        for first, second in zip(self.node, self.edge, strict=True):
            nodes, edges = silu(first(nodes)), silu(second(edges))
        weighted = factors * torch.cat([edges, torch.ones_like(factors)], dim=1)
        sums = weighted.new_zeros(len(nodes), weighted.shape[1]).index_add(0, geometry.receiver, weighted)
        return torch.cat([nodes, sums], dim=1), *rest


class PET(Potential):
    """A point-edge transformer for energies.

    Parameters
    ----------
    hyper
        Hyper-parameters.
    species
        Atomic numbers.
    """

    architecture: ClassVar[str] = "pet"
    compilable: ClassVar[bool] = False
    decomposition = "none"
    Hyper: ClassVar[type[HyperParameters]] = PETHyper
    hyper: PETHyper

    def __init__(self, hyper: PETHyper, species: tuple[int, ...]):
        super().__init__(hyper, species)
        n = len(self.species)
        self.embedding = nn.Parameter(torch.randn(hyper.n_embeddings, n, hyper.d_node))
        self.stages.append(Start(hyper, n))
        for layer in range(hyper.num_gnn_layers):
            self.stages.append(Layer(hyper, n, first=layer == 0))
            if hyper.residual or layer == hyper.num_gnn_layers - 1:
                self.stages.append(Heads(hyper))

    def own_readout(self) -> nn.Module:
        """Energies linear in the scalars."""
        return LinearReadouts(self.hyper.channels, self.hyper.n_blocks)

    def element_parameters(self) -> tuple[str, ...]:
        """Tables of the edges, and of the atoms in further layers."""
        return tuple(
            name for name, _ in self.named_parameters() if name.endswith((".elements", ".neighbors"))
        )

    def embed(self, graph: Topology) -> State:
        """Element embeddings; the first stage adds the edges."""
        return (self.embedded(graph),)

    def edge_functions(self, vectors: Tensor) -> State:
        """Give the edge vectors as they are."""
        return (vectors,)

    def geometry(self, vectors: Tensor, graph: Topology) -> TokenGeometry:
        """Give every token a slot among those of its atom."""
        sender, receiver = graph.edge_index
        of_tokens = torch.cat([torch.arange(len(graph), device=receiver.device), receiver])
        slots, slot = neighborhoods(of_tokens, len(graph))
        return TokenGeometry(
            species=self.species_row[graph.atomic_numbers],
            sender=sender,
            receiver=receiver,
            reverse=reversed_edges(graph.edge_index, graph.shifts),
            slots=slots,
            slot=slot,
            vectors=vectors,
        )

    def scalars(self, state: State) -> Tensor:
        """Return what energies are linear in (n_atoms, 2 d_head + 1)."""
        return state[0]
