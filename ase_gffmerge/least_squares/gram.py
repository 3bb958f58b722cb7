r"""Gram statistics: everything a linear least-squares problem needs to know about its rows.

For rows X (n, d) and targets Y (n, m) the loss :math:`\|X\Theta-Y\|^2` depends on them only through

.. math:: G = X^\top X,\qquad C = X^\top Y,\qquad s = \|Y\|^2,

which add up over batches, processes and machines.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

NOISE = 1e-10
"""Mean squares below this fraction of what they stand beside are taken for round-off of something that is zero by symmetry.

Vectors vanish in perfect crystals, and so do derivatives of scalars; divided by their own size, round-off would count like
everything else. The square of a rounding error in float32 is about 1e-14, with sums over neighbors about 1e-12."""


@dataclass(frozen=True)
class Gram:
    """Sufficient statistics in float64.

    Attributes
    ----------
    xx : (d, d)
        G.
    xy : (d, m)
        C.
    yy
        s, the sum of squared targets.
    n_rows
        Number of rows.
    """

    xx: Tensor
    xy: Tensor
    yy: float
    n_rows: float

    @classmethod
    def of(cls, rows: Tensor, targets: Tensor, *, products: "SymmetricProducts | None" = None) -> Self:
        r"""Statistics of rows (n, d) and targets (n, m).

        Parameters
        ----------
        rows, targets
            X and Y.
        products
            Knows :math:`X^\top X` of rows that were seen before; nobody may change it in place.
        """
        x, y = rows.double(), targets.double()
        xx = products(x) if products else symmetric_product(x)
        return cls(xx, x.T @ y, float(y.square().sum()), float(len(x)))

    @classmethod
    def zero(cls, d: int, m: int, *, device: torch.device | str = "cpu") -> Self:
        """Statistics of no rows.

        Parameters
        ----------
        d, m
            Columns of rows and targets.
        device
            Where they are added up.
        """
        nothing = torch.zeros((), dtype=torch.float64, device=device)
        return cls(nothing.new_zeros(d, d), nothing.new_zeros(d, m), 0.0, 0.0)

    def __add__(self, other: Self) -> Self:
        """Statistics of the union of the rows."""
        return type(self)(
            self.xx + other.xx, self.xy + other.xy, self.yy + other.yy, self.n_rows + other.n_rows
        )

    def add_rows(self, rows: Tensor, targets: Tensor) -> Self:
        """Statistics with further rows (n, d) and targets (n, m), in the memory of these, which are lost."""
        x, y = rows.double(), targets.double()
        add_symmetric_product(self.xx, x)
        self.xy.addmm_(x.T, y)
        return type(self)(self.xx, self.xy, self.yy + float(y.square().sum()), self.n_rows + len(x))

    def __mul__(self, weight: float) -> Self:
        """Statistics of rows that count ``weight`` times; ``n_rows`` keeps the true number."""
        return type(self)(self.xx * weight, self.xy * weight, self.yy * weight, self.n_rows)

    def balanced(self, other: Self, weight: float) -> Self:
        """Add rows of another kind, scaled so that their targets weigh ``weight`` times those of these rows.

        Targets that are but round-off beside the others (:data:`NOISE`) have no weight: theirs is that of the others.
        """
        if not other.n_rows or not self.n_rows:
            return self
        natural = other.yy * self.n_rows / other.n_rows
        if natural <= NOISE * self.yy:
            return self
        size = self.yy if self.yy > NOISE * natural else natural
        total = self + other * (weight * size / other.yy)
        return type(self)(total.xx, total.xy, total.yy, self.n_rows)

    @property
    def mean_square_target(self) -> float:
        """Mean squared target per row and output."""
        return self.yy / max(self.n_rows * self.xy.shape[1], 1)

    def residual(self, theta: Tensor) -> float:
        r"""Relative residual :math:`\|X\Theta-Y\|^2/\|Y\|^2` of a solution."""
        value = self.yy + float((theta * (self.xx @ theta - 2 * self.xy)).sum())
        return max(value, 0.0) / self.yy if self.yy else 0.0


def symmetric_product(x: Tensor, *, block: int = 1024) -> Tensor:
    """Product xᵀ x (d, d) for x (n, d); blocks below the diagonal are copied, not computed."""
    d = x.shape[1]
    if d <= block:
        return x.T @ x
    return add_symmetric_product(x.new_zeros(d, d), x, block=block)


class SymmetricProducts:
    """Gives :func:`symmetric_product`, of the matrices seen last without computing it: the same rows enter several layers.

    Parameters
    ----------
    most
        Matrices that are remembered.
    max_entries
        Larger ones are not.
    """

    def __init__(self, *, most: int = 8, max_entries: int = 2**22):
        self._most, self._max_entries = most, max_entries
        self._held: list[tuple[Tensor, Tensor]] = []

    def __call__(self, x: Tensor) -> Tensor:
        """Product xᵀ x (d, d) for x (n, d)."""
        for held, product in self._held:
            if held.device == x.device and torch.equal(held, x):
                return product
        product = symmetric_product(x)
        if 0 < x.numel() <= self._max_entries:
            self._held = [(x, product), *self._held][: self._most]
        return product


def add_symmetric_product(total: Tensor, x: Tensor, *, block: int = 1024) -> Tensor:
    """Add :func:`symmetric_product` to a symmetric matrix, in place.

    Parameters
    ----------
    total : (d, d)
        Symmetric; added to.
    x : (n, d)
        Rows.
    block
        Columns that are multiplied at once.
    """
    for start in range(0, x.shape[1], block):
        rows = slice(start, start + block)
        total[rows, start:].addmm_(x[:, rows].T, x[:, start:])
        total[start:, rows] = total[rows, start:].T.clone()
    return total


def normalized_sum(grams: Sequence[Gram], weights: Sequence[float]) -> Gram:
    r"""Weighted sum :math:`\sum_k \frac{a_k}{n_k s_k}\,\mathrm{Gram}_k` with mean squared targets s_k.

    Every specialist counts the same, however many frames it brings and however large its targets are; targets that are but
    round-off beside the largest s_k (:data:`NOISE`) are divided by that. Without any rows (no frame has an angle, say)
    nothing is known, and G = 0.
    """
    largest = max(gram.mean_square_target for gram in grams)
    scales = [s if (s := gram.mean_square_target) > NOISE * largest else largest for gram in grams]
    terms = [
        gram * (weight / (gram.n_rows * (scale or 1.0)))
        for gram, weight, scale in zip(grams, weights, scales, strict=True)
        if gram.n_rows
    ]
    return sum(terms[1:], start=terms[0]) if terms else grams[0]
