"""The Karcher mean by hand, by its definition, and as a method."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ase_gffmerge.methods.karcher import karcher_mean


def test_by_hand() -> None:
    a, b = torch.tensor([2.0, 0.0], dtype=torch.float64), torch.tensor([0.0, 4.0], dtype=torch.float64)
    center = karcher_mean(torch.stack([a, b]))
    torch.testing.assert_close(center, 3 * torch.tensor([1.0, 1.0], dtype=torch.float64) / math.sqrt(2))
    thrice = karcher_mean(torch.stack([a, a, b]))  # a third of the way along the arc
    angle = math.pi / 6
    expected = 8 / 3 * torch.tensor([math.cos(angle), math.sin(angle)], dtype=torch.float64)
    torch.testing.assert_close(thrice, expected)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 6), st.integers(2, 40), st.integers(0, 10_000))
def test_tangents_cancel_and_order_is_irrelevant(k: int, n: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(n, generator=generator, dtype=torch.float64)
    vectors = start + 0.3 * torch.randn(k, n, generator=generator, dtype=torch.float64)
    center = karcher_mean(vectors)
    torch.testing.assert_close(karcher_mean(vectors.flip(0)), center)
    mu, units = center / center.norm(), vectors / vectors.norm(dim=1, keepdim=True)
    cosines = units @ mu
    angles = torch.arccos(cosines)
    tangents = (units - cosines[:, None] * mu) * (angles / torch.sin(angles))[:, None]
    assert tangents.mean(0).norm() < 1e-7
    assert float(center.norm()) == pytest.approx(float(vectors.norm(dim=1).mean()))


def test_copies_zeros_and_opposites() -> None:
    vector = torch.randn(7, dtype=torch.float64)
    torch.testing.assert_close(karcher_mean(vector.expand(3, -1)), vector)
    assert karcher_mean(torch.zeros(2, 4)).tolist() == [0.0] * 4
    torch.testing.assert_close(karcher_mean(torch.stack([vector, 0 * vector])), vector / 2)
    torch.testing.assert_close(karcher_mean(torch.stack([vector, -vector])), 0 * vector)
