"""A linear layer on features that edges and angles collect from atoms and bonds."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ase_gffmerge.models.layers.gather import take_rows

Part = tuple[Tensor, Tensor | None]
"""Features (m, d) and the row that each of n rows takes; ``None`` when the features are those rows already."""


class JoinedLinear(nn.Linear):
    r"""Linear layer on joined features, :math:`y_n = W\,[x^1_{i_1(n)};\dots;x^K_{i_K(n)}] + b`.

    As the layer is linear, :math:`y_n = \sum_k (W_k x^k)_{i_k(n)} + b`: the products are taken before the rows are
    collected, of which there are many times more.
    """

    def forward(self, parts: Sequence[Part]) -> Tensor:  # type: ignore[override]
        """Map parts whose widths add up to ``in_features`` to (n, out_features)."""
        weights = self.weight.split([features.shape[-1] for features, _ in parts], dim=1)
        total: Tensor = self.bias
        for (features, rows), weight in zip(parts, weights, strict=True):
            product = features @ weight.T
            total = (product if rows is None else take_rows(product, rows)) + total
        return total

    def entering(self, parts: Sequence[Part]) -> Tensor:
        """Give the input (n, in_features) of the plain linear layer."""
        return torch.cat([x if rows is None else take_rows(x, rows) for x, rows in parts], dim=1)
