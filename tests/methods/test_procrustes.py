import numpy as np
import pytest
import torch

from ase_gffmerge.methods import METHODS
from ase_gffmerge.methods.procrustes import merge_turned, turned


def silent(fraction: float, text: str) -> None:
    assert 0 <= fraction <= 1
    assert text


def orthogonal(n: int, seed: int) -> torch.Tensor:
    return torch.as_tensor(np.linalg.qr(np.random.default_rng(seed).standard_normal((n, n)))[0])


def test_a_turned_basis_is_turned_back() -> None:
    theta = torch.randn(5, 7, dtype=torch.float64)
    torch.testing.assert_close(turned(orthogonal(5, 0) @ theta, theta), theta)


@pytest.mark.parametrize("shape", [(6, 4), (4, 6)])
def test_no_other_rotation_comes_closer_to_the_reference(shape) -> None:
    theta, reference = (torch.randn(shape, dtype=torch.float64) for _ in range(2))
    best = turned(theta, reference)
    torch.testing.assert_close(best.T @ best, theta.T @ theta)
    for seed in range(50):
        other = orthogonal(shape[0], seed) @ theta
        assert (best - reference).norm() <= (other - reference).norm()


def test_the_formula_on_one_layer(make_merge_inputs) -> None:
    """W = a W_A P + (1 - a) W_B with NumPy, for a layer of hidden inputs, one of radial inputs and a bias."""
    merge_inputs = make_merge_inputs("painn", 2)
    potentials = [s.potential for s in merge_inputs.specialists]
    mean = METHODS["mean"].run(merge_inputs, silent).potentials[0]
    merged = merge_turned(mean, potentials, reference=1, share=0.3)
    a, b, found = (p.get_submodule("stages.1.hidden").weight.numpy() for p in (*potentials, merged))
    u, _, vt = np.linalg.svd(a.T @ b)
    np.testing.assert_allclose(found, 0.3 * a @ u @ vt + 0.7 * b, atol=1e-12)
    for name in ("stages.0.filters.weight", "stages.1.hidden.bias", "embedding"):
        assert torch.equal(merged.get_parameter(name), mean.get_parameter(name))


def test_three_specialists_are_turned_to_one(make_merge_inputs) -> None:
    merge_inputs = make_merge_inputs("nequip", 3)
    potentials = [s.potential for s in merge_inputs.specialists]
    mean = METHODS["mean"].run(merge_inputs, silent).potentials[0]
    merged = merge_turned(mean, potentials, reference=0, share=0.0)
    for name in ("stages.1.linear_up.weight", "stages.1.radial.layer1.weight"):
        torch.testing.assert_close(merged.get_parameter(name), potentials[0].get_parameter(name))
