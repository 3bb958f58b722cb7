r"""TensorNet (Simeon and De Fabritiis, arXiv 2306.06482), as the package ``matgl`` has it.

Every atom carries a matrix X (3, 3) per channel, a sum of a multiple of the unit matrix, an antisymmetric and a symmetric
traceless one. A block is, with the message :math:`M_i = \sum_j f(r_{ij})\cdot Y_j`,

.. math::

   X' = X/(\|X\|^2+1),\quad Y = W X',\quad
   \Delta = W' \frac{MY+YM}{\|MY+YM\|^2+1},\quad X \leftarrow X' + \Delta + \Delta^2

where f scales, and W and W' mix the channels of, each of the three kinds. Here a matrix is nine coefficients of an
orthonormal basis, 1 + 3 + 5 for the three kinds, in the place of three matrices, and what depends on a distance alone is
computed once for both directions of an edge. Weights of ``matgl`` fit in; see :mod:`ase_gffmerge.integrations.matgl`.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ase_gffmerge.graphs.graph import Topology
from ase_gffmerge.models.base import EdgeGeometry, HyperParameters, Potential, Stage, State
from ase_gffmerge.models.layers.linear import JoinedLinear, take_rows, undirected
from ase_gffmerge.models.layers.readout import ACTIVATIONS, ExactBuffers, GatedReadout
from ase_gffmerge.models.layers.spherical_bessel import RADIAL, radial_basis

KINDS = (1, 3, 5)
"""Coefficients of the unit matrix, of antisymmetric and of symmetric traceless matrices."""


@dataclass(frozen=True, kw_only=True)
class TensorNetHyper(HyperParameters):
    """Hyper-parameters of :class:`TensorNet`; the defaults are those of ``matgl``.

    Attributes
    ----------
    n_blocks
        Interactions, and the invariants after them.
    n_radial, radial
        Number and kind of radial functions, one of :data:`.RADIAL`; of ``bessel``, for every order.
    l_max
        Largest order of ``bessel``.
    exponent
        Of ``gaussian``, in 1/Å^2.
    group
        ``O(3)``, or ``SO(3)`` for energies that tell an image from its mirror image.
    activation
        One of :data:`.ACTIVATIONS`.
    """

    n_radial: int = 32
    radial: str = "gaussian"
    l_max: int = 2
    exponent: float = 0.5
    group: str = "O(3)"
    activation: str = "swish"

    def __post_init__(self) -> None:
        """Raise ``TypeError`` or ``ValueError`` for values that make no network."""
        super().__post_init__()
        if self.n_blocks < 2:
            raise ValueError("n_blocks must be at least 2, an interaction and the invariants after it")
        known = {"radial": RADIAL, "group": ("O(3)", "SO(3)"), "activation": ACTIVATIONS}
        for name, choices in known.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, not {getattr(self, name)!r}")

    @property
    def n_functions(self) -> int:
        """Radial functions of all orders."""
        return self.n_radial * (self.l_max + 1 if self.radial == "bessel" else 1)


@dataclass(frozen=True)
class BondGeometry(EdgeGeometry):
    """Edges, and the bonds that they share with their reverse.

    Attributes
    ----------
    bond : (n_edges,)
        Bond of every edge.
    edge : (n_bonds,)
        One edge of every bond.
    """

    bond: Tensor
    edge: Tensor


class MatrixBasis(ExactBuffers):
    """Orthonormal basis (9, 9) of matrices (3, 3): the unit matrix, antisymmetric ones, symmetric traceless ones."""

    matrices: Tensor

    def __init__(self) -> None:
        super().__init__()
        unit, root = torch.eye(3, dtype=torch.float64), math.sqrt(0.5)
        cross = [torch.linalg.cross(row.expand(3, 3), unit).T * root for row in unit]
        pairs = [
            (unit[i, :, None] * unit[j] + unit[j, :, None] * unit[i]) * root
            for i, j in ((0, 1), (1, 2), (2, 0))
        ]
        diagonal = [
            torch.diag(unit[0] - unit[1]) * root,
            torch.diag(unit[0] + unit[1] - 2 * unit[2]) / math.sqrt(6),
        ]
        rows = torch.stack([unit / math.sqrt(3), *cross, *pairs, *diagonal])
        self.register_buffer("matrices", rows.flatten(1), persistent=False)

    def matrix(self, x: Tensor) -> Tensor:
        """Matrices (n, 3, 3, channels) of coefficients (n, 9, channels)."""
        return (self.matrices.T.to(x.dtype) @ x).unflatten(1, (3, 3))

    def coefficients(self, matrix: Tensor) -> Tensor:
        """The reverse of :meth:`matrix`."""
        return self.matrices.to(matrix.dtype) @ matrix.flatten(1, 2)


def product(first: Tensor, second: Tensor) -> Tensor:
    """Matrix products (n, 3, 3, channels), channel by channel."""
    parts = [first[:, :, k, None] * second[:, None, k] for k in range(3)]
    return parts[0] + parts[1] + parts[2]


def squared_norm(x: Tensor) -> Tensor:
    """Squared Frobenius norms (n, channels) of coefficients (n, 9, channels)."""
    return x.square().sum(dim=1)


class MixedKinds(nn.Module):
    """A linear layer of the channels for each of the three kinds of matrices."""

    def __init__(self, channels: int):
        super().__init__()
        self.kinds = nn.ModuleList(nn.Linear(channels, channels, bias=False) for _ in KINDS)

    def forward(self, x: Tensor) -> Tensor:
        """Map coefficients (n, 9, channels) to as many."""
        return torch.cat(
            [layer(part) for layer, part in zip(self.kinds, x.split(KINDS, dim=1), strict=True)], dim=1
        )


def scaled(x: Tensor, factors: Tensor) -> Tensor:
    """Coefficients (n, 9, channels) times factors (n, 3, channels) of their kinds."""
    sizes = torch.tensor(KINDS, device=x.device)
    return x * factors.repeat_interleave(sizes, dim=1, output_size=sum(KINDS))


class TensorEmbedding(Stage):
    """First matrices of the atoms, from their neighbours."""

    emits_scalars = False

    def __init__(self, hyper: TensorNetHyper):
        super().__init__()
        channels, self.activation = hyper.channels, ACTIVATIONS[hyper.activation]
        self.distances = nn.ModuleList(nn.Linear(hyper.n_functions, channels) for _ in KINDS)
        self.pairs = JoinedLinear(2 * channels, channels)
        self.norm = nn.LayerNorm(channels)
        self.mixed = MixedKinds(channels)
        self.hidden = nn.Linear(channels, 2 * channels)
        self.factors = nn.Linear(2 * channels, 3 * channels)

    def forward(self, state: State, geometry: BondGeometry) -> State:
        """Put the matrices into the place of the embeddings."""
        atoms = state[0]
        radial, envelope = (take_rows(x, geometry.edge) for x in (geometry.radial, geometry.envelope))
        pairs = self.pairs([(atoms, geometry.receiver), (atoms, geometry.sender)])
        parts = []
        for layer, angular in zip(self.distances, geometry.angular.split(KINDS, dim=1), strict=True):
            messages = pairs * take_rows(layer(radial) * envelope, geometry.bond)
            sums = atoms.new_zeros(len(atoms), angular.shape[1], atoms.shape[1])
            parts.append(sums.index_add(0, geometry.receiver, angular[:, :, None] * messages[:, None]))
        x = torch.cat(parts, dim=1)
        factors = self.norm(squared_norm(x))
        for layer in (self.hidden, self.factors):
            factors = self.activation(layer(factors))
        return (scaled(self.mixed(x), factors.unflatten(1, (-1, 3)).transpose(1, 2)),)


class Interaction(Stage):
    """Change of the matrices by their products with the neighbours'."""

    def __init__(self, hyper: TensorNetHyper):
        super().__init__()
        channels, self.activation = hyper.channels, ACTIVATIONS[hyper.activation]
        self.reflections = hyper.group == "O(3)"
        widths = (hyper.n_functions, channels, 2 * channels, 3 * channels)
        self.distances = nn.ModuleList(map(nn.Linear, widths[:-1], widths[1:]))
        self.before, self.after = MixedKinds(channels), MixedKinds(channels)
        self.basis = MatrixBasis()

    def forward(self, state: State, geometry: BondGeometry) -> State:
        """Change the matrices."""
        x = state[0] / (squared_norm(state[0]) + 1)[:, None]
        mixed = self.before(x)
        message, own = self.basis.matrix(self.messages(mixed, geometry)), self.basis.matrix(mixed)
        other = product(message, own) if self.reflections else product(own, message)
        change = self.basis.coefficients(product(own, message) + other)
        change = self.after(change / (squared_norm(change) + 1)[:, None])
        matrix = self.basis.matrix(change)
        return (x + change + self.basis.coefficients(product(matrix, matrix)),)

    def messages(self, mixed: Tensor, geometry: BondGeometry) -> Tensor:
        """Sums (n_atoms, 9, channels) of the neighbours' matrices, scaled by functions of the distance."""
        factors = take_rows(geometry.radial, geometry.edge)
        for layer in self.distances:
            factors = self.activation(layer(factors))
        factors = factors * take_rows(geometry.envelope, geometry.edge)
        kinds = factors.unflatten(1, (-1, 3)).unbind(2)
        parts = []
        for part, kind in zip(mixed.split(KINDS, dim=1), kinds, strict=True):
            messages = take_rows(kind.contiguous(), geometry.bond)[:, None] * take_rows(part, geometry.sender)
            parts.append(torch.zeros_like(part).index_add(0, geometry.receiver, messages))
        return torch.cat(parts, dim=1)


class Invariants(Stage):
    """Norms of the three kinds of matrices, mixed into one scalar per channel."""

    gathers = False

    def __init__(self, channels: int):
        super().__init__()
        self.norm = nn.LayerNorm(3 * channels)
        self.linear = nn.Linear(3 * channels, channels)

    def forward(self, state: State, geometry: BondGeometry) -> State:
        """Put the scalars (n_atoms, 1, channels) into the place of the matrices."""
        norms = torch.cat([squared_norm(part) for part in state[0].split(KINDS, dim=1)], dim=1)
        return (self.linear(self.norm(norms))[:, None],)


class TensorNet(Potential):
    """TensorNet with a gated readout, for energies.

    Parameters
    ----------
    hyper
        Hyper-parameters.
    species
        Atomic numbers.
    """

    architecture: ClassVar[str] = "tensornet"
    Hyper: ClassVar[type[HyperParameters]] = TensorNetHyper
    compilable: ClassVar[bool] = False
    hyper: TensorNetHyper

    def __init__(self, hyper: TensorNetHyper, species: tuple[int, ...]):
        super().__init__(hyper, species)
        self.matrices = MatrixBasis()
        self.radial = radial_basis(
            hyper.radial,
            cutoff=hyper.cutoff,
            n_radial=hyper.n_radial,
            l_max=hyper.l_max,
            exponent=hyper.exponent,
        )
        self.stages.append(TensorEmbedding(hyper))
        for _ in range(hyper.n_blocks - 1):
            self.stages.append(Interaction(hyper))
        self.stages.append(Invariants(hyper.channels))

    def own_readout(self) -> nn.Module:
        """Gated network with three hidden layers."""
        n = self.hyper.channels
        return GatedReadout((n, n, n, n, 1))

    def embed(self, graph: Topology) -> State:
        """Element embeddings; the first stage makes matrices of them."""
        return (self.embedded(graph),)

    def geometry(self, vectors: Tensor, graph: Topology) -> BondGeometry:
        """Edges, and the bonds of both directions."""
        sender, receiver = graph.edge_index
        bond, edge = undirected(graph.edge_index, graph.shifts)
        radial, envelope, angular = self.edge_functions(vectors)
        return BondGeometry(sender, receiver, radial, envelope, angular, bond, edge)

    def angular(self, directions: Tensor) -> Tensor:
        """Coefficients (n_edges, 9) of the unit matrix, of the cross product with the direction, and of its square."""
        unit = torch.eye(3, dtype=directions.dtype, device=directions.device)
        cross = torch.linalg.cross(
            directions[:, None].expand(-1, 3, -1), unit.expand(len(directions), 3, 3)
        ).mT
        matrix = unit + cross + directions[:, :, None] * directions[:, None] - unit / 3
        return self.matrices.coefficients(matrix[:, :, :, None]).squeeze(2)

    def edge_functions(self, vectors: Tensor) -> State:
        """Radial functions, a cosine as the envelope, and coefficients of matrices."""
        lengths = vectors.square().sum(dim=-1).sqrt()
        x = (lengths / self.hyper.cutoff).clamp(max=1.0)
        envelope = 0.5 * (torch.cos(math.pi * x) + 1)[:, None]
        return self.radial(lengths), envelope, self.angular(vectors / lengths[:, None])

    def scalars(self, state: State) -> Tensor:
        """Multiples (n_atoms, channels) of the unit matrix, or what :class:`Invariants` makes."""
        return state[0][:, 0]
