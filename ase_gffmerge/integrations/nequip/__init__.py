"""NequIP (Batzner et al., arXiv 2101.03164) of the package ``nequip``; here its scalar layers as affine maps."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ase_gffmerge.models.affine_maps import AffineMap, flat_rows, register_layer


def _is_scalar_layer(module: nn.Module) -> bool:
    """Whether it is a ``ScalarLinearLayer``, whichever copy of the package it comes from."""
    return type(module).__name__ == "ScalarLinearLayer" and not hasattr(module, "parametrizations")


@register_layer(_is_scalar_layer)
def scalar_layer_map(name: str, layer: nn.Module) -> Iterator[AffineMap]:
    """Θ = [factor · W; b]; the target is the value before the activation."""
    weight, scale = layer.get_parameter("weight"), layer.get_buffer("alpha")
    bias = dict(layer.named_parameters()).get("bias")

    def read() -> Tensor:
        theta = weight.detach() * scale
        return theta if bias is None else torch.cat([theta, bias.detach()[None]])

    def parameters(theta: Tensor) -> dict[str, Tensor]:
        own = {"weight": theta[: len(weight)] / scale}
        return own if bias is None else own | {"bias": theta[-1]}

    yield AffineMap(name, layer, bias is not None, flat_rows, read, parameters)
