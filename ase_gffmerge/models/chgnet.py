r"""CHGNet, the crystal Hamiltonian graph network (Deng et al., doi:10.1038/s42256-023-00716-3), without magnetic moments.

Atoms, bonds (undirected) and angles between short bonds carry features x, b and a. With the gated layer
:math:`\Phi(u) = \mathrm{silu}(\mathrm{LN}(\mathrm{core}(u)))\odot\sigma(\mathrm{LN}(\mathrm{gate}(u)))`,

.. math::

   x_i' &= x_i + L \sum_j \Phi([x_i, b_{ij}, x_j]) \odot \tilde w_{ij} \\
   b_{ij}' &= b_{ij} + L \sum_k \Phi([b_{ij}, b_{ik}, a_{jik}, x_i]) \odot w_{ij} \odot w_{ik} \\
   a_{jik}' &= a_{jik} + \Phi([b_{ij}, b_{ik}, a_{jik}, x_i])

========================  ==========================
equation                  variable
========================  ==========================
x (n_atoms, F)            ``state[0]``
b (n_bonds, F)            ``state[1]``
a (n_angles, F)           ``state[2]``
w̃, w (n_bonds, F)         ``state[3]``, ``state[4]``
L                         ``out``
========================  ==========================

The basis frequencies are parameters of the network, so that the first stage, :class:`Bases`, takes the edge vectors
themselves. Weights of the authors' package fit in; see :mod:`ase_gffmerge.integrations.chgnet`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from ase_gffmerge.graphs.graph import Topology
from ase_gffmerge.models.base import HyperParameters, Potential, Stage, State
from ase_gffmerge.models.layers.linear import JoinedLinear, Part, angles_between, take_rows, undirected


@dataclass(frozen=True, kw_only=True)
class CHGNetHyper(HyperParameters):
    """Hyper-parameters of :class:`CHGNet`; the defaults are those of the published version 0.3.0.

    Attributes
    ----------
    bond_cutoff
        Longest bond in Å between which angles are formed.
    n_angular
        Fourier functions of an angle, an odd number.
    envelope_power
        Power p of the envelope, see :func:`envelope`.
    readout_layers
        Hidden layers of the readout.
    """

    cutoff: float = 6.0
    n_blocks: int = 4
    n_radial: int = 31
    bond_cutoff: float = 3.0
    n_angular: int = 31
    envelope_power: int = 8
    readout_layers: int = 3

    def __post_init__(self) -> None:
        """Raise ``TypeError`` or ``ValueError`` for values that make no network."""
        super().__post_init__()
        if not self.n_angular % 2:
            raise ValueError(f"n_angular must be odd (1, sines and cosines), not {self.n_angular}")
        if self.bond_cutoff > self.cutoff:
            raise ValueError(f"bond_cutoff {self.bond_cutoff} is longer than the cutoff {self.cutoff}")


@dataclass(frozen=True)
class CrystalGeometry:
    """Edges, undirected bonds and angles.

    Attributes
    ----------
    sender, receiver : (n_edges,)
    bond : (n_edges,)
        Bond that an edge belongs to; its two directions share one.
    edge : (n_bonds,)
        One of the edges of every bond.
    angle : (2, n_angles)
        Edges with a common receiver; the message to the bond of the first one depends on the second.
    vectors : (n_edges, 3)
        From receiver to sender, in Å.
    """

    sender: Tensor
    receiver: Tensor
    bond: Tensor
    edge: Tensor
    angle: Tensor
    vectors: Tensor

    @property
    def parts(self) -> State:
        """The edge vectors."""
        return (self.vectors,)

    def with_parts(self, parts: State) -> Self:
        """Replace the edge vectors."""
        return replace(self, vectors=parts[0])


def envelope(x: Tensor, power: float) -> Tensor:
    r""":math:`1-\tfrac{(p+1)(p+2)}2 x^p+p(p+2)x^{p+1}-\tfrac{p(p+1)}2 x^{p+2}` (DimeNet, arXiv 2003.03123, eq. 8)."""
    p = power
    x = x.clamp(max=1.0)
    return 1 + x**p * (-(p + 1) * (p + 2) / 2 + x * (p * (p + 2) - x * (p * (p + 1) / 2)))


class RadialBasis(nn.Module):
    r"""Functions :math:`\sqrt{2/r_c}\,\sin(\omega_n r/r_c)/r` times the envelope; the frequencies are learned."""

    def __init__(self, n_radial: int, cutoff: float, power: int):
        super().__init__()
        self.cutoff, self.power = cutoff, power
        self.frequencies = nn.Parameter(math.pi * torch.arange(1.0, n_radial + 1))

    def forward(self, lengths: Tensor) -> Tensor:
        """Map lengths (n_bonds,) in Å to (n_bonds, n_radial)."""
        r = lengths[:, None]
        x = r / self.cutoff
        return envelope(x, self.power) * math.sqrt(2 / self.cutoff) * torch.sin(self.frequencies * x) / r


class AngularBasis(nn.Module):
    r"""Functions 1/√2, :math:`\sin(\omega_n\vartheta)` and :math:`\cos(\omega_n\vartheta)`, over √π."""

    def __init__(self, n_angular: int):
        super().__init__()
        self.frequencies = nn.Parameter(torch.arange(1.0, n_angular // 2 + 1))

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Map unit vectors (n_angles, 3) to (n_angles, n_angular); the cosine is shrunk so that its arc has a slope."""
        theta = torch.acos((first * second).sum(dim=1) * (1 - 1e-6))[:, None] * self.frequencies
        constant = torch.full_like(theta[:, :1], 0.5**0.5)
        return torch.cat([constant, torch.sin(theta), torch.cos(theta)], dim=1) / math.sqrt(math.pi)


class Bases(Stage):
    """First features of bonds and angles, and the weights of messages, all linear in the bases."""

    emits_scalars = False

    def __init__(self, hyper: CHGNetHyper):
        super().__init__()
        self.radial = RadialBasis(hyper.n_radial, hyper.cutoff, hyper.envelope_power)
        self.radial_short = RadialBasis(hyper.n_radial, hyper.bond_cutoff, hyper.envelope_power)
        self.angular = AngularBasis(hyper.n_angular)
        self.bonds = nn.Linear(hyper.n_radial, hyper.channels, bias=False)
        self.atom_weights = nn.Linear(hyper.n_radial, hyper.channels, bias=False)
        self.bond_weights = nn.Linear(hyper.n_radial, hyper.channels, bias=False)
        self.angles = nn.Linear(hyper.n_angular, hyper.channels, bias=False)

    def forward(self, state: State, geometry: CrystalGeometry) -> State:
        """Add b, a, w̃ and w to the atoms' features."""
        lengths = geometry.vectors.square().sum(dim=1).sqrt()
        first, second = (
            (geometry.vectors[edges] / lengths[edges, None]) for edges in geometry.angle.unbind(0)
        )
        lengths = lengths[geometry.edge]
        radial = self.radial(lengths)
        weights = self.bond_weights(self.radial_short(lengths))
        angles = self.angles(self.angular(first, second))
        return state[0], self.bonds(radial), angles, self.atom_weights(radial), weights


class GatedLayer(nn.Module):
    r"""The gated layer :math:`\Phi` of the module's equations, with one hidden layer or none."""

    def __init__(self, d_in: int, channels: int, *, hidden: bool):
        super().__init__()
        self.core_hidden: JoinedLinear | None = None
        self.gate_hidden: JoinedLinear | None = None
        self.core: nn.Linear
        self.gate: nn.Linear
        if hidden:
            self.core_hidden, self.gate_hidden = (JoinedLinear(d_in, channels) for _ in range(2))
            self.core, self.gate = (nn.Linear(channels, channels) for _ in range(2))
        else:
            self.core, self.gate = (JoinedLinear(d_in, channels) for _ in range(2))
        self.core_norm = nn.LayerNorm(channels)
        self.gate_norm = nn.LayerNorm(channels)

    def forward(self, parts: Sequence[Part]) -> Tensor:
        """Map joined features (n, d_in) to (n, channels)."""
        core = parts if self.core_hidden is None else silu(self.core_hidden(parts))
        gate = parts if self.gate_hidden is None else silu(self.gate_hidden(parts))
        return silu(self.core_norm(self.core(core))) * torch.sigmoid(self.gate_norm(self.gate(gate)))


class AtomConvolution(Stage):
    """Messages along all edges."""

    def __init__(self, channels: int):
        super().__init__()
        self.gated = GatedLayer(3 * channels, channels, hidden=True)
        self.out = nn.Linear(channels, channels, bias=False)

    def forward(self, state: State, geometry: CrystalGeometry) -> State:
        """Change the atoms' features."""
        atoms, bonds, angles, weights, short = state
        parts = [(atoms, geometry.receiver), (bonds, geometry.bond), (atoms, geometry.sender)]
        messages = self.gated(parts) * take_rows(weights, geometry.bond)
        summed = torch.zeros_like(atoms).index_add(0, geometry.receiver, messages)
        return atoms + self.out(summed), bonds, angles, weights, short


class BondConvolution(Stage):
    """Messages between short bonds that meet at an atom."""

    emits_scalars = False

    def __init__(self, channels: int):
        super().__init__()
        self.gated = GatedLayer(4 * channels, channels, hidden=True)
        self.out = nn.Linear(channels, channels, bias=False)

    def forward(self, state: State, geometry: CrystalGeometry) -> State:
        """Change the bonds' features."""
        atoms, bonds, angles, weights, short = state
        first, second = geometry.bond[geometry.angle]
        messages = self.gated(angle_parts(state, geometry))
        messages = messages * take_rows(short, first) * take_rows(short, second)
        summed = torch.zeros_like(bonds).index_add(0, first, messages)
        return atoms, bonds + self.out(summed), angles, weights, short


class AngleUpdate(Stage):
    """Change of the angles by their bonds and their atom."""

    emits_scalars = False

    def __init__(self, channels: int):
        super().__init__()
        self.gated = GatedLayer(4 * channels, channels, hidden=False)

    def forward(self, state: State, geometry: CrystalGeometry) -> State:
        """Change the angles' features."""
        atoms, bonds, angles, weights, short = state
        return atoms, bonds, angles + self.gated(angle_parts(state, geometry)), weights, short


def angle_parts(state: State, geometry: CrystalGeometry) -> Sequence[Part]:
    """Features [b_ij, b_ik, a_jik, x_i] of every angle."""
    atoms, bonds, angles = state[:3]
    first, second = geometry.bond[geometry.angle]
    return [(bonds, first), (bonds, second), (angles, None), (atoms, geometry.receiver[geometry.angle[0]])]


class NormalisedReadout(nn.Module):
    """Energies of the last scalars by a layer norm and a network of several layers."""

    def __init__(self, channels: int, layers: int):
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.hidden = nn.ModuleList(nn.Linear(channels, channels) for _ in range(layers))
        self.out = nn.Linear(channels, 1)

    def forward(self, scalars: list[Tensor], species: Tensor) -> Tensor:
        """Map L tensors (n_atoms, channels) to energies (n_atoms,) in eV."""
        x = self.norm(scalars[-1])
        for layer in self.hidden:
            x = silu(layer(x))
        return self.out(x).squeeze(-1)


class CHGNet(Potential):
    """CHGNet of version 0.3.0 and those fine-tuned from it.

    ``unused`` holds what the vendor's files have and energies do not depend on: the head of the magnetic moments, and the
    last change of the angles, which nothing reads.

    Parameters
    ----------
    hyper
        Hyper-parameters.
    species
        Atomic numbers.
    """

    architecture: ClassVar[str] = "chgnet"
    compilable: ClassVar[bool] = False
    decomposition = "halo"
    Hyper: ClassVar[type[HyperParameters]] = CHGNetHyper
    hyper: CHGNetHyper

    def __init__(self, hyper: CHGNetHyper, species: tuple[int, ...]):
        super().__init__(hyper, species)
        self.stages.append(Bases(hyper))
        for block in range(hyper.n_blocks):
            self.stages.append(AtomConvolution(hyper.channels))
            if block < hyper.n_blocks - 1:
                self.stages.append(BondConvolution(hyper.channels))
            if block < hyper.n_blocks - 2:
                self.stages.append(AngleUpdate(hyper.channels))
        self.unused = nn.ModuleDict({"moments": nn.Linear(hyper.channels, 1)})
        if hyper.n_blocks > 1:
            self.unused["angles"] = AngleUpdate(hyper.channels)

    def own_readout(self) -> nn.Module:
        """Layer norm and several hidden layers."""
        return NormalisedReadout(self.hyper.channels, self.hyper.readout_layers)

    def embed(self, graph: Topology) -> State:
        """Element embeddings; the first stage adds the rest."""
        return (self.embedded(graph),)

    def edge_functions(self, vectors: Tensor) -> State:
        """Give the edge vectors as they are."""
        return (vectors,)

    def geometry(self, vectors: Tensor, graph: Topology) -> CrystalGeometry:
        """Pair the directions of every bond and find the angles between short ones."""
        sender, receiver = graph.edge_index
        bond, edge = undirected(graph.edge_index, graph.shifts)
        short = vectors.detach().square().sum(dim=1) < self.hyper.bond_cutoff**2
        angle = angles_between(receiver, short.nonzero().squeeze(1))
        return CrystalGeometry(sender, receiver, bond, edge, angle, vectors)

    def scalars(self, state: State) -> Tensor:
        """Return the atoms' features (n_atoms, channels)."""
        return state[0]
