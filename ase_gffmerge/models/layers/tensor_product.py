r"""Convolution of equivariant features with spherical harmonics.

A path :math:`p = (l_1, l_2, l_3)` takes features of order :math:`l_1` and harmonics of order :math:`l_2` to
order :math:`l_3` with the Wigner 3j symbols C of e3nn. Harmonics have one channel, so their part does not
depend on features and is evaluated once per edge, whatever the number of blocks and channels:

.. math::

   B^{(p)}_{m_1 m_3}(\hat{\mathbf r}) =
       \sqrt{2l_3+1}\,\sum_{m_2} C^{l_1 l_2 l_3}_{m_1 m_2 m_3} Y_{l_2 m_2}(\hat{\mathbf r}),
   \qquad (x \otimes Y)^{(p)}_{u m_3} = \sum_{m_1} x_{u m_1} B^{(p)}_{m_1 m_3}.

This is e3nn's ``TensorProduct`` in mode ``uvu`` with ``path_normalization="none"``, in another order of
summation; its constants stay in float64, whatever happens to the weights.
"""

from itertools import product
from typing import NamedTuple

import torch
from e3nn import o3
from torch import Tensor

from ase_gffmerge.models.layers.radial import ExactBuffers


class Path(NamedTuple):
    """Orders of features, harmonics and result."""

    l1: int
    l2: int
    l3: int


def natural(channels: tuple[int, ...]) -> o3.Irreps:
    """Irreps with ``channels[l]`` features of order l and parity (-1)^l."""
    return o3.Irreps([(mul, (order, (-1) ** order)) for order, mul in enumerate(channels)])


def coupling_paths(l_in: int, l_harmonics: int, l_out: int) -> tuple[Path, ...]:
    """Paths between orders of natural parity by l1, then l3: a smaller ``l_out`` cuts the end of each l1.

    Parameters
    ----------
    l_in, l_harmonics, l_out
        Largest orders of features, harmonics and results.
    """
    orders = product(range(l_in + 1), range(l_out + 1), range(l_harmonics + 1))
    return tuple(
        Path(l1, l2, l3) for l1, l3, l2 in orders if abs(l1 - l3) <= l2 <= l1 + l3 and (l1 + l2 + l3) % 2 == 0
    )


def total_order(paths: tuple[Path, ...], l1: int) -> int:
    """Components of all results of features of order ``l1``."""
    return sum(2 * path.l3 + 1 for path in paths if path.l1 == l1)


class CoupledHarmonics(ExactBuffers):
    """Matrices B of all paths for a batch of directions.

    Parameters
    ----------
    l_max
        Largest order of features and harmonics.
    """

    coefficients: Tensor

    def __init__(self, l_max: int):
        super().__init__()
        orders = list(range(l_max + 1))
        self.harmonics = o3.SphericalHarmonics(orders, normalize=False, normalization="component")
        paths, groups = coupling_paths(l_max, l_max, l_max), []
        for l1 in orders:
            group = [self.symbols(path, l_max) for path in paths if path.l1 == l1]
            groups.append(torch.cat(group, dim=2).flatten(1))
        self.register_buffer("coefficients", torch.cat(groups, dim=1), persistent=False)

    @staticmethod
    def symbols(path: Path, l_max: int) -> Tensor:
        """Symbols (n_harmonics, 2 l1 + 1, 2 l3 + 1) of one path, zero for harmonics of other orders."""
        table = torch.zeros((l_max + 1) ** 2, 2 * path.l1 + 1, 2 * path.l3 + 1, dtype=torch.float64)
        symbols = o3.wigner_3j(*path, dtype=torch.float64, device="cpu").transpose(0, 1)
        table[path.l2**2 : (path.l2 + 1) ** 2] = (2 * path.l3 + 1) ** 0.5 * symbols
        return table

    def forward(self, directions: Tensor) -> Tensor:
        """Map unit vectors (n_edges, 3) to the matrices B of all paths, flat (n_edges, n_coefficients)."""
        return self.harmonics(directions) @ self.coefficients.to(directions.dtype)


class Convolution:
    """Messages ``w_p ⊙ (x ⊗ Y)_p`` for every path p.

    Parameters
    ----------
    channels
        Features of every order l = 0, 1, ...
    l_max
        Largest order of the harmonics.
    l_out
        Largest order of the messages.

    Attributes
    ----------
    weight_channels
        Number of weights per path.
    irreps_out
        Layout of the messages.
    """

    def __init__(self, channels: tuple[int, ...], *, l_max: int, l_out: int):
        self.channels, self.l_max = channels, l_max
        self.paths = coupling_paths(len(channels) - 1, l_max, l_out)
        self.weight_channels = [channels[path.l1] for path in self.paths]
        self.order = sorted(range(len(self.paths)), key=lambda i: self.paths[i].l3)
        sums = [0] * (l_out + 1)
        for path, mul in zip(self.paths, self.weight_channels, strict=True):
            sums[path.l3] += mul
        self.irreps_out = natural(tuple(sums))

    def __call__(self, features: Tensor, coupled: Tensor, weights: Tensor) -> Tensor:
        """Map features, coupled harmonics and weights on edges to messages (n_edges, irreps_out.dim)."""
        products = self.products(features, coupled)
        per_path = weights.split(self.weight_channels, dim=1)
        return torch.cat([(products[i] * per_path[i][:, :, None]).flatten(1) for i in self.order], dim=1)

    def products(self, features: Tensor, coupled: Tensor) -> list[Tensor]:
        """(x ⊗ Y)_p (n_edges, channels, 2 l3 + 1) for every path."""
        all_paths = coupling_paths(self.l_max, self.l_max, self.l_max)
        products: list[Tensor] = []
        feature, column = 0, 0
        for l1, mul in enumerate(self.channels):
            rows, n_columns = 2 * l1 + 1, total_order(all_paths, l1)
            x = features[:, feature : feature + mul * rows].unflatten(1, (mul, rows))
            b = coupled[:, column : column + rows * n_columns].unflatten(1, (rows, n_columns))
            b = b[:, :, : total_order(self.paths, l1)]
            y = x @ b if l1 else x * b
            products += y.split([2 * path.l3 + 1 for path in self.paths if path.l1 == l1], dim=2)
            feature, column = feature + mul * rows, column + rows * n_columns
        return products
