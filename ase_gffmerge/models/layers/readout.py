r"""From distances to radial functions, and from node features to per-atom energies.

Both readouts take the scalar features :math:`x_1,\dots,x_L` that the L interaction blocks leave on each atom.

Radial basis and cutoff, smooth enough that energy, force and stress vanish continuously at the cutoff.

Their constants, like those of other layers, are :class:`ExactBuffers`.
"""

import math
from collections.abc import Callable, Sequence
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from ase_gffmerge.models.layers.linear import SparseLinear


class MLPReadout(nn.Module):
    r"""Energy :math:`e_i = w_2\cdot\mathrm{silu}(W_1 x_{L,i} + b_1) + b_2` from the last block's scalars."""

    def __init__(self, channels: int):
        super().__init__()
        self.hidden = nn.Linear(channels, channels // 2)
        self.out = nn.Linear(channels // 2, 1)

    def forward(self, scalars: Sequence[Tensor], species: Tensor) -> Tensor:
        """Map L tensors (n_atoms, channels) to energies (n_atoms,) in eV."""
        return self.out(silu(self.hidden(scalars[-1]))).squeeze(-1)


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
