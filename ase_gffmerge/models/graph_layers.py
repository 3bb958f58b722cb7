r"""How the convolutions of torch_geometric are linear in their parameters.

A graph convolution that is linear in all of its weights is one affine map of its *output*, whose rows are what the
convolution makes of its input when its weights are the identity: :math:`\hat A X` for a GCN,
:math:`[\mathrm{mean}_j x_j,\ x_i]` for GraphSAGE, all powers or polynomials of the adjacency matrix for TAG and Chebyshev
convolutions, one mean per relation for an RGCN. An attention layer is no such map, but its parts are: its linear layers,
its attention vectors (one map per head), and the skip connection with the bias, to which everything else is an offset.
"""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch_geometric.nn import conv as graph_conv
from torch_geometric.nn.conv import MessagePassing

from ase_gffmerge.models.affine_maps import AffineMap, register_layer
from ase_gffmerge.models.torch_layers import (
    recorded,
    replaced_forward,
    same_forward,
    weights_and_bias,
    with_parameters,
)

Pair = Tensor | tuple[Tensor, Tensor | None]
"""Features of all nodes, or of senders and of receivers."""


# Convolutions that are one map of their output


def _propagated(layer: nn.Module, *args: object) -> Tensor:
    """What a GCN makes of its input without weight and bias."""
    weight = layer.get_parameter("lin.weight")
    with replaced_forward(layer.get_submodule("lin"), lambda x: x):
        return with_parameters(layer, {"bias": weight.new_zeros(weight.shape[1])}, args)


@register_layer(same_forward(graph_conv.GCNConv), entering=_propagated)
def _gcn_map(name: str, layer: nn.Module) -> Iterator[AffineMap]:
    yield weights_and_bias(name, layer, ["lin.weight"], "bias" if layer.bias is not None else None)


def _linears(layer: nn.Module) -> list[str]:
    """Inner linear layers whose outputs a convolution adds up."""
    names = [name for name in ("lin_l", "lin_r", "lin_rel", "lin_out", "lin_root") if hasattr(layer, name)]
    return names or [f"lins.{i}" for i in range(len(layer.lins))]  # type: ignore[arg-type]


def _terms(layer: nn.Module, *args: object) -> Tensor:
    """Inputs of the inner linear layers, side by side."""
    inputs = recorded(layer, _linears(layer), args)
    n = len(next(iter(inputs.values())))
    widths = {name: layer.get_parameter(f"{name}.weight").shape[1] for name in _linears(layer)}
    first = next(iter(inputs.values()))
    return torch.cat([inputs.get(name, first.new_zeros(n, width)) for name, width in widths.items()], dim=-1)


@register_layer(
    same_forward(
        graph_conv.SAGEConv,
        graph_conv.GraphConv,
        graph_conv.TAGConv,
        graph_conv.ChebConv,
        graph_conv.ClusterGCNConv,
    ),
    entering=_terms,
)
def _sum_map(name: str, layer: nn.Module) -> Iterator[AffineMap]:
    linears, own = _linears(layer), dict(layer.named_parameters())
    bias = next((key for key in ("bias", *(f"{lin}.bias" for lin in linears)) if key in own), None)
    yield weights_and_bias(name, layer, [f"{lin}.weight" for lin in linears], bias)


def _per_relation(layer: nn.Module, *args: object) -> Tensor:
    """Aggregates of every relation (or basis), and the node's own features, side by side."""
    blocks, d, _ = layer.get_parameter("weight").shape
    total = blocks * d + (len(layer.get_parameter("root")) if layer.root is not None else 0)
    eye = torch.eye(total).to(layer.get_parameter("weight"))
    values = {"weight": eye[: blocks * d].view(blocks, d, total), "bias": eye.new_zeros(total)}
    width, layer.out_channels = layer.out_channels, total  # type: ignore[assignment]
    try:
        return with_parameters(layer, values | {"root": eye[blocks * d :]}, args)
    finally:
        layer.out_channels = width


def _is_relational(module: nn.Module) -> bool:
    return same_forward(graph_conv.RGCNConv)(module) and getattr(module, "num_blocks", None) is None


@register_layer(_is_relational, entering=_per_relation)
def _relational_map(name: str, layer: nn.Module) -> Iterator[AffineMap]:
    weights = ["weight", "root"] if layer.root is not None else ["weight"]
    bias = "bias" if layer.bias is not None else None
    yield weights_and_bias(name, layer, weights, bias, transposed=False)


# Parts of attention layers, and of other convolutions


def _sent(layer: nn.Module, x: Pair, *_: object) -> Tensor:
    """Transformed features (n, heads, channels) of the senders of a GAT."""
    own = x if isinstance(x, Tensor) else x[0]
    return _heads(layer, (layer.lin if layer.lin is not None else layer.lin_src)(own))  # type: ignore[operator]


def _received(layer: nn.Module, x: Pair, *_: object) -> Tensor:
    own = x if isinstance(x, Tensor) else x[1]
    if own is None:  # receivers without features have no part in the attention
        return layer.get_parameter("att_dst").new_zeros(0, layer.heads, layer.out_channels)  # type: ignore[call-overload]
    return _heads(layer, (layer.lin if layer.lin is not None else layer.lin_dst)(own))  # type: ignore[operator]


def _along(layer: nn.Module, x: Pair, edge_index: Tensor, edge_attr: Tensor, *_: object) -> Tensor:
    columns = edge_attr.view(-1, 1) if edge_attr.dim() == 1 else edge_attr
    return _heads(layer, layer.lin_edge(columns))  # type: ignore[operator]


def _heads(layer: nn.Module, x: Tensor) -> Tensor:
    return x.view(len(x), layer.heads, layer.out_channels)  # type: ignore[call-overload]


def _attention_maps(name: str, layer: nn.Module, *, vector: str) -> Iterator[AffineMap]:
    """One map to a single number for every head."""
    for head in range(int(layer.heads)):  # type: ignore[arg-type]
        yield _attention_map(f"{name}.{vector}[{head}]", layer, vector, head)


def _attention_map(name: str, layer: nn.Module, vector: str, head: int) -> AffineMap:
    def parameters(theta: Tensor) -> dict[str, Tensor]:
        value = layer.get_parameter(vector).detach().clone()
        value[0, head] = theta[:, 0].to(value)
        return {vector: value}

    return AffineMap(
        name,
        layer,
        False,
        lambda x: x[:, head],
        lambda: layer.get_parameter(vector).detach()[0, head][:, None],
        parameters,
        block=(head, int(layer.heads)),  # type: ignore[arg-type]
    )


_is_gat = same_forward(graph_conv.GATConv)
for _vector, _features in (("att_src", _sent), ("att_dst", _received)):
    register_layer(_is_gat, entering=_features, part=_vector)(partial(_attention_maps, vector=_vector))
register_layer(lambda layer: _is_gat(layer) and layer.att_edge is not None, entering=_along, part="att_edge")(
    partial(_attention_maps, vector="att_edge")
)


def _edge_updates(layer: nn.Module, args: tuple[object, ...]) -> dict[str, Tensor]:
    """What a GATv2 computes its attention from, for every edge."""
    assert isinstance(layer, MessagePassing)
    caught: dict[str, Tensor] = {}
    handle = layer.register_edge_update_forward_pre_hook(lambda _, inputs: caught.update(inputs[-1]))
    try:
        layer(*args)
    finally:
        handle.remove()
    return caught


def _pairs_of_nodes(layer: nn.Module, *args: object) -> Tensor:
    """Features (n_edges, heads, channels) that the attention vector of a GATv2 maps."""
    edges = _edge_updates(layer, args)
    x = edges["x_i"] + edges["x_j"]
    if edges.get("edge_attr") is not None:
        x = x + _along(layer, x, x, edges["edge_attr"])
    return nn.functional.leaky_relu(x, float(layer.negative_slope))  # type: ignore[arg-type]


def _receivers(layer: nn.Module, *args: object) -> Tensor:
    return _edge_updates(layer, args)["index"]


register_layer(same_forward(graph_conv.GATv2Conv), entering=_pairs_of_nodes, part="att", nodes=_receivers)(
    partial(_attention_maps, vector="att")
)


# What a convolution adds to its output, solved after everything else

_SKIPS = {
    graph_conv.GATConv: "res",
    graph_conv.GATv2Conv: "res",
    graph_conv.TransformerConv: "lin_skip",
    graph_conv.NNConv: "lin",
}
"""Linear layers of a node's own features whose output a convolution adds to that of its neighbors."""


def _skip(layer: nn.Module) -> str | None:
    name = next((skip for cls, skip in _SKIPS.items() if isinstance(layer, cls)), None)
    if name is None or not isinstance(getattr(layer, name, None), nn.Module):
        return None
    if getattr(layer, "lin_beta", None) is not None or getattr(layer, "root_weight", True) is False:
        return None
    return name


def _added(layer: nn.Module) -> list[str]:
    """Parameters whose contribution a convolution adds to its output: the weight of a skip connection, and a bias."""
    own, skip = dict(layer.named_parameters()), _skip(layer)
    names = [f"{skip}.weight"] if skip else []
    return names + [key for key in ("bias", f"{skip}.bias") if key in own][:1]


def _adds_to_its_output(layer: nn.Module) -> bool:
    return same_forward(*_SKIPS, graph_conv.SuperGATConv)(layer) and bool(_added(layer))


def _skipped_and_rest(layer: nn.Module, *args: object) -> Tensor:
    """What enters the skip connection, and the output without it and without bias, side by side."""
    own = dict(layer.named_parameters())
    rest = with_parameters(layer, {name: torch.zeros_like(own[name]) for name in _added(layer)}, args)
    if not (skip := _skip(layer)):
        return rest
    return torch.cat([recorded(layer, [skip], args)[skip], rest], dim=-1)


@register_layer(_adds_to_its_output, entering=_skipped_and_rest, part="output")
def _output_map(name: str, layer: nn.Module) -> Iterator[AffineMap]:
    added = _added(layer)
    bias = added[-1] if added[-1].endswith("bias") else None
    weights = [key for key in added if key.endswith("weight")]
    width = layer.get_parameter(weights[0]).shape[1] if weights else 0
    base = weights_and_bias(name, layer, weights, bias)
    label = " + ".join(added)
    yield AffineMap(
        f"{name}.{label}",
        layer,
        base.has_bias,
        lambda x: x[:, :width],
        base.read if weights else lambda: layer.get_parameter("bias").detach()[None],
        base.parameters,
        offset=lambda x: x[:, width:],
    )
