import numpy as np
import torch

from ase_gffmerge.merging.messages import MessageTerm, solve_messages


def test_matches_dense_least_squares_of_the_weighted_rows() -> None:
    """Two terms with two state parts each; the oracle builds the Jacobian column by column and calls lstsq."""
    generator = torch.Generator().manual_seed(0)
    d, m = 4, 3
    maps = [torch.randn(11, d * m, generator=generator, dtype=torch.float64) for _ in range(4)]
    offsets = [torch.randn(11, generator=generator, dtype=torch.float64) for _ in range(4)]
    targets = [torch.randn(11, generator=generator, dtype=torch.float64) for _ in range(4)]
    scales = [(1.0, 0.3), (2.0, 0.5)]

    def output(k: int):
        return lambda theta: tuple(maps[2 * k + c] @ theta.flatten() + offsets[2 * k + c] for c in range(2))

    terms = [MessageTerm(output(k), (targets[2 * k], targets[2 * k + 1]), scales[k]) for k in range(2)]
    prior = torch.zeros(d, m, dtype=torch.float64)
    metric = torch.eye(d, dtype=torch.float64)
    solution = solve_messages(terms, prior, metric=metric, ridge=0.0, iterations=200, tolerance=1e-12)
    factors = np.sqrt([1.0, 0.3, 2.0, 0.5])
    a = np.vstack([f * x.numpy() for f, x in zip(factors, maps)])
    b = np.concatenate([f * (y - o).numpy() for f, y, o in zip(factors, targets, offsets)])
    expected, rest, *_ = np.linalg.lstsq(a, b, rcond=None)
    np.testing.assert_allclose(solution.theta.flatten().numpy(), expected, rtol=1e-8, atol=1e-10)
    target = sum(f**2 * float(y.square().sum()) for f, y in zip(factors, targets))
    np.testing.assert_allclose(solution.residual_after, rest[0] / target, rtol=1e-8)
    assert solution.residual_after < solution.residual_before
