r"""How layers are linear in their parameters: each as one or more affine maps.

Every supported layer maps rows linearly, :math:`y = [x\ 1]\,\Theta`, once its input is cut into rows of the right kind. A
:class:`AffineMap` is one such map:

* ``nn.Linear`` (and torch_geometric's ``Linear``): rows are all leading dimensions, so the Cartesian components of a
  vector feature (n_atoms, 3, channels) are extra rows; a bias adds a column of ones.
* ``e3nn.o3.Linear``: one map per output irrep from all inputs of that irrep; the 2l+1 components are extra rows, and
  Θ includes e3nn's path weight, Θ = path_weight · W. Equivariance holds by construction. Invariant outputs may have a bias.
* the layers of ``e3nn.nn.FullyConnectedNet``: bias-free, Θ = factor · W; the target is the value before the activation.
* :class:`.ElementLinear`: one map per element and output irrep; the rows of atoms of other elements are zero.

Integrations add the layers of other packages with :func:`register_layer`.

Scale and shift of an ``nn.LayerNorm``, and the scale of an ``nn.RMSNorm``, are no such map of rows, but they are parameters
that a correction of a whole block may change: :func:`adjustable_maps` holds them as well, as Θ = [scale; shift] or [scale].
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from ase.data import chemical_symbols
from torch import Tensor, nn
from torch.nn.functional import layer_norm, rms_norm
from torch.nn.utils.parametrize import is_parametrized
from torch_geometric.nn import Linear as GeometricLinear

from ase_gffmerge.models.layers import EquivariantLinear, FullyConnectedNet
from ase_gffmerge.models.layers.linear import ElementLinear, JoinedLinear

_LINEAR = (nn.Linear.forward, GeometricLinear.forward, JoinedLinear.forward)

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
    offset
        Part (n_rows, d_out) of the output that does not depend on Θ, from the layer's input; default: none.
    per_channel
        Whether every output has a single input, its own: Θ (1 [+ 1], d) is a scale, and a shift, for each of the d channels.
    block
        Which of how many equal blocks of the layer's channels the outputs are: a head of an attention.
    """

    name: str
    module: nn.Module
    has_bias: bool
    rows: Callable[[Tensor], Tensor]
    read: Callable[[], Tensor]
    parameters: Callable[[Tensor], dict[str, Tensor]]
    offset: Callable[[Tensor], Tensor] | None = None
    per_channel: bool = False
    block: tuple[int, int] = (0, 1)

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


Maps = Callable[[str, Any], Iterator[AffineMap]]
"""``maps(name, layer)`` gives the affine maps of a layer of a certain class."""


@dataclass(frozen=True)
class LayerKind:
    """A kind of layers that are linear in their parameters.

    Attributes
    ----------
    matches
        Whether a module is such a layer.
    maps
        Its affine maps.
    entering
        The tensor that they map, from the layer and the arguments of its forward method.
    part
        Name of the part of a layer that is such a map, where the layer as a whole is none.
    nodes
        The node that each row belongs to, likewise, where the rows are neither one per node nor one per edge of the graph.
    """

    matches: Callable[[nn.Module], bool]
    maps: Maps
    entering: Callable[..., Tensor]
    part: str = ""
    nodes: Callable[..., Tensor] | None = None


_KINDS: list[LayerKind] = []
"""Kinds of layers; of several that match a module, the one that was registered last counts."""


def register_layer(
    matches: Callable[[nn.Module], bool],
    *,
    entering: Callable[..., Tensor] = lambda layer, x, *_: x,
    part: str = "",
    nodes: Callable[..., Tensor] | None = None,
) -> Callable[[Maps], Maps]:
    """Decorate a function that gives the affine maps of a kind of layers.

    Parameters
    ----------
    matches
        Whether a module is such a layer.
    entering
        The tensor that it maps, from the layer and the arguments of its forward method; default: the first argument.
    part, nodes
        See :class:`LayerKind`. Parts are used where modules of any kind are merged, in the order of their registration.
    """

    def enter(maps: Maps) -> Maps:
        _KINDS.insert(0, LayerKind(matches, maps, entering, part, nodes))
        return maps

    return enter


def _kind(module: nn.Module) -> LayerKind | None:
    return next((kind for kind in _KINDS if not kind.part and kind.matches(module)), None)


def layer_parts(module: nn.Module) -> list[LayerKind]:
    """The kinds of which a layer is one, as a whole or with its parts.

    Of a linear layer with a ``forward`` of its own, and of weights that are computed from others, nobody knows them.
    """
    parts = {kind.part: kind for kind in _KINDS[::-1] if kind.matches(module)}
    unknown = isinstance(module, nn.Linear | GeometricLinear) and type(module).forward not in _LINEAR
    if not parts or unknown or any(map(is_parametrized, module.modules())):
        return []
    return list(parts.values())


def is_affine(module: nn.Module) -> bool:
    """Whether a module is one or more :class:`AffineMap`."""
    return _kind(module) is not None


def rows_entering(module: nn.Module, inputs: tuple[object, ...]) -> Tensor:
    """The tensor that a layer maps, from the arguments of its forward method."""
    if kind := _kind(module):
        return kind.entering(module, *inputs)
    assert isinstance(inputs[0], Tensor)
    return inputs[0]


def layer_maps(name: str, module: nn.Module) -> list[AffineMap]:
    """The affine maps of one layer; none of a module that is no such layer."""
    kind = _kind(module)
    return list(kind.maps(name, module)) if kind else []


def affine_maps(root: nn.Module) -> dict[str, AffineMap]:
    """All affine maps inside a module, by name."""
    found = [layer_maps(name, module) for name, module in root.named_modules()]
    return {affine_map.name: affine_map for maps in found for affine_map in maps}


def is_adjustable(module: nn.Module) -> bool:
    """Whether a module has a map that :func:`adjustable_maps` lists."""
    return is_affine(module) or bool(_norm_maps("", module))


def adjustable_maps(root: nn.Module) -> dict[str, AffineMap]:
    """All affine maps inside a module, and scales and shifts of its norms."""
    own = [_norm_maps(name, module) for name, module in root.named_modules()]
    return affine_maps(root) | {one.name: one for maps in own for one in maps}


def flat_rows(x: Tensor) -> Tensor:
    """All leading dimensions as rows (n_rows, d)."""
    return x.reshape(-1, x.shape[-1])


def _is_linear(module: nn.Module) -> bool:
    """Whether it is a linear layer with a matrix; Orb keeps its table of energies as a vector in one."""
    return isinstance(module, nn.Linear | GeometricLinear) and module.weight.dim() == 2


@register_layer(lambda module: isinstance(module, JoinedLinear), entering=JoinedLinear.entering)
@register_layer(_is_linear)
def _linear_map(name: str, layer: nn.Linear) -> Iterator[AffineMap]:
    has_bias = layer.bias is not None

    def read() -> Tensor:
        weight = layer.weight.detach().T
        return torch.cat([weight, layer.bias.detach()[None]]) if has_bias else weight

    def parameters(theta: Tensor) -> dict[str, Tensor]:
        weight = {"weight": theta[: layer.weight.shape[1]].T}
        return weight | {"bias": theta[-1]} if has_bias else weight

    yield AffineMap(name, layer, has_bias, flat_rows, read, parameters)


def _norm_maps(name: str, norm: nn.Module) -> list[AffineMap]:
    """Scale (and shift) of every channel of a norm; the rows are what is scaled, one number each."""
    if isinstance(norm, nn.LayerNorm) and norm.bias is not None:
        shape, eps, scale, shift = norm.normalized_shape, norm.eps, norm.weight, norm.bias

        def read() -> Tensor:
            return torch.stack([scale.detach(), shift.detach()])

        return [
            AffineMap(
                name,
                norm,
                True,
                lambda x: layer_norm(x, shape, eps=eps).reshape(-1, 1),
                read,
                lambda theta: {"weight": theta[0], "bias": theta[1]},
            )
        ]
    if isinstance(norm, nn.RMSNorm) and norm.weight is not None:
        sizes, offset, factor = list(norm.normalized_shape), norm.eps, norm.weight
        return [
            AffineMap(
                name,
                norm,
                False,
                lambda x: rms_norm(x, sizes, eps=offset).reshape(-1, 1),
                lambda: factor.detach()[None],
                lambda theta: {"weight": theta[0]},
            )
        ]
    return []


def _is_radial_layer(module: nn.Module) -> bool:
    return type(module).__module__ == FullyConnectedNet.__module__ and type(module).__name__ == "_Layer"


@register_layer(_is_radial_layer)
def _radial_map(name: str, layer: nn.Module) -> Iterator[AffineMap]:
    width_in, var_in, var_out = float(layer.h_in), float(layer.var_in), float(layer.var_out)  # type: ignore[arg-type]
    scale = (width_in * var_in) ** -0.5 * (1.0 if layer.act is not None else var_out**0.5)
    weight = layer.get_parameter("weight")
    yield AffineMap(
        name,
        layer,
        False,
        flat_rows,
        lambda: weight.detach() * scale,
        lambda theta: {"weight": theta / scale},
    )


@register_layer(
    lambda module: isinstance(module, ElementLinear) and len(module.species) <= MAX_ELEMENTS,
    entering=ElementLinear.per_element,
)
def _element_maps(name: str, layer: ElementLinear) -> Iterator[AffineMap]:
    for row, number in enumerate(layer.species):
        for i_out, label in enumerate(_labels(layer.irreps_out)):
            if any(block.i_out == i_out for block in layer.blocks):
                yield _element_map(f"{name}[{chemical_symbols[number]}, {label}]", layer, row, i_out)


def _element_map(name: str, layer: ElementLinear, row: int, i_out: int) -> AffineMap:
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


@register_layer(lambda module: isinstance(module, EquivariantLinear))
def _equivariant_maps(name: str, layer: EquivariantLinear) -> Iterator[AffineMap]:
    """One map per output irrep; e3nn stores the weights of its instructions one after the other."""
    labels, start = _labels(layer.irreps_out), 0
    for i_out, (channels, irrep) in enumerate(layer.irreps_out):
        own = [(i, entry.i_in) for i, entry in enumerate(layer.instructions) if entry.i_out == i_out]
        paths = [i for i, i_in in own if i_in >= 0]
        bias = slice(start, start + channels) if len(paths) < len(own) else None
        start += channels if bias else 0
        if paths:
            yield _equivariant_map(f"{name}[{labels[i_out]}]", layer, paths, irrep.dim, bias=bias)


def _labels(irreps: Iterable[tuple[int, object]]) -> list[str]:
    """A name for each of (multiplicity, irrep), numbered where an irrep occurs more than once: ``0e #1, 1o, 0e #2``."""
    names = [str(irrep) for _, irrep in irreps]
    return [
        f"{name} #{names[: i + 1].count(name)}" if names.count(name) > 1 else name
        for i, name in enumerate(names)
    ]


def _equivariant_map(
    name: str, layer: EquivariantLinear, paths: list[int], dim: int, *, bias: slice | None
) -> AffineMap:
    """Map of the paths to one output irrep of ``dim`` components, whose offsets are a part of the layer's bias."""
    inputs = [layer.instructions[i].i_in for i in paths]
    slices = layer.irreps_in.slices()

    def rows(x: Tensor) -> Tensor:
        parts = [x[..., slices[i]].reshape(-1, layer.irreps_in[i].mul, dim) for i in inputs]
        return torch.cat(parts, dim=1).transpose(1, 2).flatten(0, 1)

    def read() -> Tensor:
        views = [
            layer.weight_view_for_instruction(i).detach() * layer.instructions[i].path_weight for i in paths
        ]
        return torch.cat([*views, layer.bias.detach()[None, bias]] if bias else views)

    def parameters(theta: Tensor) -> dict[str, Tensor]:
        pieces, start = [], 0
        for i, instruction in enumerate(layer.instructions):
            if instruction.i_in < 0:
                continue
            piece = layer.weight_view_for_instruction(i).detach()
            if i in paths:
                piece = theta[start : start + len(piece)] / instruction.path_weight
                start += len(piece)
            pieces.append(piece.flatten())
        weight = {"weight": torch.cat(pieces)}
        if bias is None:
            return weight
        offsets = layer.bias.detach().clone()
        offsets[bias] = theta[-1]
        return {**weight, "bias": offsets}

    return AffineMap(name, layer, bias is not None, rows, read, parameters)
