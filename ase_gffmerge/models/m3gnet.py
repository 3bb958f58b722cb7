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

The network of MatterSim (Yang et al., arXiv 2405.04967) differs in this: the three-body terms have radial functions of their
own and weigh all neighbours k by the atom i itself, :math:`\sigma(W v_i + b)`; edges begin without bias and have as many
features as atoms; the networks :math:`\Phi^{\rm e}`, :math:`\Phi^{\rm v}` have one hidden layer;
:math:`\mathrm{silu}(W^{\rm v} R)` weighs the messages to atoms; energies are scaled per element.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from e3nn.o3 import SphericalHarmonics
from torch import Tensor, nn
from torch.nn.functional import silu

from ase_gffmerge.graphs.graph import Topology
from ase_gffmerge.models.base import EdgeGeometry, HyperParameters, Potential, Stage, State
from ase_gffmerge.models.layers import eager_e3nn
from ase_gffmerge.models.layers.linear import Part, take_rows
from ase_gffmerge.models.layers.readout import (
    ACTIVATIONS,
    ExactBuffers,
    GatedNetwork,
    GatedReadout,
    polynomial_cutoff,
)
from ase_gffmerge.models.layers.spherical_bessel import SmoothBesselBasis, SphericalBesselBasis


@dataclass(frozen=True, kw_only=True)
class ThreeBodyHyper(HyperParameters):
    """Hyper-parameters of networks with three-body terms.

    Attributes
    ----------
    n_radial
        Radial functions of every order.
    l_max
        Largest order of the angular functions.
    three_body_cutoff
        Longest edge in Å that takes part in three-body terms.
    """

    n_radial: int = 3
    l_max: int = 2
    three_body_cutoff: float = 4.0

    def __post_init__(self) -> None:
        """Raise ``TypeError`` or ``ValueError`` for values that make no network."""
        super().__post_init__()
        if self.three_body_cutoff > self.cutoff:
            raise ValueError(
                f"three_body_cutoff {self.three_body_cutoff} is longer than the cutoff {self.cutoff}"
            )

    @property
    def n_functions(self) -> int:
        """Radial functions of the three-body terms, of all orders."""
        return (self.l_max + 1) * self.n_radial


@dataclass(frozen=True, kw_only=True)
class M3GNetHyper(ThreeBodyHyper):
    """Hyper-parameters of :class:`M3GNet`; the defaults are the authors', but for smooth radial functions.

    Attributes
    ----------
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

    edge_channels: int = 64
    width: int = 64
    smooth: bool = True
    activation: str = "swish"

    def __post_init__(self) -> None:
        """Raise ``TypeError`` or ``ValueError`` for values that make no network."""
        super().__post_init__()
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, not {self.activation!r}")

    @property
    def n_weights(self) -> int:
        """Radial functions that weigh the messages."""
        return self.n_radial if self.smooth else self.n_functions


@dataclass(frozen=True, kw_only=True)
class MatterSimHyper(ThreeBodyHyper):
    """Hyper-parameters of :class:`MatterSim`; the defaults are those of the package, whose ``units`` are the channels."""

    channels: int = 128
    n_blocks: int = 4
    n_radial: int = 4
    l_max: int = 3

    def __post_init__(self) -> None:
        """Raise ``TypeError`` or ``ValueError`` for values that make no network."""
        super().__post_init__()
        if max(self.n_radial, self.l_max + 1) > len(MATTERSIM_FACTORS):
            raise ValueError(f"n_radial and l_max + 1 are at most {len(MATTERSIM_FACTORS)}")


MATTERSIM_FACTORS = (
    (1.0, 1.0, 1.0, 1.0),
    (1.02446483277785, 1.00834335996107, 1.00419641763893, 1.00252381898662),
    (1.04807944170731, 1.01861796359391, 1.01002272174988, 1.00628955560036),
    (1.06942831392075, 1.0292173312802, 1.01650804843248, 1.01069656069999),
)
r""":math:`1/|z_{ln}\,j_{l+1}(z_{ln})|` as MatterSim has them, in single precision, by order l and root n."""


class EdgeEmbedding(Stage):
    """First features of the edges."""

    emits_scalars = False
    gathers = False

    def __init__(self, n_weights: int, edge_channels: int, *, activation: str = "swish", bias: bool = True):
        super().__init__()
        self.n_weights, self.activation = n_weights, ACTIVATIONS[activation]
        self.edges = nn.Linear(n_weights, edge_channels, bias=bias)

    def forward(self, state: State, geometry: EdgeGeometry) -> State:
        """Add e to the atoms' features."""
        return state[0], self.activation(self.edges(geometry.radial[:, : self.n_weights]))


class ThreeBody(Stage):
    """Change of the edges by the other edges of their receiver, which their senders weigh, or the receiver (``central``)."""

    emits_scalars = False

    def __init__(self, hyper: ThreeBodyHyper, edge_channels: int, *, central: bool = False):
        super().__init__()
        self.hyper, self.central = hyper, central
        self.atoms = nn.Linear(hyper.channels, hyper.n_functions)
        self.bonds = GatedNetwork((hyper.n_functions, edge_channels), bias=False)
        self.constants = Orders(hyper.l_max)

    def forward(self, state: State, geometry: EdgeGeometry) -> State:
        """Change the edges' features."""
        atoms, edges = state
        size = (-1, self.hyper.l_max + 1, self.hyper.n_radial)
        weights = geometry.radial[:, -self.hyper.n_functions :] * geometry.envelope
        weighing = geometry.receiver if self.central else geometry.sender
        messages = (weights * take_rows(torch.sigmoid(self.atoms(atoms)), weighing)).view(size)
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
    """Change of the edges by their atoms, and then of the atoms by their edges.

    Parameters
    ----------
    channels, edge_channels, hidden
        Features of atoms and edges, and of the hidden layers.
    n_weights
        Radial functions that weigh the messages.
    activated
        Whether SiLU follows the weights of the messages to atoms.
    """

    def __init__(
        self, channels: int, edge_channels: int, hidden: tuple[int, ...], n_weights: int, *, activated: bool
    ):
        super().__init__()
        self.n_weights, self.activated = n_weights, activated
        widths = (2 * channels + edge_channels, *hidden)
        self.edge_network = GatedNetwork((*widths, edge_channels), joined=True)
        self.edge_weights = nn.Linear(n_weights, edge_channels, bias=False)
        self.atom_network = GatedNetwork((*widths, channels), joined=True)
        self.atom_weights = nn.Linear(n_weights, channels, bias=False)

    def forward(self, state: State, geometry: EdgeGeometry) -> State:
        """Change the features of edges and atoms."""
        atoms, edges = state
        radial = geometry.radial[:, : self.n_weights]
        ends: list[Part] = [(atoms, geometry.receiver), (atoms, geometry.sender)]
        edges = torch.addcmul(edges, self.edge_network([*ends, (edges, None)]), self.edge_weights(radial))
        weights = self.atom_weights(radial)
        if self.activated:
            weights = silu(weights)
        messages = self.atom_network([*ends, (edges, None)]) * weights
        return atoms.index_add(0, geometry.receiver, messages), edges


class ThreeBodyPotential(Potential):
    """What :class:`M3GNet` and :class:`MatterSim` have in common.

    Attributes
    ----------
    radial
        Maps lengths (n_edges,) in Å to functions: first those that weigh messages, last those of the three-body terms.
    """

    hyper: ThreeBodyHyper
    radial: nn.Module

    def __init__(self, hyper: ThreeBodyHyper, species: tuple[int, ...]):
        super().__init__(hyper, species)
        with eager_e3nn():
            self.harmonics = SphericalHarmonics(
                list(range(hyper.l_max + 1)), normalize=False, normalization="norm"
            )

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


class M3GNet(ThreeBodyPotential):
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
        self.radial = (
            SmoothBesselBasis(hyper.cutoff, hyper.n_functions)
            if hyper.smooth
            else SphericalBesselBasis(hyper.cutoff, hyper.n_radial, hyper.l_max)
        )
        n, edges, hidden = hyper.channels, hyper.edge_channels, (hyper.width, hyper.width)
        self.stages.append(EdgeEmbedding(hyper.n_weights, edges, activation=hyper.activation))
        for _ in range(hyper.n_blocks):
            self.stages.append(ThreeBody(hyper, edges))
            self.stages.append(Convolution(n, edges, hidden, hyper.n_weights, activated=False))

    def own_readout(self) -> nn.Module:
        """Gated network with three hidden layers."""
        n, width = self.hyper.channels, self.hyper.width
        return GatedReadout((n, n, width, width, 1))


class BothRadialFunctions(nn.Module):
    """Radial functions of MatterSim: smooth ones that weigh messages, and spherical ones of the three-body terms."""

    def __init__(self, hyper: MatterSimHyper):
        super().__init__()
        orders, roots = hyper.n_radial, hyper.l_max + 1
        self.smooth = SmoothBesselBasis(hyper.cutoff, hyper.n_radial)
        self.spherical = SphericalBesselBasis(
            hyper.cutoff, roots, orders - 1, factors=[row[:roots] for row in MATTERSIM_FACTORS[:orders]]
        )

    def forward(self, lengths: Tensor) -> Tensor:
        """Map lengths (n_edges,) in Å to (n_edges, n_radial + (l_max + 1) · n_radial)."""
        return torch.cat([self.smooth(lengths), self.spherical(lengths)], dim=1)


class MatterSim(ThreeBodyPotential):
    """The M3GNet of MatterSim.

    Parameters
    ----------
    hyper
        Hyper-parameters.
    species
        Atomic numbers.
    """

    architecture: ClassVar[str] = "mattersim"
    Hyper: ClassVar[type[HyperParameters]] = MatterSimHyper
    hyper: MatterSimHyper

    def __init__(self, hyper: MatterSimHyper, species: tuple[int, ...]):
        super().__init__(hyper, species)
        n = hyper.channels
        self.radial = BothRadialFunctions(hyper)
        self.stages.append(EdgeEmbedding(hyper.n_radial, n, bias=False))
        for _ in range(hyper.n_blocks):
            self.stages.append(ThreeBody(hyper, n, central=True))
            self.stages.append(Convolution(n, n, (n,), hyper.n_radial, activated=True))

    def own_readout(self) -> nn.Module:
        """Gated network with two hidden layers, and a scale per element."""
        n = self.hyper.channels
        return GatedReadout((n, n, n, 1), n_species=len(self.species))

    def element_parameters(self) -> tuple[str, ...]:
        """Energy scales."""
        return tuple(name for name, _ in self.named_parameters() if name.endswith("scale"))
