r"""Message-level targets: solve a stage's closing map on the stage's OUTPUT.

After aggregation and residual, a stage's output is affine in its closing map, :math:`X^{(t)} = f(\Theta)`. The layer-wise
solution matched the layer's own output; what the next stage sees is the sum over neighbours. So solve again

.. math::

   \min_\Theta \sum_k \frac{a_k}{N_k}\sum_c \frac{1}{s_{kc}} \bigl\| f_{kc}(\Theta) - X^{(t)}_{kc} \bigr\|^2
   + \mu \|\Theta-\Theta_0\|^2 ,

where f_k runs on the merged model's own input state, :math:`X_k^{(t)}` is specialist k's output and c runs over the parts
of a state (scalars, vectors), each divided by its mean square. The normal equations are solved matrix-free by
preconditioned conjugate gradients: :math:`Jv` is a forward evaluation, :math:`J^\top r` one reverse pass, and the
preconditioner is the layer's own Gram matrix, :math:`(\beta G + \mu)^{-1}` acting on the input index of Θ.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

AffineMap = Callable[[Tensor], tuple[Tensor, ...]]


@dataclass(frozen=True)
class MessageTerm:
    """One batch of one specialist.

    Attributes
    ----------
    output
        The affine map Θ -> state (a tuple of tensors).
    target
        The specialist's state.
    scales
        Weight of each part of the state.
    """

    output: AffineMap
    target: tuple[Tensor, ...]
    scales: tuple[float, ...]


@dataclass(frozen=True)
class MessageSolution:
    """Closing map and its diagnosis.

    Attributes
    ----------
    theta : (d, m)
    residual_before, residual_after
        Weighted squared mismatch of the stage's output, relative to the target.
    iterations
        Conjugate-gradient iterations taken.
    ridge
        The absolute ridge μ.
    """

    theta: Tensor
    residual_before: float
    residual_after: float
    iterations: int
    ridge: float


def solve_messages(
    terms: Sequence[MessageTerm],
    prior: Tensor,
    *,
    metric: Tensor,
    ridge: float,
    iterations: int = 6,
    tolerance: float = 1e-3,
) -> MessageSolution:
    """Minimise the mismatch of the stage output over its closing map.

    Parameters
    ----------
    terms
        Batches of all specialists.
    prior : (d, m)
        Start and anchor.
    metric : (d, d)
        Gram matrix of the layer's inputs, for the preconditioner.
    ridge
        λ relative to the mean eigenvalue of the preconditioner's curvature.
    iterations, tolerance
        Limit, and the relative reduction of the gradient at which to stop.
    """
    jacobian = _Jacobian(terms, prior)
    mismatch = jacobian.residual(prior)
    before, norm = jacobian.squared(mismatch), jacobian.target_norm
    gradient = jacobian.transpose(mismatch)
    curvature = jacobian.curvature_along(gradient, metric)
    mu = ridge * curvature * float(metric.diagonal().mean())
    factor = torch.linalg.cholesky(
        curvature * metric + max(mu, 1e-12 * curvature) * torch.eye(len(metric)).to(metric)
    )
    step = torch.zeros_like(prior)
    r = -gradient
    z = torch.cholesky_solve(r, factor)
    p, rz, start = z, float((r * z).sum()), float((r * z).sum())
    count = 0
    while count < iterations and rz > tolerance**2 * start and rz > 0:
        hp = jacobian.normal(p) + mu * p
        alpha = rz / float((p * hp).sum())
        step, r = step + alpha * p, r - alpha * hp
        z = torch.cholesky_solve(r, factor)
        rz, previous = float((r * z).sum()), rz
        p = z + (rz / previous) * p
        count += 1
    theta = prior + step
    after = jacobian.squared(jacobian.residual(theta))
    return MessageSolution(theta, before / norm, after / norm, count, mu)


class _Jacobian:
    """The weighted affine map of all terms, its linear part J, and Jᵀ."""

    def __init__(self, terms: Sequence[MessageTerm], prior: Tensor):
        self.terms = terms
        self.zero = torch.zeros_like(prior)
        self.offsets = [self._weighted(term, term.output(self.zero)) for term in terms]
        self.targets = [self._weighted(term, term.target) for term in terms]
        self.target_norm = max(self.squared(self.targets), torch.finfo(prior.dtype).tiny)

    @staticmethod
    def _weighted(term: MessageTerm, state: tuple[Tensor, ...]) -> Tensor:
        return torch.cat(
            [(part * scale**0.5).flatten() for part, scale in zip(state, term.scales, strict=True)]
        )

    @staticmethod
    def squared(vectors: Sequence[Tensor]) -> float:
        return sum(float(vector.double().square().sum()) for vector in vectors)

    def residual(self, theta: Tensor) -> list[Tensor]:
        return [self._weighted(t, t.output(theta)) - y for t, y in zip(self.terms, self.targets, strict=True)]

    def transpose(self, vectors: Sequence[Tensor]) -> Tensor:
        total = torch.zeros_like(self.zero)
        for term, vector in zip(self.terms, vectors, strict=True):
            theta = self.zero.detach().requires_grad_()
            with torch.enable_grad():
                output = self._weighted(term, term.output(theta))
            total += torch.autograd.grad(output, theta, vector)[0]
        return total

    def normal(self, direction: Tensor) -> Tensor:
        """Jᵀ J v, one forward and one reverse pass per term."""
        total = torch.zeros_like(self.zero)
        for term, offset in zip(self.terms, self.offsets, strict=True):
            theta = direction.detach().requires_grad_()
            with torch.enable_grad():
                output = self._weighted(term, term.output(theta))
            total += torch.autograd.grad(output, theta, (output - offset).detach())[0]
        return total

    def curvature_along(self, gradient: Tensor, metric: Tensor) -> float:
        """Factor β such that β·metric has the true curvature along the gradient."""
        true = float((gradient * self.normal(gradient)).sum())
        model = float((gradient * (metric @ gradient)).sum())
        return true / model if model > 0 and true > 0 else 1.0
