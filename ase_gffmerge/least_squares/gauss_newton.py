r"""One Gauss-Newton step on several affine maps at once, by preconditioned conjugate gradients.

Residuals :math:`r(\Theta) = y - f(\Theta)` depend on all maps :math:`\Theta = (\Theta_1, \dots, \Theta_L)` together.
To first order in a step δ they are :math:`r - J\delta`, and the step solves the convex problem

.. math::

   \min_\delta \|r - J\delta\|^2 + \mu \sum_l \langle \delta_l,\ P_l\,\delta_l\rangle ,\qquad
   P_l = G_l \otimes \mathrm{diag}(b_l),

where :math:`G_l` is the Gram matrix of the rows that enter map l and :math:`b_{lj}` the mean square with which its output j
reaches the residuals, estimated with random signs (Hutchinson's estimator of the diagonal of :math:`J^\top J`). The same P,
a Kronecker factorisation of the curvature with a diagonal second factor (compare K-FAC, Martens & Grosse, arXiv
1503.05671), preconditions the iteration, which needs nothing but the products :math:`Jv` and :math:`J^\top u`.

Random signs: unbiased estimates of traces and diagonals from products alone.

For a vector u of independent signs, :math:`\mathbb E\,u u^\top = 1`, so that :math:`\mathbb E\,u^\top A u =
\mathrm{tr}\,A` and :math:`\mathbb E\,(J^\top u)^2 = \mathrm{diag}(J^\top J)` element by element (Hutchinson,
doi:10.1080/03610918908812806).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


def random_signs(shape: tuple[int, ...], *, like: Tensor, generator: torch.Generator) -> Tensor:
    """Independent ±1.

    Parameters
    ----------
    shape
        Of the result.
    like
        Tensor whose type and device it gets.
    generator
        On the CPU, so that the signs are the same on every device.
    """
    return 2.0 * torch.randint(0, 2, shape, generator=generator).to(like) - 1


Thetas = dict[str, Tensor]
"""Affine maps Θ_l (d_l, m_l) by name."""

SIGNS = 4
"""Random vectors that estimate the diagonal of the curvature."""

INPUT_FLOOR, OUTPUT_FLOOR = 0.1, 0.01
"""Least eigenvalues of G and least entries of b, relative to their means: what the estimates cannot resolve."""


class LinearizedResiduals(Protocol):
    """Weighted residuals and their linearisation; vectors of residuals are lists with one tensor per batch.

    Attributes
    ----------
    thetas
        The maps at which it is linearised.
    grams
        Gram matrix (d_l, d_l) of the rows that enter each map.
    residual
        Target minus output.
    """

    thetas: Thetas
    grams: Thetas
    residual: list[Tensor]

    def forward(self, direction: Thetas) -> list[Tensor]:
        """J v."""
        ...

    def vjp(self, k: int, vector: Tensor) -> Thetas:
        """Batch k's part of Jᵀ u."""
        ...

    def summed(self, parts: Thetas) -> Thetas:
        """Sums over the batches of all processes, from those over the batches of this one."""
        ...


def gauss_newton_steps(
    residuals: LinearizedResiduals, *, iterations: int, damping: float
) -> Iterator[Thetas]:
    """Step δ of all maps after every conjugate-gradient iteration; fewer iterations regularise more.

    Every residual is made orthogonal to all earlier ones again: round-off would take that away, and with it the
    reproducibility of maps that the residuals hardly determine.

    Parameters
    ----------
    residuals
        With their linearisation.
    iterations
        How many at most.
    damping
        μ; as P has the units of the curvature, it is a pure number.
    """
    metric = KroneckerPreconditioner.of(residuals)
    left = _transpose(residuals, residuals.residual)
    step = {name: torch.zeros_like(value) for name, value in left.items()}
    direction = z = metric.solve(left)
    norm = first = dot(left, z)
    past: list[tuple[Thetas, Thetas, float]] = []
    round_off = max(torch.finfo(value.dtype).eps for value in left.values()) ** 2
    for _ in range(iterations):
        if norm <= round_off * first:
            break
        curved = _transpose(residuals, residuals.forward(direction))
        curved = _add(curved, metric.product(direction), factor=damping)
        length = norm / dot(direction, curved)
        past.append((left, z, norm))
        step, left = _add(step, direction, factor=length), _add(left, curved, factor=-length)
        yield step
        for earlier, solved, size in past:
            left = _add(left, earlier, factor=-dot(left, solved) / size)
        z = metric.solve(left)
        norm, previous = dot(left, z), norm
        direction = _add(z, direction, factor=norm / previous)


@dataclass(frozen=True)
class KroneckerPreconditioner:
    """The metric P: per map a Gram matrix ``inputs`` (d, d), its Cholesky factor, and ``outputs`` b (m,)."""

    inputs: Thetas
    factors: Thetas
    outputs: Thetas

    @classmethod
    def of(cls, residuals: LinearizedResiduals) -> "KroneckerPreconditioner":
        """Estimate b so that the diagonal of P has the size of the diagonal of JᵀJ."""
        inputs = {name: _floored(gram) for name, gram in residuals.grams.items()}
        diagonal = _diagonal(residuals)
        outputs = {name: (d / inputs[name].diagonal()[:, None]).mean(dim=0) for name, d in diagonal.items()}
        least = 1e-12 * max(float(b.mean()) for b in outputs.values()) + 1e-30
        return cls(
            inputs,
            {name: torch.linalg.cholesky(gram) for name, gram in inputs.items()},
            {name: b + OUTPUT_FLOOR * b.mean() + least for name, b in outputs.items()},
        )

    def product(self, thetas: Thetas) -> Thetas:
        """P Θ."""
        return {name: self.outputs[name] * (self.inputs[name] @ theta) for name, theta in thetas.items()}

    def solve(self, thetas: Thetas) -> Thetas:
        """P⁻¹ Θ."""
        return {
            name: torch.cholesky_solve(theta, self.factors[name]) / self.outputs[name]
            for name, theta in thetas.items()
        }


def _floored(gram: Tensor) -> Tensor:
    """Gram matrix of mean eigenvalue 1 with a floor; the identity when nothing enters."""
    mean = gram.diagonal().mean()
    unit = torch.eye(len(gram)).to(gram)
    return gram / mean + INPUT_FLOOR * unit if mean > 0 else unit


def _diagonal(residuals: LinearizedResiduals) -> Thetas:
    """Hutchinson's estimate of the diagonal of JᵀJ, batch by batch with the same signs, whatever their order."""
    total = {name: torch.zeros_like(theta) for name, theta in residuals.thetas.items()}
    for k, residual in enumerate(residuals.residual):
        generator = torch.Generator().manual_seed(0)
        for _ in range(SIGNS):
            signs = random_signs(tuple(residual.shape), like=residual, generator=generator)
            for name, value in residuals.vjp(k, signs).items():
                total[name] += value.square() / SIGNS
    return residuals.summed(total)


def _transpose(residuals: LinearizedResiduals, vectors: Sequence[Tensor]) -> Thetas:
    """Jᵀ u, the sum over batches."""
    total = {name: torch.zeros_like(theta) for name, theta in residuals.thetas.items()}
    for k, vector in enumerate(vectors):
        total = _add(total, residuals.vjp(k, vector), factor=1.0)
    return residuals.summed(total)


def squared(vectors: Sequence[Tensor]) -> float:
    """Sum of squares in float64."""
    return sum(float(vector.double().square().sum()) for vector in vectors)


def dot(a: Thetas, b: Thetas) -> float:
    """Scalar product, summed in float64."""
    return sum(float((a[name].double() * b[name].double()).sum()) for name in a)


def _add(a: Thetas, b: Thetas, *, factor: float) -> Thetas:
    return {name: a[name] + factor * b[name] for name in a}
