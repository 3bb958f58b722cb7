"""Collected rows, and their derivatives of every kind."""

from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import jvp, vmap

from ase_gffmerge.models.layers.linear import many_directions, take_rows


@given(st.integers(1, 5), st.integers(0, 9), st.integers(1, 3), st.integers(0, 100))
@settings(max_examples=20, deadline=None)
def test_rows_are_those_of_indexing(m, n, d, seed):
    with many_directions():
        compare_with_indexing(m, n, d, seed)
    compare_with_indexing(m, n, d, seed)


def compare_with_indexing(m, n, d, seed):
    generator = torch.Generator().manual_seed(seed)
    x, directions = (torch.randn(*shape, generator=generator) for shape in ((m, 3, d), (4, m, 3, d)))
    rows = torch.randint(0, m, (n,), generator=generator)
    assert torch.equal(take_rows(x, rows), x[rows])
    values, tangents = vmap(lambda t: jvp(lambda y: take_rows(y, rows), (x,), (t,)), out_dims=(None, 0))(
        directions
    )
    assert torch.equal(values, x[rows])
    assert torch.equal(tangents, directions[:, rows])
    assert torch.equal(vmap(lambda y: take_rows(y, rows), in_dims=1, out_dims=1)(x), x[rows])


@pytest.fixture(params=[False, True], ids=["single", "many directions"])
def either_way(request):
    with many_directions() if request.param else nullcontext():
        yield


def test_derivatives_are_right_twice(either_way):
    rows = torch.tensor([2, 0, 2, 1, 1])
    x = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    scale = torch.randn(5, 2, dtype=torch.float64)
    function = lambda y: take_rows(y, rows).pow(3) * scale  # noqa: E731
    assert torch.autograd.gradcheck(function, (x,), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, (x,), check_fwd_over_rev=True)


def test_probes_are_differentiable_by_what_is_collected(either_way):
    """Forward along directions, then backward: what the correction of a stage does."""
    rows = torch.tensor([1, 1, 0])
    x, directions, weight = torch.randn(2, 4), torch.randn(3, 2, 4), torch.randn(4, 4, requires_grad=True)

    def slopes(collect):
        function = lambda y: torch.tanh(collect(y @ weight)).square()  # noqa: E731
        return vmap(lambda t: jvp(function, (x,), (t,))[1])(directions)

    ours, plain = (
        torch.autograd.grad(slopes(collect).sum(), weight)[0]
        for collect in (lambda y: take_rows(y, rows), lambda y: y[rows])
    )
    torch.testing.assert_close(ours, plain)
