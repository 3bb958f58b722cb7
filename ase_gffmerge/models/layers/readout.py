r"""From distances to radial functions, and from node features to per-atom energies.

The readouts take the scalar features :math:`x_1,\dots,x_L` that the L interaction blocks leave on each atom.

Radial basis and cutoff, smooth enough that energy, force and stress vanish continuously at the cutoff.

Their constants, like those of other layers, are :class:`ExactBuffers`.

Gated networks, :math:`\mathrm{core}(x)\odot\sigma(\mathrm{gate}(x))`, of M3GNet and of its readout.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn.functional import silu, softplus

from ase_gffmerge.models.layers.linear import JoinedLinear, Part, SparseLinear, take_rows


class MLPReadout(nn.Module):
    r"""Energy :math:`e_i = w_2\cdot\mathrm{silu}(W_1 x_{L,i} + b_1) + b_2` from the last block's scalars."""

    def __init__(self, channels: int):
        super().__init__()
        self.hidden = nn.Linear(channels, max(channels // 2, 1))
        self.out = nn.Linear(max(channels // 2, 1), 1)

    def forward(self, scalars: Sequence[Tensor], species: Tensor) -> Tensor:
        """Map L tensors (n_atoms, channels) to energies (n_atoms,) in eV."""
        return self.out(silu(self.hidden(scalars[-1]))).squeeze(-1)


class LinearReadouts(nn.Module):
    """Energies linear in the scalars of every block."""

    def __init__(self, channels: int, n_blocks: int):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(channels, 1) for _ in range(n_blocks))

    def forward(self, scalars: Sequence[Tensor], species: Tensor) -> Tensor:
        """Map L tensors (n_atoms, channels) to energies (n_atoms,) in eV."""
        terms = [layer(x).squeeze(-1) for layer, x in zip(self.layers, scalars, strict=True)]
        return torch.stack(terms).sum(dim=0)


class RandomFeatureReadout(nn.Module):
    r"""Energy :math:`e_i = e^{\rm MLP}_i + \theta_{Z_i}\cdot\phi_i + c_{Z_i}`, linear in :math:`(\theta, c)`.

    The features are :math:`\phi_i = \mathrm{silu}(A[x_{B,i};\dots;x_{L,i}] + b)`: random projections of the scalars
    after several blocks; each element weighs them on its own. Because energies and forces are linear in
    :math:`(\theta, c)`, a merge finds them in closed form (random-feature readouts: "franken", arXiv 2505.05652).

    Parameters
    ----------
    mlp
        The architecture's own readout.
    channels
        Scalars per block.
    n_species
        Number of elements.
    width
        Number of features :math:`\phi`.
    blocks
        How many of the last blocks' scalars enter.
    groups, inputs
        A is sparse: each of that many groups of features reads so many inputs; 0 groups make it dense.
    """

    def __init__(
        self,
        mlp: nn.Module,
        channels: int,
        n_species: int,
        *,
        width: int,
        blocks: int,
        groups: int = 0,
        inputs: int = 0,
    ):
        super().__init__()
        self.blocks = blocks
        self.mlp = mlp
        self.lift: nn.Linear | SparseLinear = (
            SparseLinear(blocks * channels, width, groups=groups, inputs=inputs)
            if groups
            else nn.Linear(blocks * channels, width)
        )
        self.theta = nn.Parameter(torch.zeros(n_species, width))
        self.constants = nn.Parameter(torch.zeros(n_species))

    def random_features(self, scalars: Sequence[Tensor]) -> Tensor:
        """Inputs of the projection, [x_B; ...; x_L] (n_atoms, blocks · channels)."""
        return torch.cat(list(scalars[-self.blocks :]), dim=-1)

    def forward(self, scalars: Sequence[Tensor], species: Tensor) -> Tensor:
        """Map L tensors (n_atoms, channels) and element rows (n_atoms,) to energies (n_atoms,) in eV."""
        features = silu(self.lift(self.random_features(scalars)))
        per_element = features @ self.theta.T + self.constants
        return self.mlp(scalars, species) + per_element.gather(1, species[:, None]).squeeze(1)


def polynomial_cutoff(lengths: Tensor, cutoff: float) -> Tensor:
    r"""Envelope :math:`1-10x^3+15x^4-6x^5` with :math:`x=r/r_c`; it vanishes to third order at the cutoff.

    Parameters
    ----------
    lengths : (n_edges,) Å
    cutoff
        Radius in Å; beyond it the envelope is exactly zero.
    """
    x = (lengths / cutoff).clamp(max=1.0)
    return 1 + x**3 * (-10 + x * (15 - 6 * x))


def bump_cutoff(lengths: Tensor, cutoff: Tensor | float, width: float) -> Tensor:
    r"""Envelope :math:`\tfrac12(1+\tanh\cot\pi x)` with :math:`x=(r-r_c)/w+1`; all derivatives vanish at its ends.

    Parameters
    ----------
    lengths
        Å.
    cutoff
        Radius in Å, or one for every length; beyond it the envelope is exactly zero.
    width
        Over which it falls from one, in Å.
    """
    x = ((lengths - cutoff) / width + 1).clamp(1e-6, 1 - 1e-6)
    return 0.5 * (1 + torch.tanh(1 / torch.tan(math.pi * x)))


def cosine_cutoff(lengths: Tensor, cutoff: Tensor | float, width: float) -> Tensor:
    r"""Envelope :math:`\tfrac12(1+\cos\pi x)`, see :func:`bump_cutoff`; one derivative vanishes.

    Parameters
    ----------
    lengths, cutoff, width
        Å.
    """
    return 0.5 * (1 + torch.cos(math.pi * ((lengths - cutoff) / width + 1).clamp(0.0, 1.0)))


def adaptive_cutoffs(
    lengths: Tensor,
    receiver: Tensor,
    n_atoms: int,
    *,
    neighbors: float,
    cutoff: float,
    width: float,
    method: str = "solver",
) -> Tensor:
    """Radii (n_atoms, 1) in Å within which atoms have about so many neighbours, those of a uniform density added.

    Parameters
    ----------
    lengths : (n_edges, 1)
        Å.
    receiver : (n_edges,)
        Atom whose neighbour an edge brings.
    n_atoms
        How many there are.
    neighbors
        Per atom; without any the radius is ``cutoff``.
    cutoff, width
        Largest radius, and over which length a neighbour is counted in part, in Å.
    method
        ``solver``: the radius itself, ``grid``: a mean of radii, weighed by their numbers of
        neighbours.
    """
    find = {"solver": _solved, "grid": _probed}[method]
    return find(lengths, receiver, n_atoms, neighbors, cutoff, width)


def _solved(
    lengths: Tensor, receiver: Tensor, n_atoms: int, target: float, cutoff: float, width: float
) -> Tensor:
    """Ten steps of Newton's method within brackets, and one that has derivatives."""

    def count(radius: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        x = math.pi * ((lengths - take_rows(radius, receiver)) / width + 1).clamp(1e-6, 1 - 1e-6)
        height = torch.tanh(1 / torch.tan(x))
        slope = math.pi / (2 * width) * (1 - height.square()) / torch.sin(x).square()
        both = torch.cat([0.5 * (1 + height), slope], dim=1)
        number, slope = both.new_zeros(n_atoms, 2).index_add(0, receiver, both).split(1, dim=1)
        return number + target * (radius / cutoff) ** 3, slope + 3 * target * radius**2 / cutoff**3

    fixed = lengths.detach()
    low, high = fixed.new_zeros(n_atoms, 1), fixed.new_full((n_atoms, 1), cutoff)
    radius = 0.5 * high
    for _ in range(10):
        number, slope = count(radius, fixed)
        below = number <= target
        low, high = torch.where(below, radius, low), torch.where(below, high, radius)
        step = radius - (number - target) / slope.clamp(min=1e-6)
        radius = torch.where((step >= low) & (step <= high), step, 0.5 * (low + high))
    slope = count(radius, fixed)[1].clamp(min=1e-6)
    return (radius - (count(radius, lengths)[0] - target) / slope).clamp(cutoff / 16, cutoff)


def _probed(
    lengths: Tensor, receiver: Tensor, n_atoms: int, target: float, cutoff: float, width: float
) -> Tensor:
    """Means of probes, weighed by how near their numbers of neighbours are."""
    probes = torch.arange(0.5, cutoff, width / 4, device=lengths.device, dtype=lengths.dtype)
    bumps = bump_cutoff(lengths, probes, width)
    difference = bumps.new_zeros(n_atoms, len(probes)).index_add(0, receiver, bumps) - target
    difference = (
        difference + target * torch.linspace(0, 1, len(probes), device=probes.device, dtype=probes.dtype) ** 3
    )
    inner = 0.5 * (difference[:, 2:] - difference[:, :-2])
    ends = [difference[:, 1:2] - difference[:, :1], inner, difference[:, -1:] - difference[:, -2:-1]]
    spread = torch.cat(ends, dim=1).abs().clamp(min=1e-12)
    weights = torch.softmax(-0.5 * (difference / spread) ** 2, dim=1)
    return (weights * probes).sum(dim=1, keepdim=True)


class ExactBuffers(nn.Module):
    """A module whose own buffers follow it to a device but keep their floating-point type.

    A model that goes ``.float()`` and back ``.double()`` then computes what it computed before, up to its
    weights. Use the buffers cast to the type of the features they meet.
    """

    def _apply(self, fn: Callable[..., Tensor], recurse: bool = True) -> Self:
        exact = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, buffer in exact.items():
            setattr(self, name, buffer.to(getattr(self, name).device))
        return self


class BesselBasis(ExactBuffers):
    r"""Bessel functions :math:`\sqrt{2/r_c}\,\sin(n\pi r/r_c)/r` (DimeNet, arXiv 2003.03123, eq. 7).

    Parameters
    ----------
    cutoff
        Radius in Å.
    n_radial
        Number of functions.
    """

    frequencies: Tensor

    def __init__(self, cutoff: float, n_radial: int):
        super().__init__()
        self.cutoff = cutoff
        orders = torch.arange(1, n_radial + 1, dtype=torch.float64)
        self.register_buffer("frequencies", orders * math.pi / cutoff, persistent=False)

    def forward(self, lengths: Tensor) -> Tensor:
        """Map lengths (n_edges,) in Å to the basis (n_edges, n_radial)."""
        r = lengths[:, None]
        return math.sqrt(2 / self.cutoff) * torch.sin(self.frequencies.to(r.dtype) * r) / r


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "swish": silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "softplus": softplus,
    "softplus2": lambda x: softplus(x) - math.log(2.0),
}
"""By the names that ``matgl`` gives them."""


class GatedNetwork(nn.Module):
    r"""Two networks of the same shape, the core with SiLU after its layers, the gate with SiLU between and σ at the end.

    Parameters
    ----------
    widths
        Of input, hidden layers and output.
    bias
        Whether the layers have one.
    joined
        The input is a sequence of parts, see :class:`.JoinedLinear`.
    activate_last
        Whether SiLU follows the core's last layer, too.
    """

    def __init__(
        self, widths: Sequence[int], *, bias: bool = True, joined: bool = False, activate_last: bool = True
    ):
        super().__init__()
        self.activate_last = activate_last
        first = JoinedLinear if joined else nn.Linear
        pairs = list(pairwise(widths))
        self.core, self.gate = (
            nn.ModuleList((nn.Linear if i else first)(*pair, bias=bias) for i, pair in enumerate(pairs))
            for _ in range(2)
        )

    def forward(self, x: Tensor | Sequence[Part]) -> Tensor:
        """Map features (n, widths[0]), joined or not, to (n, widths[-1])."""
        core, gate = _through(self.core, x), _through(self.gate, x)
        return (silu(core) if self.activate_last else core) * torch.sigmoid(gate)


def _through(layers: nn.ModuleList, x: Tensor | Sequence[Part]) -> Tensor:
    """All layers with SiLU between them."""
    first, *rest = layers
    hidden: Tensor = first(x)
    for layer in rest:
        hidden = layer(silu(hidden))
    return hidden


class GatedReadout(nn.Module):
    """Energies of the last scalars by a gated network, times a factor per element where ``n_species`` is given.

    Parameters
    ----------
    widths
        Of scalars, hidden layers and the energy, which is 1.
    n_species
        Number of elements.
    """

    def __init__(self, widths: Sequence[int], n_species: int | None = None):
        super().__init__()
        self.network = GatedNetwork(widths, activate_last=False)
        self.scale = None if n_species is None else nn.Parameter(torch.ones(n_species))

    def forward(self, scalars: Sequence[Tensor], species: Tensor) -> Tensor:
        """Map L tensors (n_atoms, channels) and element rows (n_atoms,) to energies (n_atoms,) in eV."""
        energies: Tensor = self.network(scalars[-1]).squeeze(-1)
        return energies if self.scale is None else energies * self.scale[species]
