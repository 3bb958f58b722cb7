r"""SOAP: Adam in the eigenbasis of Shampoo's preconditioner (Vyas et al., arXiv 2409.11321).

For the gradient G (m, n) of a weight matrix, with moving averages L of :math:`GG^T` and R of :math:`G^TG` and their
eigenvectors Q_L, Q_R,

.. math::

   G' = Q_L^T G Q_R,\qquad M' = Q_L^T M Q_R,\qquad
   W \leftarrow W - \eta\, Q_L \frac{\hat M'}{\sqrt{\hat V'} + \epsilon} Q_R^T ,

where M is the moving average of G, kept as M', V' that of :math:`G'^2`, and a hat removes the bias of a young average. The
eigenvectors follow L and R by one step of orthogonal iteration every ``refresh`` steps.

========================  =======================================
equation                  key of ``state``
========================  =======================================
M', V'                    ``first``, ``second``
L, R                      ``left``, ``right``
Q_L, Q_R                  ``left_basis``, ``right_basis``
========================  =======================================

A side longer than ``LARGEST``, or of length 1, is not rotated; without any rotation this is Adam.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

LARGEST = 256
"""Longest side of a matrix that is rotated: an eigenbasis costs its third power."""

TILT = 0.01
"""Largest entry of the added diagonal, in units of the mean eigenvalue."""


class SOAP(torch.optim.Optimizer):
    """Adam in slowly following eigenbases; about one and a half times the cost of Adam for small matrices.

    Parameters
    ----------
    params
        Parameters or parameter groups.
    lr
        Learning rate; as for Adam.
    betas
        Decays of first and second moment.
    shampoo_beta
        Decay of L and R.
    eps
        Added to the root of the second moment.
    refresh
        Steps between updates of the eigenbases.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, object]],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.99),
        shampoo_beta: float = 0.95,
        eps: float = 1e-8,
        refresh: int = 10,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "shampoo_beta": shampoo_beta,
            "eps": eps,
            "refresh": refresh,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient; ``closure`` is not supported."""
        if closure is not None:
            raise NotImplementedError("SOAP takes gradients as they are; call step() without a closure")
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not parameters:
                continue
            gradients = [_as_matrix(parameter.grad) for parameter in parameters]
            states = [self.state[parameter] for parameter in parameters]
            for state, gradient in zip(states, gradients, strict=True):
                if not state:
                    state.update(_initial_state(gradient))
            directions = _directions(states, gradients, group)
            shaped = [d.view_as(p) for d, p in zip(directions, parameters, strict=True)]
            torch._foreach_add_(parameters, shaped, alpha=-group["lr"])


def _as_matrix(gradient: Tensor) -> Tensor:
    """Matrices as they are, vectors and scalars as one row, the trailing sides of larger tensors joined."""
    return gradient.reshape(len(gradient), -1) if gradient.ndim > 1 else gradient.reshape(1, -1)


def _initial_state(gradient: Tensor) -> dict[str, Tensor]:
    """State before the first step; the bases are those of the first gradient."""
    state = {
        "step": torch.zeros(()),
        "first": torch.zeros_like(gradient),
        "second": torch.zeros_like(gradient),
    }
    if len(gradient) == 1:
        return state
    for side, product in _outer_products(gradient).items():
        state[side] = product
        state[f"{side}_basis"] = _eigenvectors(product).flip(1).contiguous()
    return state


def _eigenvectors(product: Tensor) -> Tensor:
    """Of L or R, by ascending eigenvalues, in float64: products of gradients of dead units span more than float32 does.

    A small and uneven diagonal is added. A gradient of low rank leaves directions whose eigenvalues are all zero, and
    round-off, which differs between machines and numbers of processes, would choose a basis among them.
    """
    n, matrix = len(product), product.double()
    uneven = torch.linspace(TILT, 0.0, n, dtype=matrix.dtype, device=matrix.device) * matrix.trace() / n
    return torch.linalg.eigh(matrix + uneven.diag()).eigenvectors.to(product.dtype)


def _outer_products(gradient: Tensor) -> dict[str, Tensor]:
    """:math:`GG^T` as ``left`` and :math:`G^TG` as ``right``, of the sides that are rotated."""
    sides = {"left": gradient, "right": gradient.mT}
    return {side: g @ g.mT for side, g in sides.items() if 1 < len(g) <= LARGEST}


def _directions(
    states: Sequence[dict[str, Tensor]], gradients: Sequence[Tensor], options: Mapping[str, Any]
) -> Sequence[Tensor]:
    """Update all moments, in place, and return the directions to step against, shaped as the ``gradients``."""
    beta1, beta2 = options["betas"]
    firsts, seconds, steps = ([state[key] for state in states] for key in ("first", "second", "step"))
    torch._foreach_add_(steps, 1)
    counts = [int(step) for step in steps]
    rotated = [_rotate(gradient, state) for gradient, state in zip(gradients, states, strict=True)]
    torch._foreach_lerp_(firsts, rotated, 1 - beta1)
    torch._foreach_mul_(seconds, beta2)
    torch._foreach_addcmul_(seconds, rotated, rotated, 1 - beta2)
    scales = torch._foreach_div(seconds, [1 - beta2**n for n in counts])
    torch._foreach_sqrt_(scales)
    torch._foreach_add_(scales, options["eps"])
    scaled = torch._foreach_div(firsts, scales)
    directions = [_rotate_back(one, state) for one, state in zip(scaled, states, strict=True)]
    torch._foreach_div_(directions, [1 - beta1**n for n in counts])
    for state, gradient, n in zip(states, gradients, counts, strict=True):
        _update_bases(state, gradient, options["shampoo_beta"], refresh=n % options["refresh"] == 0)
    return directions


def _rotate(matrix: Tensor, state: dict[str, Tensor]) -> Tensor:
    """:math:`Q_L^T X Q_R`."""
    if "left" in state:
        matrix = state["left_basis"].mT @ matrix
    return matrix @ state["right_basis"] if "right" in state else matrix


def _rotate_back(matrix: Tensor, state: dict[str, Tensor]) -> Tensor:
    """:math:`Q_L X Q_R^T`."""
    if "left" in state:
        matrix = state["left_basis"] @ matrix
    return matrix @ state["right_basis"].mT if "right" in state else matrix


def _update_bases(state: dict[str, Tensor], gradient: Tensor, decay: float, *, refresh: bool) -> None:
    """Update L and R and, if asked for, their eigenbases by one step of orthogonal iteration."""
    products = _outer_products(gradient) if len(gradient) > 1 else {}
    for side, product in products.items():
        covariance, basis = state[side], state[f"{side}_basis"]
        covariance.lerp_(product, 1 - decay)
        if refresh:
            image = covariance @ basis
            order = (basis * image).sum(0).argsort(descending=True)
            state["second"] = state["second"].index_select(0 if side == "left" else 1, order)
            new = torch.linalg.qr(image[:, order]).Q.contiguous()
            turn = new.mT @ basis
            state["first"] = turn @ state["first"] if side == "left" else state["first"] @ turn.mT
            state[f"{side}_basis"] = new
