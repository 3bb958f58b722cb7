r"""How layers of torch, beside plain linear ones, are linear in their parameters: attention, normalizations, embeddings.

The projections of a multi-head attention are one map each. Scales and shifts of normalizations are maps with a single input
per channel; in evaluation a batch normalization is nothing else. A table of embeddings is the map of one-hot rows. All of
them are *parts* of layers, which modules of any kind are merged by (:mod:`ase_gffmerge.merging.modules`).
"""

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from inspect import signature
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves, tree_map
from torch_geometric.nn import norm as graph_norm

from ase_gffmerge.models.affine_maps import AffineMap, flat_rows, register_layer

MAX_ROWS_OF_A_TABLE = 2048
"""Rows up to which a table of embeddings is solved; a larger one is averaged."""


def same_forward(*classes: type[nn.Module]) -> Callable[[nn.Module], bool]:
    """Whether a module evaluates as one of the classes does: a subclass with its own ``forward`` may be anything."""
    return lambda module: any(
        isinstance(module, cls) and type(module).forward is cls.forward for cls in classes
    )


@contextmanager
def replaced_forward(layer: nn.Module, forward: Callable[..., object]) -> Iterator[None]:
    """Let a function stand for a layer's ``forward``, whose signature it shows."""
    if isinstance(forward, FunctionType):
        forward.__signature__ = signature(layer.forward)  # type: ignore[attr-defined]
    own = {key: value for key, value in layer.__dict__.items() if key == "forward"}
    layer.__dict__["forward"] = forward
    try:
        yield
    finally:
        layer.__dict__.pop("forward", None)
        layer.__dict__.update(own)


@contextmanager
def intercepted(layer: nn.Module, seen: Callable[[tuple[object, ...]], object]) -> Iterator[None]:
    """Show ``seen`` the positional arguments of every evaluation of a layer, also of direct calls of ``forward``."""
    original = layer.forward
    parameters = signature(original)

    def forward(*args: object, **kwargs: object) -> object:
        bound = parameters.bind(*args, **kwargs)
        bound.apply_defaults()
        with replaced_forward(layer, original):  # so that ``seen`` may evaluate the layer itself
            seen(bound.args)
        return original(*args, **kwargs)

    with replaced_forward(layer, forward):
        yield


class KeptOutputs:
    """Outputs of layers that no longer change, so that evaluations of a module on the same input compute none of them twice.

    Outputs with gradients, or with anything but tensors in them, are computed every time.

    Parameters
    ----------
    most
        Bytes that are kept; what comes after them is computed every time.
    """

    def __init__(self, most: int = 0):
        self._left = most
        self._found: dict[tuple[int, ...], dict[Hashable, Any]] = {}
        self._settled: dict[nn.Module, list[str]] = {}

    def settle(self, root: nn.Module, names: Iterable[str]) -> None:
        """Keep what these layers of a module return from now on: neither they change any more, nor what enters them."""
        if self._left:
            self._settled.setdefault(root, []).extend(names)

    def forget(self, root: nn.Module) -> None:
        """Keep nothing of a module any more."""
        self._settled.pop(root, None)
        for key in [key for key in self._found if key[0] == id(root)]:
            self._left += sum(map(_size, self._found.pop(key).values()))

    @contextmanager
    def replayed(self, root: nn.Module, item: object, *, but: str | None = None) -> Iterator[None]:
        """Let settled layers answer with what they returned before.

        Parameters
        ----------
        root, item
            The module, and what it is evaluated on, which is alive for as long as this: objects themselves are compared.
        but
            A layer that is seen at work, and so are those inside and around it.
        """
        calls: Counter[str] = Counter()

        def answering(name: str, original: Callable[..., object]) -> Callable[..., object]:
            def forward(*args: object, **kwargs: object) -> object:
                calls[name] += 1
                return self.of(root, item, (name, calls[name]), lambda: original(*args, **kwargs))

            return forward

        with ExitStack() as stack:
            for name in self._settled.get(root, ()):
                if but is None or not (is_within(name, but) or is_within(but, name)):
                    layer = root.get_submodule(name)
                    stack.enter_context(replaced_forward(layer, answering(name, layer.forward)))
            yield

    def of(self, root: nn.Module, item: object, what: Hashable, compute: Callable[[], Any]) -> Any:
        """What was computed before, or is now, as a copy, which may be changed in place.

        Parameters
        ----------
        root, item, what
            Tell it from others.
        compute
            Gives tensors in tuples, lists and dictionaries.
        """
        found = self._found.get((id(root), id(item)), {})
        if what not in found:
            value = compute()
            leaves = [leaf for leaf in tree_leaves(value) if leaf is not None]
            if not all(isinstance(leaf, Tensor) and not leaf.requires_grad for leaf in leaves):
                return value
            if _size(value) > self._left:
                return value
            self._left -= _size(value)
            found[what] = value
            self._found[id(root), id(item)] = found
        return tree_map(lambda leaf: leaf if leaf is None else leaf.clone(), found[what])


def _size(value: object) -> int:
    """Bytes of tensors."""
    return sum(x.numel() * x.element_size() for x in tree_leaves(value) if isinstance(x, Tensor))


def is_within(name: str, ancestor: str) -> bool:
    """Whether a submodule is another one or lies inside it, as all do in the module itself, whose name is empty."""
    return not ancestor or name == ancestor or name.startswith(f"{ancestor}.")


def recorded(layer: nn.Module, names: Sequence[str], args: tuple[object, ...]) -> dict[str, Tensor]:
    """First arguments of inner layers while a layer is evaluated.

    Parameters
    ----------
    layer, args
        The layer and its arguments.
    names
        Of the inner layers.
    """
    found: dict[str, Tensor] = {}

    def note(name: str, inputs: tuple[object, ...]) -> None:
        assert isinstance(inputs[0], Tensor)
        found[name] = inputs[0]

    with ExitStack() as stack:
        for name in names:
            stack.enter_context(intercepted(layer.get_submodule(name), partial(note, name)))
        layer(*args)
    return found


def with_parameters(layer: nn.Module, values: dict[str, Tensor], args: tuple[object, ...]) -> Tensor:
    """Output of a layer for other values of some parameters.

    Parameters
    ----------
    layer, args
        The layer and its arguments.
    values
        By name; those of parameters that it does not have are left out.
    """
    present = dict(layer.named_parameters())
    output: Tensor = functional_call(layer, {k: v for k, v in values.items() if k in present}, args)
    return output


def weights_and_bias(
    name: str, layer: nn.Module, weights: Sequence[str], bias: str | None, *, transposed: bool = True
) -> AffineMap:
    """One map Θ = [W_1; W_2; ...; b] of several weights and a bias.

    Parameters
    ----------
    name, layer
        Of the map, and the layer.
    weights, bias
        Names of its parameters.
    transposed
        Whether weights are stored as (d_out, d_in), and not as (..., d_in, d_out).
    """

    def matrix(weight: Tensor) -> Tensor:
        return weight.T if transposed else flat_rows(weight)

    tensors = [layer.get_parameter(weight) for weight in weights]
    sizes = [len(matrix(tensor)) for tensor in tensors]

    def read() -> Tensor:
        rows = [matrix(layer.get_parameter(weight).detach()) for weight in weights]
        return torch.cat([*rows, layer.get_parameter(bias).detach()[None]] if bias else rows)

    def parameters(theta: Tensor) -> dict[str, Tensor]:
        pieces = theta[: sum(sizes)].split(sizes)
        found = {
            weight: piece.T if transposed else piece.reshape(tensor.shape)
            for weight, piece, tensor in zip(weights, pieces, tensors, strict=True)
        }
        return found | {bias: theta[-1]} if bias else found

    return AffineMap(name, layer, bias is not None, flat_rows, read, parameters)


# Attention of torch


def _is_attention(module: nn.Module) -> bool:
    return same_forward(nn.MultiheadAttention)(module) and module.in_proj_weight is not None


def _projection(name: str, layer: nn.Module, *, index: int) -> Iterator[AffineMap]:
    """Queries, keys or values: one third of the rows of one matrix."""
    width = int(layer.embed_dim)  # type: ignore[arg-type]
    rows, biased = slice(index * width, (index + 1) * width), layer.in_proj_bias is not None

    def read() -> Tensor:
        weight = layer.get_parameter("in_proj_weight").detach()[rows].T
        return (
            torch.cat([weight, layer.get_parameter("in_proj_bias").detach()[rows][None]])
            if biased
            else weight
        )

    def parameters(theta: Tensor) -> dict[str, Tensor]:
        found = {"in_proj_weight": layer.get_parameter("in_proj_weight").detach().clone()}
        found["in_proj_weight"][rows] = theta[:width].T.to(found["in_proj_weight"])
        if biased:
            found["in_proj_bias"] = layer.get_parameter("in_proj_bias").detach().clone()
            found["in_proj_bias"][rows] = theta[-1].to(found["in_proj_bias"])
        return found

    yield AffineMap(f"{name}.{('query', 'key', 'value')[index]}", layer, biased, flat_rows, read, parameters)


for _index, _part in enumerate(("query", "key", "value")):
    register_layer(_is_attention, entering=lambda layer, *args, i=_index: args[i], part=_part)(
        partial(_projection, index=_index)
    )


def _attended(layer: nn.Module, *args: object) -> Tensor:
    """Output with the identity as its last map."""
    weight = layer.get_parameter("out_proj.weight")
    eye = torch.eye(len(weight)).to(weight)
    values = {"out_proj.weight": eye, "out_proj.bias": torch.zeros_like(weight[0])}
    present = dict(layer.named_parameters())
    output = functional_call(layer, {k: v for k, v in values.items() if k in present}, args)
    result: Tensor = output[0]
    return result


@register_layer(_is_attention, entering=_attended, part="out_proj")
def _attention_output(name: str, layer: nn.Module) -> Iterator[AffineMap]:
    bias = "out_proj.bias" if layer.get_submodule("out_proj").bias is not None else None
    yield weights_and_bias(f"{name}.out_proj", layer, ["out_proj.weight"], bias)


# Normalizations and embeddings

_NORMS = (
    *(
        nn.BatchNorm1d,
        nn.BatchNorm2d,
        nn.BatchNorm3d,
        nn.SyncBatchNorm,
        nn.LayerNorm,
        nn.RMSNorm,
        nn.GroupNorm,
        nn.InstanceNorm1d,
    ),
    *(graph_norm.LayerNorm, graph_norm.GraphNorm, graph_norm.InstanceNorm),
)


def channels_last(layer: nn.Module, x: Tensor) -> Tensor:
    """Rows (n, channels) of what a normalization takes or gives."""
    second = isinstance(layer, nn.modules.batchnorm._NormBase | nn.GroupNorm)
    return flat_rows(x.movedim(1, -1) if second and x.dim() > 2 else x)


def _has_scales(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return same_forward(*_NORMS)(module) and isinstance(weight, Tensor) and weight.dim() == 1


def _normalized(layer: nn.Module, *args: object) -> Tensor:
    """Output of a normalization without scale and shift."""
    own = dict(layer.named_parameters())
    plain = {"weight": torch.ones_like(own["weight"])}
    if "bias" in own:
        plain["bias"] = torch.zeros_like(own["bias"])
    return channels_last(layer, with_parameters(layer, plain, args))


@register_layer(_has_scales, entering=_normalized, part="scale")
def _scale_map(name: str, layer: nn.Module) -> Iterator[AffineMap]:
    has_bias = getattr(layer, "bias", None) is not None
    keys = ("weight", "bias") if has_bias else ("weight",)
    yield AffineMap(
        name,
        layer,
        has_bias,
        flat_rows,
        lambda: torch.stack([layer.get_parameter(key).detach() for key in keys]),
        lambda theta: dict(zip(keys, theta, strict=True)),
        per_channel=True,
    )


def _is_table(module: nn.Module) -> bool:
    return (
        same_forward(nn.Embedding)(module) and module.get_parameter("weight").shape[0] <= MAX_ROWS_OF_A_TABLE
    )


def _one_hot(layer: nn.Module, x: Tensor, *_: object) -> Tensor:
    weight = layer.get_parameter("weight")
    return nn.functional.one_hot(x.reshape(-1).long(), len(weight)).to(weight.dtype)


@register_layer(_is_table, entering=_one_hot, part="table")
def _table_map(name: str, layer: nn.Module) -> Iterator[AffineMap]:
    yield weights_and_bias(name, layer, ["weight"], None, transposed=False)
