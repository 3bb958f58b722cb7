import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ase_gffmerge.least_squares import gram
from ase_gffmerge.least_squares.gram import Gram, normalized_sum, symmetric_product
from ase_gffmerge.least_squares.ridge import ridge_solve

sizes = st.tuples(
    st.integers(1, 40), st.integers(1, 40), st.integers(1, 6), st.integers(1, 4), st.integers(0, 2**31)
)


def rows(n: int, d: int, m: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(n, d, generator=generator, dtype=torch.float64),
        torch.randn(n, m, generator=generator, dtype=torch.float64),
    )


@given(sizes)
@settings(max_examples=60, deadline=None)
def test_gram_of_parts_adds_up_to_gram_of_the_whole(size: tuple[int, int, int, int, int]) -> None:
    n1, n2, d, m, seed = size
    x, y = rows(n1 + n2, d, m, seed)
    whole, parts = Gram.of(x, y), Gram.of(x[:n1], y[:n1]) + Gram.of(x[n1:], y[n1:])
    torch.testing.assert_close(parts.xx, whole.xx, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(parts.xy, whole.xy, rtol=1e-12, atol=1e-12)
    assert parts.yy == pytest.approx(whole.yy, rel=1e-12)
    assert parts.n_rows == whole.n_rows == n1 + n2


@given(sizes)
@settings(max_examples=60, deadline=None)
def test_residual_equals_that_of_the_rows(size: tuple[int, int, int, int, int]) -> None:
    n, _, d, m, seed = size
    x, y = rows(n, d, m, seed)
    theta = torch.randn(d, m, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    expected = float((x @ theta - y).square().sum() / y.square().sum())
    assert Gram.of(x, y).residual(theta) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@given(sizes, st.floats(1e-6, 10.0), st.booleans())
@settings(max_examples=60, deadline=None)
def test_ridge_equals_numpy_lstsq_on_stacked_rows(
    size: tuple[int, int, int, int, int], ridge: float, relative: bool
) -> None:
    n, _, d, m, seed = size
    x, y = rows(n, d, m, seed)
    prior = torch.ones(d, m, dtype=torch.float64)
    solution = ridge_solve(Gram.of(x, y), prior, ridge=ridge, relative=relative)
    mu = ridge * float(x.square().sum()) / d if relative else ridge
    stacked = np.vstack([x.numpy(), np.sqrt(mu) * np.eye(d)])
    targets = np.vstack([y.numpy(), np.sqrt(mu) * prior.numpy()])
    expected = np.linalg.lstsq(stacked, targets, rcond=None)[0]
    np.testing.assert_allclose(solution.theta.numpy(), expected, rtol=1e-6, atol=1e-8)
    assert solution.ridge == pytest.approx(mu)
    singular = np.linalg.svd(x.numpy(), compute_uv=False) ** 2
    assert solution.effective_rank == pytest.approx(
        float((singular / (singular + mu)).sum()), rel=1e-6, abs=1e-6
    )


def test_ridge_to_infinity_returns_the_prior() -> None:
    x, y = rows(30, 4, 2, 0)
    prior = torch.full((4, 2), 3.0, dtype=torch.float64)
    solution = ridge_solve(Gram.of(x, y), prior, ridge=1e14)
    torch.testing.assert_close(solution.theta, prior, rtol=1e-10, atol=1e-10)
    assert solution.effective_rank < 1e-10


def test_rank_deficient_rows_without_ridge_stay_finite_and_exact() -> None:
    x, y = rows(30, 3, 1, 1)
    x = torch.cat([x, x[:, :1]], dim=1)
    y = x @ torch.tensor([[1.0], [2.0], [3.0], [0.0]], dtype=torch.float64)
    solution = ridge_solve(Gram.of(x, y), torch.zeros(4, 1, dtype=torch.float64), ridge=0.0)
    assert solution.residual_after < 1e-10
    assert torch.isfinite(solution.theta).all()


def test_normalisation_makes_unequal_row_counts_count_the_same() -> None:
    x, y = rows(20, 3, 2, 2)
    few, many = Gram.of(x, y), Gram.of(x.repeat(10, 1), y.repeat(10, 1))
    once, tenfold = normalized_sum([few, few], [1.0, 1.0]), normalized_sum([few, many], [1.0, 1.0])
    torch.testing.assert_close(once.xx, tenfold.xx)
    torch.testing.assert_close(once.xy, tenfold.xy)


@pytest.mark.parametrize("d", [1, 5, 8, 13])
def test_symmetric_product_is_the_product(d: int) -> None:
    x = torch.randn(20, d, dtype=torch.float64)
    torch.testing.assert_close(symmetric_product(x, block=4), x.T @ x, rtol=1e-12, atol=1e-12)


def test_rows_are_added_in_place() -> None:
    x, y = torch.randn(20, 13, dtype=torch.float64), torch.randn(20, 2, dtype=torch.float64)
    total = Gram.zero(13, 2)
    memory = total.xx.data_ptr()
    for rows in (slice(0, 7), slice(7, 20)):
        total = total.add_rows(x[rows], y[rows])
    expected = Gram.of(x, y)
    assert total.xx.data_ptr() == memory
    torch.testing.assert_close(total.xx, expected.xx)
    torch.testing.assert_close(total.xy, expected.xy)
    assert (total.yy, total.n_rows) == (pytest.approx(expected.yy), 20)


def test_effective_rank_of_large_problems_is_estimated(monkeypatch) -> None:
    generator = torch.Generator().manual_seed(0)
    scales = torch.logspace(0, -4, 300, dtype=torch.float64)
    rows = torch.randn(400, 300, generator=generator, dtype=torch.float64) * scales
    gram = Gram.of(rows, torch.randn(400, 1, generator=generator, dtype=torch.float64))
    exact = ridge_solve(gram, torch.zeros(300, 1), ridge=1e-4).effective_rank
    monkeypatch.setattr("ase_gffmerge.least_squares.ridge.EXACT_TRACE", 10)
    assert ridge_solve(gram, torch.zeros(300, 1), ridge=1e-4).effective_rank == pytest.approx(exact, rel=0.05)


def test_round_off_of_what_vanishes_by_symmetry_does_not_count() -> None:
    """Neither as values beside derivatives, nor the other way round, nor as one specialist beside another."""
    x, y = rows(50, 4, 2, 1)
    noise = Gram.of(*(1e-7 * part for part in rows(80, 4, 2, 2)))
    real, prior = Gram.of(x, y), torch.zeros(4, 2, dtype=torch.float64)
    alone = ridge_solve(real, prior, ridge=1e-6).theta
    for together in (
        noise.balanced(real, 1.0),
        real.balanced(noise, 1.0),
        normalized_sum([real, noise], [1.0, 1.0]),
        normalized_sum([noise, real], [1.0, 1.0]),
    ):
        torch.testing.assert_close(
            ridge_solve(together, prior, ridge=1e-6).theta, alone, atol=1e-6, rtol=1e-6
        )
    size = noise.balanced(real, 1.0).mean_square_target / real.mean_square_target
    assert size == pytest.approx(1.0), "derivatives alone weigh what they are"


def test_small_targets_count_like_large_ones() -> None:
    x, y = rows(50, 4, 2, 1)
    small = Gram.of(1e-3 * x, 1e-3 * y)
    first, second = (
        normalized_sum([Gram.of(x, y), small], [1.0, 1.0]),
        normalized_sum([small, small], [1.0, 1.0]),
    )
    torch.testing.assert_close(first.xx, second.xx)


def test_products_of_the_matrices_seen_last_are_not_computed_again(monkeypatch):
    products, calls = gram.SymmetricProducts(most=2, max_entries=20), []
    original = gram.symmetric_product
    monkeypatch.setattr(gram, "symmetric_product", lambda x: calls.append(len(x)) or original(x))
    rows = [torch.randn(n, 3, dtype=torch.float64) for n in (2, 3, 4, 7)]
    for i in (
        0,
        1,
        0,
        2,
        0,
        3,
        3,
    ):  # the fifth has forgotten the first, the last two are too large to be kept
        torch.testing.assert_close(products(rows[i].clone()), rows[i].T @ rows[i])
    assert calls == [2, 3, 4, 2, 7, 7]
