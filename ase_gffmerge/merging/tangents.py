r"""Tensors together with their directional derivatives with respect to the atomic positions.

Layers that agree with a specialist in value need not agree in their derivatives, which forces are. A dual number
(forward-mode differentiation) carries, beside each tensor x, its derivatives
:math:`\dot x_p = \partial x/\partial\mathbf r\cdot v_p` along P random displacements of the atoms. As a layer is affine,
:math:`y = x W + b` implies :math:`\dot y_p = \dot x_p W`: the derivatives are further rows of the same least-squares problem
(rows without the ones column), which therefore stays convex.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from torch.func import jvp, vmap

from ase_gffmerge.models.layers.linear import many_directions

Tensors = tuple[Tensor, ...]


@dataclass(frozen=True)
class Dual:
    """Values and derivatives.

    Attributes
    ----------
    value
        Tensors x of any shapes (...).
    tangent
        For each of them the derivatives (n_directions, ...); empty when there are no directions.
    """

    value: Tensors
    tangent: Tensors

    def __add__(self, other: "Dual") -> "Dual":
        """Concatenate two duals as tuples."""
        return Dual(self.value + other.value, self.tangent + other.tangent)

    def __getitem__(self, part: slice) -> "Dual":
        """Select some of the tensors."""
        return Dual(self.value[part], self.tangent[part])


def pushforward(function: Callable[..., Tensor | Tensors], inputs: Dual) -> Dual:
    """Evaluate ``function(*tensors)`` (a tensor or a tuple of tensors) and its derivatives along all directions."""
    outputs = [tensor.detach() for tensor in differentiable_pushforward(function, inputs)]
    n = len(outputs) // 2 if inputs.tangent else len(outputs)
    return Dual(tuple(outputs[:n]), tuple(outputs[n:]))


def differentiable_pushforward(function: Callable[..., Tensor | Tensors], inputs: Dual) -> Tensors:
    """Values and then derivatives as one tuple, differentiable with respect to what ``function`` closes over."""

    def as_tuple(*tensors: Tensor) -> Tensors:
        out = function(*tensors)
        return out if isinstance(out, tuple) else (out,)

    if not inputs.tangent:
        return as_tuple(*inputs.value)
    values_and_tangents = vmap(lambda *t: jvp(as_tuple, inputs.value, t), out_dims=(None, 0))  # type: ignore[arg-type]
    with many_directions():
        values, tangents = values_and_tangents(*inputs.tangent)  # type: ignore[misc]
    return values + tangents
