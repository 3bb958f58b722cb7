r"""One Gauss-Newton step: minimise :math:`\|r - J\delta\|^2 + \mu\,\delta^\top D\,\delta` by conjugate gradients.

D is the diagonal of JᵀJ estimated from random signs (Hutchinson), a floor added; it is the preconditioner and the metric of
the damping. Parameters are dictionaries of tensors, residuals lists of flat tensors (one per batch).
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

Parameters = dict[str, Tensor]
SIGNS = 4
"""Random vectors for the diagonal."""

FLOOR = 0.01
"""Floor of the diagonal, relative to the mean within a tensor."""


class LinearisedProblem(Protocol):
    """Weighted residuals and their derivative with respect to the parameters."""

    def residual(self) -> list[Tensor]:
        """Target minus output."""
        ...

    def forward(self, direction: Parameters) -> list[Tensor]:
        """J v."""
        ...

    def transpose(self, vectors: list[Tensor]) -> Parameters:
        """Jᵀ r."""
        ...


def dot(a: Parameters, b: Parameters) -> float:
    """Scalar product in float64."""
    return sum(float((a[name].double() * b[name].double()).sum()) for name in a)


def add(a: Parameters, b: Parameters, factor: float) -> Parameters:
    """Sum a + factor · b."""
    return {name: a[name] + factor * b[name] for name in a}


def diagonal(problem: LinearisedProblem, residual: list[Tensor], *, seed: int = 0) -> Parameters:
    """Estimate of the diagonal of JᵀJ, with a floor."""
    generator = torch.Generator().manual_seed(seed)
    total: Parameters = {}
    for _ in range(SIGNS):
        signs = [2.0 * torch.randint(0, 2, r.shape, generator=generator).to(r) - 1 for r in residual]
        for name, value in problem.transpose(signs).items():
            total[name] = total.get(name, torch.zeros_like(value)) + value.square() / SIGNS
    tiny = 1e-12 * max(float(value.mean()) for value in total.values())
    return {name: value + FLOOR * value.mean() + tiny for name, value in total.items()}


def gauss_newton_step(
    problem: LinearisedProblem,
    *,
    iterations: int,
    damping: float,
    at: Callable[[int, Parameters], None] = lambda iteration, step: None,
) -> Parameters:
    """Step δ after some conjugate-gradient iterations; ``at`` sees every iterate.

    Parameters
    ----------
    problem
        Residuals and their linearisation.
    iterations
        A limit that regularises as much as the damping.
    damping
        μ; D being close to the diagonal of JᵀJ, it needs no unit.
    at
        Called with the number of the iteration and the step so far.
    """
    target = problem.residual()
    scale = diagonal(problem, target)
    left = problem.transpose(target)
    step = {name: torch.zeros_like(value) for name, value in left.items()}
    z = {name: left[name] / scale[name] for name in left}
    direction, norm = z, dot(left, z)
    for iteration in range(1, iterations + 1):
        curved = problem.transpose(problem.forward(direction))
        curved = {name: curved[name] + damping * scale[name] * direction[name] for name in curved}
        length = norm / dot(direction, curved)
        step, left = add(step, direction, length), add(left, curved, -length)
        z = {name: left[name] / scale[name] for name in left}
        norm, previous = dot(left, z), norm
        direction = add(z, direction, norm / previous)
        at(iteration, step)
    return step
