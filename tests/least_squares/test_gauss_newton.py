"""A Gauss-Newton step against NumPy's dense least squares."""

from dataclasses import dataclass

import numpy as np
import torch

from ase_gffmerge.least_squares.gauss_newton import dot, gauss_newton_steps


@dataclass
class Dense:
    """A linear linear with known Jacobians per map, in two batches."""

    jacobians: dict[str, list[torch.Tensor]]
    residual: list[torch.Tensor]
    thetas: dict[str, torch.Tensor]
    grams: dict[str, torch.Tensor]

    def forward(self, direction):
        return [
            sum(self.jacobians[name][k] @ direction[name].flatten() for name in self.jacobians)
            for k in range(len(self.residual))
        ]

    def vjp(self, k, vector):
        return {
            name: (blocks[k].T @ vector).reshape(self.thetas[name].shape)
            for name, blocks in self.jacobians.items()
        }

    def summed(self, parts):
        return parts


def random_problem(shapes: dict[str, tuple[int, int]]) -> Dense:
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    roots = {name: randn(3 * d, d) for name, (d, _) in shapes.items()}
    return Dense(
        {name: [randn(20, d * m), randn(30, d * m)] for name, (d, m) in shapes.items()},
        [randn(20), randn(30)],
        {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()},
        {name: root.T @ root for name, root in roots.items()},
    )


def test_a_converged_step_is_dense_least_squares() -> None:
    linear = random_problem({"a": (4, 3), "b": (2, 5)})
    *_, step = gauss_newton_steps(linear, iterations=300, damping=0.0)
    dense = np.vstack(
        [np.hstack([linear.jacobians[name][k].numpy() for name in ("a", "b")]) for k in range(2)]
    )
    expected, *_ = np.linalg.lstsq(dense, torch.cat(linear.residual).numpy(), rcond=None)
    found = torch.cat([step["a"].flatten(), step["b"].flatten()])
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6, atol=1e-8)


def test_damping_shortens_the_step() -> None:
    linear = random_problem({"a": (4, 3)})
    free, damped = ([*gauss_newton_steps(linear, iterations=100, damping=mu)][-1] for mu in (0.0, 10.0))
    assert dot(damped, damped) < 0.5 * dot(free, free)


def test_nothing_to_correct_is_no_step() -> None:
    linear = random_problem({"a": (4, 3)})
    linear.residual = [torch.zeros_like(r) for r in linear.residual]
    assert not list(gauss_newton_steps(linear, iterations=5, damping=0.0))
