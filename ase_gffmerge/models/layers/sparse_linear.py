"""An affine map whose outputs read only some of the inputs."""

import torch
from torch import Tensor, nn


class SparseLinear(nn.Module):
    r"""Affine map :math:`y_{gw} = \sum_s W_{gws}\, x_{I_{gs}} + b_{gw}`: each of G groups of outputs reads S inputs.

    A dense map of the same width costs d/S times as much.

    Parameters
    ----------
    in_features, out_features
        Sizes d and G·W; the number of outputs must be divisible by that of groups.
    groups
        G.
    inputs
        S; which ones each group reads is drawn at random, the same whenever the sizes are.
    """

    inputs: Tensor

    def __init__(self, in_features: int, out_features: int, *, groups: int, inputs: int):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        generator = torch.Generator().manual_seed(0)
        chosen = [torch.randperm(in_features, generator=generator)[:inputs] for _ in range(groups)]
        self.register_buffer("inputs", torch.stack(chosen), persistent=False)
        self.weight = nn.Parameter(torch.zeros(groups, out_features // groups, inputs))
        self.bias = nn.Parameter(torch.zeros(out_features))

    def linear(self, x: Tensor) -> Tensor:
        """Map (n, d) to (n, G·W) without the offset b."""
        read = x.T.index_select(0, self.inputs.flatten()).unflatten(0, self.inputs.shape)
        return torch.bmm(self.weight, read).flatten(0, 1).T

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, d) to (n, G·W)."""
        return self.linear(x) + self.bias
