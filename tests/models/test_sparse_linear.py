"""The sparse affine map against its definition."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ase_gffmerge.models.layers.linear import SparseLinear


@given(d=st.integers(1, 9), groups=st.integers(1, 4), width=st.integers(1, 3), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_every_group_reads_its_own_inputs(d: int, groups: int, width: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    size = 1 + seed % d
    layer = SparseLinear(d, groups * width, groups=groups, inputs=size).double()
    with torch.no_grad():
        layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator))
        layer.bias.copy_(torch.randn(layer.bias.shape, generator=generator))
    dense = torch.zeros(groups * width, d, dtype=torch.float64)
    for g in range(groups):
        for w in range(width):
            dense[g * width + w, layer.inputs[g]] = layer.weight[g, w].detach()
    x = torch.randn(5, d, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(layer.linear(x), x @ dense.T)
    torch.testing.assert_close(layer(x), x @ dense.T + layer.bias)
    assert all(len(set(row.tolist())) == size for row in layer.inputs)


def test_inputs_are_the_same_in_every_process() -> None:
    torch.manual_seed(1)
    first = SparseLinear(20, 8, groups=2, inputs=3).inputs
    torch.manual_seed(2)
    assert torch.equal(first, SparseLinear(20, 8, groups=2, inputs=3).inputs)
