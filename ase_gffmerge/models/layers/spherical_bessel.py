r"""Radial functions of the package ``matgl``: spherical Bessel functions, their smooth combinations, and Gaussians.

Constants that ``matgl`` holds in single precision are rounded to it here, too, so that networks of that package compute the
same in double precision.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from scipy.optimize import brentq
from scipy.special import spherical_jn
from torch import Tensor, nn

from ase_gffmerge.models.layers.readout import ExactBuffers

Polynomial = dict[int, int]
"""Integer coefficients by the power of 1/x."""


def rayleigh(order: int) -> tuple[Polynomial, Polynomial]:
    r"""Polynomials p and q of :math:`j_l(x)=p(1/x)\sin x+q(1/x)\cos x`, from :math:`j_{l+1}=\frac{2l+1}{x}j_l-j_{l-1}`."""
    before: tuple[Polynomial, Polynomial] = {}, {1: 1}
    found: tuple[Polynomial, Polynomial] = {1: 1}, {}
    for n in range(order):
        first, second = (
            {
                power: (2 * n + 1) * now.get(power - 1, 0) - old.get(power, 0)
                for power in sorted({*old, *(power + 1 for power in now)})
            }
            for now, old in zip(found, before, strict=True)
        )
        before, found = found, (_without_zeros(first), _without_zeros(second))
    return found


def _without_zeros(polynomial: Polynomial) -> Polynomial:
    return {power: value for power, value in polynomial.items() if value}


def spherical_bessel(
    order: int, x: Tensor, sine: Tensor | None = None, cosine: Tensor | None = None
) -> Tensor:
    """Spherical Bessel function j of one order.

    Parameters
    ----------
    order
        0, 1, 2, ...
    x
        Positive.
    sine, cosine
        Of ``x``, where they are known.
    """
    factors = (torch.sin(x) if sine is None else sine, torch.cos(x) if cosine is None else cosine)
    total = torch.zeros_like(x)
    for polynomial, factor in zip(rayleigh(order), factors, strict=True):
        terms = list(polynomial.items())
        if len(terms) == 1:
            ((power, value),) = terms
            total = total + value * factor / x.pow(power)
        elif terms:
            total = total + torch.stack([value / x.pow(power) for power, value in terms]).sum(0) * factor
    return total


def bessel_roots(l_max: int, n: int) -> np.ndarray:
    """First ``n`` positive roots (l_max + 1, n) of the spherical Bessel functions; those of one order enclose the next's."""
    found = [math.pi * np.arange(1, n + l_max + 1)]
    for order in range(1, l_max + 1):
        last = found[-1]
        found.append(
            np.array(
                [
                    brentq(lambda x: spherical_jn(order, x), low, high, xtol=1e-14)  # noqa: B023
                    for low, high in pairwise(last)
                ]
            )
        )
    return np.stack([roots[:n] for roots in found])


class SphericalBesselBasis(ExactBuffers):
    r"""Functions :math:`\sqrt{2/r_c^3}\,j_l(z_{ln}r/r_c)/|j_{l+1}(z_{ln})|`, which vanish at the cutoff, with a slope.

    Parameters
    ----------
    cutoff
        Radius in Å.
    n_radial
        Roots of every order.
    l_max
        Largest order.
    factors
        Of :math:`1/|z_{ln}j_{l+1}(z_{ln})|` by order and root, where a package has them rounded in a way of its own.
    """

    roots: Tensor
    factors: Tensor

    def __init__(
        self, cutoff: float, n_radial: int, l_max: int, *, factors: Sequence[Sequence[float]] | None = None
    ):
        super().__init__()
        self.cutoff = cutoff
        roots = torch.tensor(bessel_roots(l_max, n_radial), dtype=torch.float32)
        scale = math.sqrt(2.0 / cutoff**3)
        if factors is None:
            found = torch.stack(
                [scale / spherical_bessel(order + 1, row).abs() for order, row in enumerate(roots)]
            )
        else:
            found = scale * torch.tensor(factors, dtype=torch.float64) * roots.double()
        self.register_buffer("roots", roots.double(), persistent=False)
        self.register_buffer("factors", found.double(), persistent=False)

    def forward(self, lengths: Tensor) -> Tensor:
        """Map lengths (n_edges,) in Å to (n_edges, (l_max + 1) · n_radial), orders one after the other."""
        roots, factors = self.roots.to(lengths.dtype), self.factors.to(lengths.dtype)
        x = lengths[:, None, None] / self.cutoff * roots
        sine, cosine = torch.sin(x), torch.cos(x)
        orders = [
            spherical_bessel(order, x[:, order], sine[:, order], cosine[:, order])
            for order in range(len(roots))
        ]
        return (torch.stack(orders, dim=1) * factors).flatten(1)


class SmoothBesselBasis(ExactBuffers):
    r"""Orthogonal combinations of :math:`\sin(k\pi r/r_c)/r` whose first two derivatives vanish at the cutoff.

    Kocer, Mason and Erturk, arXiv 1907.02374, eqs. 10 to 13.

    Parameters
    ----------
    cutoff
        Radius in Å.
    n_radial
        Number of functions.
    """

    frequencies: Tensor
    combinations: Tensor

    def __init__(self, cutoff: float, n_radial: int):
        super().__init__()
        n = np.arange(n_radial)
        scale = (-1.0) ** n * math.sqrt(2) * math.pi / cutoff**1.5 * (n + 1) * (n + 2)
        pairs = np.zeros((n_radial, n_radial + 1))
        pairs[n, n] = pairs[n, n + 1] = scale / np.sqrt((n + 1.0) ** 2 + (n + 2.0) ** 2)
        e = n**2 * (n + 2.0) ** 2 / (4 * (n + 1.0) ** 4 + 1)
        d, rows = [1.0], [pairs[0]]
        for i in range(1, n_radial):
            d.append(1 - e[i] / d[-1])
            rows.append((pairs[i] + math.sqrt(e[i] / d[i - 1]) * rows[-1]) / math.sqrt(d[i]))
        frequencies = torch.arange(1, n_radial + 2, dtype=torch.float64) * math.pi / cutoff
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.register_buffer("combinations", torch.tensor(np.stack(rows).T), persistent=False)

    def forward(self, lengths: Tensor) -> Tensor:
        """Map lengths (n_edges,) in Å to (n_edges, n_radial)."""
        x = lengths[:, None] * self.frequencies.to(lengths.dtype)
        return torch.sin(x) / x @ self.combinations.to(lengths.dtype)


class GaussianBasis(nn.Module):
    r"""Functions :math:`\exp(-\gamma(r-r_k)^2)` with centers from zero to 1 Å beyond the cutoff, which are weights.

    Parameters
    ----------
    cutoff
        Radius in Å.
    n_radial
        Number of functions.
    exponent
        :math:`\gamma` in 1/Å^2.
    """

    def __init__(self, cutoff: float, n_radial: int, exponent: float):
        super().__init__()
        self.exponent = exponent
        self.centers = nn.Parameter(torch.linspace(0.0, cutoff + 1.0, n_radial))

    def forward(self, lengths: Tensor) -> Tensor:
        """Map lengths (n_edges,) in Å to (n_edges, n_radial)."""
        return torch.exp(-self.exponent * (lengths[:, None] - self.centers).square())


RADIAL = ("bessel", "smooth-bessel", "gaussian")
"""Kinds of radial functions."""


def radial_basis(kind: str, *, cutoff: float, n_radial: int, l_max: int, exponent: float) -> nn.Module:
    """Radial functions of one of the kinds in :data:`RADIAL`, which map lengths (n_edges,) to (n_edges, n_functions).

    Parameters
    ----------
    kind
        One of :data:`RADIAL`.
    cutoff, n_radial
        See the classes.
    l_max
        Largest order of ``bessel``, of which there are (l_max + 1) · n_radial functions.
    exponent
        Of ``gaussian``.
    """
    if kind == "gaussian":
        return GaussianBasis(cutoff, n_radial, exponent)
    return (
        SmoothBesselBasis(cutoff, n_radial)
        if kind == "smooth-bessel"
        else SphericalBesselBasis(cutoff, n_radial, l_max)
    )
