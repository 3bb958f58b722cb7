r"""Radial basis and cutoff, smooth enough that energy, force and stress vanish continuously at the cutoff.

Their constants, like those of other layers, are :class:`ExactBuffers`.
"""

import math
from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn


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
