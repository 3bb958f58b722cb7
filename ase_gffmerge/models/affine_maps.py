r"""Affine layers as least-squares problems.

Every supported layer maps rows linearly, :math:`y = [x\ 1]\,\Theta`, once its input is cut into rows of the right
kind. A :class:`AffineMap` is one such map:

* ``nn.Linear`` (and torch_geometric's ``Linear``): rows are all leading dimensions, so the Cartesian components of a
  vector feature (n_atoms, 3, channels) are extra rows; a bias adds a column of ones.
* ``e3nn.o3.Linear``: one problem per output irrep over all inputs of that irrep; the 2l+1 components are extra rows, and
  Θ includes e3nn's path weight, Θ = path_weight · W. Equivariance holds by construction.
* the layers of ``e3nn.nn.FullyConnectedNet``: bias-free, Θ = factor · W; the target is the value before the activation.
* the layers of the package ``nequip``'s scalar networks: likewise, Θ = [factor · W; b].
* :class:`.ElementLinear`: one problem per element and output irrep; the rows of atoms of other elements are zero.

Scale and shift of an ``nn.LayerNorm`` are no such map of rows, but they are parameters that a correction of a whole stage
may change: :func:`adjustable_maps` holds them as well, as Θ = [scale; shift].
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from ase.data import chemical_symbols
from torch import Tensor, nn
from torch.nn.functional import layer_norm
from torch_geometric.nn import Linear as GeometricLinear

from ase_gffmerge.models.layers.e3nn_compat import EquivariantLinear, FullyConnectedNet
from ase_gffmerge.models.layers.element_linear import ElementLinear
from ase_gffmerge.models.layers.gather_linear import JoinedLinear

MAX_ELEMENTS = 16
"""Elements up to which an :class:`.ElementLinear` is solved: its rows are repeated for each of them."""


@dataclass(frozen=True)
class AffineMap:
    """One affine map Θ (d_in [+ 1], d_out) inside a layer.

    Attributes
    ----------
    name
        Unique within the potential.
    module
        The layer.
    has_bias
        Whether the last row of Θ is a bias.
    rows
        Cuts the layer's input into rows (n_rows, d_in), without the column of ones.
    read
        Get Θ.
    parameters
        The layer's parameters by name, as differentiable functions of Θ.
    """

    name: str
    module: nn.Module
    has_bias: bool
    rows: Callable[[Tensor], Tensor]
    read: Callable[[], Tensor]
    parameters: Callable[[Tensor], dict[str, Tensor]]

    def design(self, inputs: Tensor) -> Tensor:
        """Rows [x 1] (n_rows, d_in [+ 1]) for a layer input."""
        rows = self.rows(inputs)
        return with_ones(rows) if self.has_bias else rows

    @torch.no_grad()
    def write(self, theta: Tensor) -> None:
        """Set Θ in place."""
        for name, value in self.parameters(theta).items():
            self.module.get_parameter(name).copy_(value)


def with_ones(rows: Tensor) -> Tensor:
    """Append a column of ones."""
    return torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)


def is_affine(module: nn.Module) -> bool:
    """Whether the merge can treat a module as one or more :class:`AffineMap`."""
    if isinstance(module, ElementLinear):
        return len(module.species) <= MAX_ELEMENTS
    if isinstance(module, nn.Linear) and module.weight.dim() != 2:
        return False  # a vector, such as Orb's table of energies
    plain = isinstance(module, nn.Linear | GeometricLinear | EquivariantLinear)
    return plain or _is_radial_layer(module) or _is_scaled_linear(module)


def rows_entering(module: nn.Module, inputs: tuple[Any, ...]) -> Tensor:
    """The tensor that an affine layer maps, from the arguments of its forward method."""
    if isinstance(module, ElementLinear):
        return module.per_element(*inputs)
    return module.joined(*inputs) if isinstance(module, JoinedLinear) else inputs[0]


def problems(name: str, module: nn.Module) -> Iterator[AffineMap]:
    """The affine maps of one layer."""
    if isinstance(module, EquivariantLinear):
        yield from _equivariant_problems(name, module)
    elif _is_radial_layer(module):
        yield _radial_problem(name, module)
    elif _is_scaled_linear(module):
        yield _scaled_problem(name, module)
    elif isinstance(module, ElementLinear):
        yield from _element_problems(name, module)
    else:
        yield _linear_problem(name, module)  # type: ignore[arg-type]


def affine_maps(root: nn.Module) -> dict[str, AffineMap]:
    """All affine maps inside a module, by name."""
    layers = [(name, module) for name, module in root.named_modules() if is_affine(module)]
    return {problem.name: problem for name, module in layers for problem in problems(name, module)}


def is_adjustable(module: nn.Module) -> bool:
    """Whether a module has a map that :func:`adjustable_maps` lists."""
    return is_affine(module) or (isinstance(module, nn.LayerNorm) and module.bias is not None)


def adjustable_maps(root: nn.Module) -> dict[str, AffineMap]:
    """All affine maps inside a module, and scales and shifts of its layer norms."""
    norms = [(name, module) for name, module in root.named_modules() if isinstance(module, nn.LayerNorm)]
    own = {name: _norm_problem(name, norm) for name, norm in norms if is_adjustable(norm)}
    return affine_maps(root) | own


def _flat_rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _linear_problem(name: str, layer: nn.Linear) -> AffineMap:
    has_bias = layer.bias is not None

    def read() -> Tensor:
        weight = layer.weight.detach().T
        return torch.cat([weight, layer.bias.detach()[None]]) if has_bias else weight

    def parameters(theta: Tensor) -> dict[str, Tensor]:
        weight = {"weight": theta[: layer.weight.shape[1]].T}
        return weight | {"bias": theta[-1]} if has_bias else weight

    return AffineMap(name, layer, has_bias, _flat_rows, read, parameters)


def _norm_problem(name: str, norm: nn.LayerNorm) -> AffineMap:
    """Scale and shift of every channel; the rows are what is scaled, one number each."""

    def rows(x: Tensor) -> Tensor:
        return layer_norm(x, norm.normalized_shape, eps=norm.eps).reshape(-1, 1)

    def read() -> Tensor:
        return torch.stack([norm.weight.detach(), norm.bias.detach()])

    return AffineMap(name, norm, True, rows, read, lambda theta: {"weight": theta[0], "bias": theta[1]})


def _is_radial_layer(module: nn.Module) -> bool:
    return type(module).__module__ == FullyConnectedNet.__module__ and type(module).__name__ == "_Layer"


def _radial_problem(name: str, layer: nn.Module) -> AffineMap:
    width_in, var_in, var_out = float(layer.h_in), float(layer.var_in), float(layer.var_out)  # type: ignore[arg-type]
    scale = (width_in * var_in) ** -0.5 * (1.0 if layer.act is not None else var_out**0.5)
    weight = layer.get_parameter("weight")
    return AffineMap(
        name,
        layer,
        False,
        _flat_rows,
        lambda: weight.detach() * scale,
        lambda theta: {"weight": theta / scale},
    )


def _is_scaled_linear(module: nn.Module) -> bool:
    """Whether it is nequip's ``ScalarLinearLayer``, whichever copy of the package it comes from."""
    return type(module).__name__ == "ScalarLinearLayer" and not hasattr(module, "parametrizations")


def _scaled_problem(name: str, layer: nn.Module) -> AffineMap:
    weight, scale = layer.get_parameter("weight"), layer.get_buffer("alpha")
    bias = dict(layer.named_parameters()).get("bias")

    def read() -> Tensor:
        theta = weight.detach() * scale
        return theta if bias is None else torch.cat([theta, bias.detach()[None]])

    def parameters(theta: Tensor) -> dict[str, Tensor]:
        own = {"weight": theta[: len(weight)] / scale}
        return own if bias is None else own | {"bias": theta[-1]}

    return AffineMap(name, layer, bias is not None, _flat_rows, read, parameters)


def _element_problems(name: str, layer: ElementLinear) -> Iterator[AffineMap]:
    for row, number in enumerate(layer.species):
        for i_out, (_, irrep) in enumerate(layer.irreps_out):
            if any(block.i_out == i_out for block in layer.blocks):
                yield _element_problem(f"{name}[{chemical_symbols[number]}, {irrep}]", layer, row, i_out)


def _element_problem(name: str, layer: ElementLinear, row: int, i_out: int) -> AffineMap:
    blocks = [block for block in layer.blocks if block.i_out == i_out]
    dim = layer.irreps_out[i_out].ir.dim

    def rows(x: Tensor) -> Tensor:
        own = x[..., row, :]
        parts = [own[..., block.source].reshape(-1, block.shape[0], dim) for block in blocks]
        return torch.cat(parts, dim=1).transpose(1, 2).flatten(0, 1)

    def read() -> Tensor:
        weight = layer.weight.detach()[row]
        return torch.cat([weight[block.coefficients].view(block.shape) for block in blocks])

    def parameters(theta: Tensor) -> dict[str, Tensor]:
        weight = layer.weight.detach().clone()
        for block, piece in zip(blocks, theta.split([block.shape[0] for block in blocks]), strict=True):
            weight[row, block.coefficients] = piece.flatten()
        return {"weight": weight}

    return AffineMap(name, layer, False, rows, read, parameters)


def _equivariant_problems(name: str, layer: EquivariantLinear) -> Iterator[AffineMap]:
    """One problem per output irrep; e3nn stores the weights of its instructions one after the other."""
    if any(instruction.i_in < 0 for instruction in layer.instructions):
        raise NotImplementedError(
            f"{name}: an o3.Linear with biases cannot be aligned; build it with biases=False"
        )
    for i_out, (_, irrep) in enumerate(layer.irreps_out):
        paths = [i for i, instruction in enumerate(layer.instructions) if instruction.i_out == i_out]
        if paths:
            yield _equivariant_problem(f"{name}[{irrep}]", layer, paths, irrep.dim)


def _equivariant_problem(name: str, layer: EquivariantLinear, paths: list[int], dim: int) -> AffineMap:
    inputs = [layer.instructions[i].i_in for i in paths]
    slices = layer.irreps_in.slices()

    def rows(x: Tensor) -> Tensor:
        parts = [x[..., slices[i]].reshape(-1, layer.irreps_in[i].mul, dim) for i in inputs]
        return torch.cat(parts, dim=1).transpose(1, 2).flatten(0, 1)

    def read() -> Tensor:
        views = [
            layer.weight_view_for_instruction(i).detach() * layer.instructions[i].path_weight for i in paths
        ]
        return torch.cat(views)

    def parameters(theta: Tensor) -> dict[str, Tensor]:
        pieces, start = [], 0
        for i, instruction in enumerate(layer.instructions):
            piece = layer.weight_view_for_instruction(i).detach()
            if i in paths:
                piece = theta[start : start + len(piece)] / instruction.path_weight
                start += len(piece)
            pieces.append(piece.flatten())
        return {"weight": torch.cat(pieces)}

    return AffineMap(name, layer, False, rows, read, parameters)
