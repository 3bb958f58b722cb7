r"""Ridge regression from Gram statistics, anchored at a prior.

.. math::

   \min_\Theta\ \|X\Theta-Y\|^2 + \mu\,\|\Theta-\Theta_0\|^2
   \quad\Longrightarrow\quad (G+\mu I)\,(\Theta-\Theta_0) = C - G\,\Theta_0 ,

solved by a Cholesky factorisation in float64. With the relative ridge, :math:`\mu=\lambda\,\mathrm{tr}\,G/d`, the
solution does not depend on the units of the features.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ase_gffmerge.least_squares.gauss_newton import random_signs
from ase_gffmerge.least_squares.gram import Gram

EXACT_TRACE, SIGNS = 2000, 16
"""Unknowns up to which the effective rank is exact, and the number of random vectors of signs beyond."""


@dataclass(frozen=True)
class Solution:
    r"""A solution and its diagnosis.

    Attributes
    ----------
    theta : (d, m)
        The minimiser, float64.
    residual_before, residual_after
        Relative squared residuals of the prior and of the solution.
    effective_rank
        :math:`\mathrm{tr}\,G(G+\mu I)^{-1}`, the degrees of freedom that the rows determine; of large problems an estimate
        with random signs (Hutchinson), good to about a percent.
    ridge
        The absolute ridge μ that was used.
    n_rows
        Rows that entered.
    """

    theta: Tensor
    residual_before: float
    residual_after: float
    effective_rank: float
    ridge: float
    n_rows: int


def ridge_solve(gram: Gram, prior: Tensor, *, ridge: float, relative: bool = True) -> Solution:
    r"""Solve the anchored ridge problem.

    Parameters
    ----------
    gram
        Statistics of the rows, (d, d) and (d, m).
    prior : (d, m)
        The anchor :math:`\Theta_0`; the solution tends to it as the ridge grows.
    ridge
        λ (``relative``) or μ itself. Must not be negative; zero needs rows of full rank.
    relative
        Whether the ridge is in units of the mean eigenvalue of G.

    Raises
    ------
    ValueError
        When G + μI is not positive definite even after the ridge was raised a thousandfold from round-off.
    """
    prior = prior.to(gram.xx)
    factor, mu = regularized_factor(gram, ridge=ridge, relative=relative)
    theta = prior + torch.cholesky_solve(gram.xy - gram.xx @ prior, factor)
    return Solution(
        theta=theta,
        residual_before=gram.residual(prior),
        residual_after=gram.residual(theta),
        effective_rank=len(theta) - mu * _trace_of_inverse(factor),
        ridge=mu,
        n_rows=int(gram.n_rows),
    )


def _trace_of_inverse(factor: Tensor) -> float:
    """Trace of (L Lᵀ)⁻¹: the squared norm of L⁻¹, or its mean over random signs in the place of unit vectors."""
    d = len(factor)
    if d <= EXACT_TRACE:
        columns, repeats = torch.eye(d).to(factor), 1
    else:
        generator = torch.Generator().manual_seed(0)
        columns, repeats = random_signs((d, SIGNS), like=factor, generator=generator), SIGNS
    return float(torch.linalg.solve_triangular(factor, columns, upper=False).square().sum()) / repeats


def regularized_factor(gram: Gram, *, ridge: float, relative: bool = True) -> tuple[Tensor, float]:
    """Cholesky factor of G + μI, and μ; a singular matrix gets the smallest ridge that round-off asks for.

    Without rows (G = 0) any ridge gives the prior.

    Parameters
    ----------
    gram
        G.
    ridge, relative
        As for :func:`ridge_solve`.
    """
    matrix = gram.xx
    scale = float(matrix.diagonal().mean()) or 1.0
    mu = ridge * scale if relative else ridge
    floor = torch.finfo(matrix.dtype).eps * max(scale, torch.finfo(matrix.dtype).tiny) * len(matrix)
    for attempt in (mu, max(mu, floor), max(mu, 30 * floor), max(mu, 1000 * floor)):
        shifted = matrix.clone()
        shifted.diagonal().add_(attempt)
        factor, failed = torch.linalg.cholesky_ex(shifted)
        if not failed:
            return factor, attempt
    raise ValueError("the Gram matrix is not positive definite; are the features finite?")
