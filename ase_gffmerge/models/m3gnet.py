r"""M3GNet, the materials graph network with three-body interactions (Chen and Ong, doi:10.1038/s43588-022-00349-3).

Atoms carry features v, directed edges features e. With the gated networks :math:`\Phi` of
:class:`.GatedNetwork`, a block is

.. math::

   e_{ij} &\mathrel{+}= \Phi^{\rm bond}\Bigl(f(r_{ij}) \sum_{k\ne j} Y_{l0}(\vartheta_{jik})\, R_{ln}(r_{ik})\, f(r_{ik})\,
            \sigma(W v_k + b)_{ln}\Bigr) \\
   e_{ij} &\mathrel{+}= \Phi^{\rm e}([v_i, v_j, e_{ij}]) \odot W^{\rm e} R(r_{ij}) \\
   v_i &\mathrel{+}= \sum_j \Phi^{\rm v}([v_i, v_j, e_{ij}]) \odot W^{\rm v} R(r_{ij})

where R are radial functions and f is an envelope that ends the three-body terms at a shorter cutoff. With harmonics C of
norm 1, :math:`Y_{l0}(\vartheta_{jik}) = \sqrt{(2l+1)/4\pi}\,\sum_m C_{lm}(\hat r_{ij})\,C_{lm}(\hat r_{ik})`: the sum over k
is taken once per atom, and the term k = j is subtracted. No angle is formed, and the cost grows with the number of edges,
not with its square per atom. Weights of the package ``matgl`` fit in; see :mod:`ase_gffmerge.integrations.matgl`.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from e3nn.o3 import SphericalHarmonics
from torch import Tensor, nn

from ase_gffmerge.graphs.graph import Topology
from ase_gffmerge.models.base import EdgeGeometry, HyperParameters, Potential, Stage, State
from ase_gffmerge.models.layers import eager_e3nn
from ase_gffmerge.models.layers.gated import ACTIVATIONS, GatedNetwork, GatedReadout
from ase_gffmerge.models.layers.linear import Part, take_rows
from ase_gffmerge.models.layers.readout import ExactBuffers, polynomial_cutoff
from ase_gffmerge.models.layers.spherical_bessel import SmoothBesselBasis, SphericalBesselBasis


@dataclass(frozen=True, kw_only=True)
class M3GNetHyper(HyperParameters):
    """Hyper-parameters of :class:`M3GNet`; the defaults are the authors', but for smooth radial functions.

    Attributes
    ----------
    n_radial
        Radial functions of every order.
    l_max
        Largest order of the angular functions.
    three_body_cutoff
        Longest edge in Å that takes part in three-body terms.
    edge_channels
        Features per edge.
    width
        Of the hidden layers.
    smooth
        Radial functions whose first two derivatives vanish at the cutoff; others vanish with a slope, so that forces jump
        when a neighbour comes or goes.
    activation
        After the layer that makes the first features of the edges, one of :data:`.ACTIVATIONS`.
    """

    n_radial: int = 3
    l_max: int = 2
    three_body_cutoff: float = 4.0
    edge_channels: int = 64
    width: int = 64
    smooth: bool = True
    activation: str = "swish"

    def __post_init__(self) -> None:
        """Raise ``TypeError`` or ``ValueError`` for values that make no network."""
        super().__post_init__()
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, not {self.activation!r}")
        if self.three_body_cutoff > self.cutoff:
            raise ValueError(
                f"three_body_cutoff {self.three_body_cutoff} is longer than the cutoff {self.cutoff}"
            )

    @property
    def n_functions(self) -> int:
        """Radial functions of the three-body terms, of all orders."""
        return (self.l_max + 1) * self.n_radial

    @property
    def n_weights(self) -> int:
        """Radial functions that weigh the messages."""
        return self.n_radial if self.smooth else self.n_functions


class EdgeEmbedding(Stage):
    """First features of the edges."""

    emits_scalars = False
    gathers = False

    def __init__(self, hyper: M3GNetHyper):
        super().__init__()
        self.n_weights, self.activation = hyper.n_weights, ACTIVATIONS[hyper.activation]
        self.edges = nn.Linear(hyper.n_weights, hyper.edge_channels)

    def forward(self, state: State, geometry: EdgeGeometry) -> State:
        """Add e to the atoms' features."""
        return state[0], self.activation(self.edges(geometry.radial[:, : self.n_weights]))


class ThreeBody(Stage):
    """Change of the edges by the other edges of their receiver."""

    emits_scalars = False

    def __init__(self, hyper: M3GNetHyper):
        super().__init__()
        self.hyper = hyper
        self.atoms = nn.Linear(hyper.channels, hyper.n_functions)
        self.bonds = GatedNetwork((hyper.n_functions, hyper.edge_channels), bias=False)
        self.constants = Orders(hyper.l_max)

    def forward(self, state: State, geometry: EdgeGeometry) -> State:
        """Change the edges' features."""
        atoms, edges = state
        size = (-1, self.hyper.l_max + 1, self.hyper.n_radial)
        weights = (geometry.radial * geometry.envelope)[:, : self.hyper.n_functions]
        messages = (weights * take_rows(torch.sigmoid(self.atoms(atoms)), geometry.sender)).view(size)
        harmonics, order = geometry.angular[:, :, None], self.constants.order
        summed = atoms.new_zeros(len(atoms), len(order), self.hyper.n_radial).index_add(
            0, geometry.receiver, harmonics * messages[:, order]
        )
        products = harmonics * take_rows(summed, geometry.receiver)
        others = torch.zeros_like(messages).index_add(1, order, products) - messages
        others = others * self.constants.norm.to(others.dtype) * geometry.envelope[:, :, None]
        return atoms, edges + self.bonds(others.flatten(1))


class Orders(ExactBuffers):
    """Order l of every component (l, m), and the factor sqrt((2l + 1) / 4π) of every order."""

    order: Tensor
    norm: Tensor

    def __init__(self, l_max: int):
        super().__init__()
        orders = torch.arange(l_max + 1)
        norm = ((2 * orders.double() + 1) / (4 * math.pi)).sqrt()
        self.register_buffer("order", orders.repeat_interleave(2 * orders + 1), persistent=False)
        self.register_buffer("norm", norm[:, None], persistent=False)


class Convolution(Stage):
    """Change of the edges by their atoms, and then of the atoms by their edges."""

    def __init__(self, hyper: M3GNetHyper):
        super().__init__()
        self.n_weights, joined = hyper.n_weights, 2 * hyper.channels + hyper.edge_channels
        hidden = (joined, hyper.width, hyper.width)
        self.edge_network = GatedNetwork((*hidden, hyper.edge_channels), joined=True)
        self.edge_weights = nn.Linear(hyper.n_weights, hyper.edge_channels, bias=False)
        self.atom_network = GatedNetwork((*hidden, hyper.channels), joined=True)
        self.atom_weights = nn.Linear(hyper.n_weights, hyper.channels, bias=False)

    def forward(self, state: State, geometry: EdgeGeometry) -> State:
        """Change the features of edges and atoms."""
        atoms, edges = state
        radial = geometry.radial[:, : self.n_weights]
        ends: list[Part] = [(atoms, geometry.receiver), (atoms, geometry.sender)]
        edges = edges + self.edge_network([*ends, (edges, None)]) * self.edge_weights(radial)
        messages = self.atom_network([*ends, (edges, None)]) * self.atom_weights(radial)
        return atoms.index_add(0, geometry.receiver, messages), edges


class M3GNet(Potential):
    """M3GNet with a gated readout, for energies.

    Parameters
    ----------
    hyper
        Hyper-parameters.
    species
        Atomic numbers.
    """

    architecture: ClassVar[str] = "m3gnet"
    Hyper: ClassVar[type[HyperParameters]] = M3GNetHyper
    hyper: M3GNetHyper

    def __init__(self, hyper: M3GNetHyper, species: tuple[int, ...]):
        super().__init__(hyper, species)
        self.radial: nn.Module = (
            SmoothBesselBasis(hyper.cutoff, hyper.n_functions)
            if hyper.smooth
            else SphericalBesselBasis(hyper.cutoff, hyper.n_radial, hyper.l_max)
        )
        with eager_e3nn():
            self.harmonics = SphericalHarmonics(
                list(range(hyper.l_max + 1)), normalize=False, normalization="norm"
            )
        self.stages.append(EdgeEmbedding(hyper))
        for _ in range(hyper.n_blocks):
            self.stages.append(ThreeBody(hyper))
            self.stages.append(Convolution(hyper))

    def own_readout(self) -> nn.Module:
        """Gated network with three hidden layers."""
        return GatedReadout(self.hyper.channels, self.hyper.width)

    def embed(self, graph: Topology) -> State:
        """Element embeddings; the first stage adds the edges' features."""
        return (self.embedded(graph),)

    def angular(self, directions: Tensor) -> Tensor:
        """Spherical harmonics of norm 1 for every order."""
        found: Tensor = self.harmonics(directions)
        return found

    def edge_functions(self, vectors: Tensor) -> State:
        """Radial functions, the envelope of the three-body terms, and spherical harmonics."""
        lengths = vectors.square().sum(dim=-1).sqrt()
        envelope = polynomial_cutoff(lengths, self.hyper.three_body_cutoff)[:, None]
        return self.radial(lengths), envelope, self.angular(vectors / lengths[:, None])

    def scalars(self, state: State) -> Tensor:
        """Features (n_atoms, channels) of the atoms."""
        return state[0]
