"""Equivariant layers as they are served compute what e3nn's and plain sums do."""

import pytest
import torch
from ase.build import bulk
from e3nn import o3
from torch import Tensor, nn
from torch.autograd import gradcheck

from ase_gffmerge.graphs import build_graph, predict
from ase_gffmerge.models.layers import equivariant, package_mode
from ase_gffmerge.models.layers.equivariant import EdgeSums, SymmetricPowers, replaced
from ase_gffmerge.models.nequip import NequIP, NequIPHyper

N_ATOMS = 3
EDGES = torch.tensor([[0, 1, 2, 2, 0, 1], [1, 0, 0, 1, 2, 1]])


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()


@pytest.fixture
def product() -> o3.TensorProduct:
    """Paths of mixed parities in no order, some of which share an input."""
    first, second = o3.Irreps("4x0e + 3x1o + 2x1e"), o3.Irreps("0e + 1o + 2e")
    paths = [(0, 1, 3, 0.5), (1, 0, 2, 2.0), (1, 1, 0, 1.0), (2, 2, 1, 1.5), (1, 2, 4, 1.0)]
    result = o3.Irreps("3x0e + 2x2e + 3x1o + 4x1o + 3x3o")
    with package_mode():
        found = o3.TensorProduct(
            first, second, result, [(i, j, k, "uvu", True, w) for i, j, k, w in paths], shared_weights=False
        )
    return found


def plain_sums(product: o3.TensorProduct, x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    messages = product(x[EDGES[0]], y, w)
    return messages.new_zeros(N_ATOMS, messages.shape[1]).index_add(0, EDGES[1], messages)


def inputs_of(product: o3.TensorProduct) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (N_ATOMS, product.irreps_in1.dim), (6, product.irreps_in2.dim), (6, product.weight_numel)
    return tuple(random(*shape, seed=seed) for seed, shape in enumerate(shapes))  # type: ignore[return-value]


@pytest.mark.parametrize("edges", [1, 4, 10**6])
def test_sums_of_messages(product, monkeypatch, edges) -> None:
    monkeypatch.setattr(equivariant, "BLOCK", edges * product.irreps_out.dim)
    assert EdgeSums.can_replace(product)
    sums, inputs = EdgeSums(product), inputs_of(product)
    found, expected = sums(*inputs, EDGES), plain_sums(product, *inputs)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    factors = random(*found.shape, seed=3).detach()
    for ours, theirs in zip(
        torch.autograd.grad(found, inputs, factors),
        torch.autograd.grad(expected, inputs, factors),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_derivatives_are_right_and_taken_once(product) -> None:
    sums, inputs = EdgeSums(product), inputs_of(product)
    assert gradcheck(lambda *tensors: sums(*tensors, EDGES), inputs)
    (gradient,) = torch.autograd.grad(sums(*inputs, EDGES).square().sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_without_edges_sums_are_zero(product) -> None:
    x, y, w = inputs_of(product)
    assert not EdgeSums(product)(x, y[:0], w[:0], EDGES[:, :0]).any()


@pytest.mark.parametrize(
    "paths",
    [[(0, 0, 0, "uvw", True)], [(0, 0, 0, "uvu", True), (0, 0, 0, "uvu", True)], [(0, 0, 0, "uvu", False)]],
)
def test_other_products_stay(paths) -> None:
    with package_mode():
        other = o3.TensorProduct("2x0e", "0e", "2x0e", paths, shared_weights=False)
    assert not EdgeSums.can_replace(other)
    assert not EdgeSums.can_replace(nn.Linear(2, 2))


@pytest.mark.parametrize("power", [1, 2, 3])
def test_products_of_features_with_themselves(power) -> None:
    n, channels, n_weights = 4, 3, 2
    symbols = [
        [random(m, *power * [n], n_weights, seed=m + power) for power in range(1, power + 1)] for m in (1, 3)
    ]
    weights = [[random(2, n_weights, channels, seed=m) for _ in range(power)] for m in (5, 6)]
    rows, features = torch.tensor([1, 0, 1, 1, 0]), random(5, channels, n)
    one_hot = torch.nn.functional.one_hot(rows, 2).double()
    found = SymmetricPowers(symbols, weights)(features, one_hot)
    expected = [torch.zeros(())] * 2
    for i, of_powers in enumerate(symbols):
        for p, tensor in enumerate(of_powers, start=1):
            inputs = ",".join(f"bc{'xyz'[axis]}" for axis in range(p))
            term = torch.einsum(
                f"m{'xyz'[:p]}k,bkc,{inputs}->bcm", tensor, weights[i][p - 1][rows], *p * [features]
            )
            expected[i] = expected[i] + term
    plain = torch.cat([part.flatten(1) for part in expected], dim=1)
    torch.testing.assert_close(found, plain, rtol=1e-12, atol=1e-12)
    ours, theirs = (torch.autograd.grad((x**2).sum(), features)[0] for x in (found, plain))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_more_elements_than_are_kept(monkeypatch) -> None:
    monkeypatch.setattr(equivariant, "MOST_ELEMENTS", 1)
    powers = SymmetricPowers([[random(1, 2, 1)]], [[random(3, 1, 2)]])
    elements = torch.eye(3, dtype=torch.float64)
    features = random(3, 2, 2)
    torch.testing.assert_close(powers(features, elements), powers(features, elements), rtol=0, atol=0)
    assert len(powers._made) == 1


def test_a_part_is_replaced_and_the_rest_shared() -> None:
    root = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.Tanh()), nn.Linear(2, 2))
    twin = replaced(root, lambda part: nn.ReLU() if isinstance(part, nn.Tanh) else None)
    assert isinstance(twin[0][1], nn.ReLU)
    assert isinstance(root[0][1], nn.Tanh)
    assert (twin[0][0], twin[1]) == (root[0][0], root[1])
    assert replaced(root, lambda part: None) is root


def test_nequip_is_served_alike() -> None:
    torch.manual_seed(0)
    hyper = NequIPHyper(channels=8, tensor_channels=4, n_blocks=3, l_max=2, n_radial=6, cutoff=4.0)
    potential = NequIP(hyper, (13, 29)).double().requires_grad_(False)
    atoms = bulk("Cu", cubic=True) * (2, 1, 1)
    atoms.numbers[::3] = 13
    atoms.rattle(0.1, seed=1)
    graph = build_graph(atoms, 4.0)
    expected, served = predict(potential, graph), predict(potential.for_inference(), graph)
    for name in ("energies", "energy", "forces", "strain_derivative"):
        torch.testing.assert_close(getattr(served, name), getattr(expected, name), rtol=1e-12, atol=1e-12)
    own = {p.data_ptr() for p in potential.parameters()}
    assert {p.data_ptr() for p in potential.for_inference().parameters()} == own


def test_tables_without_weights_are_made_once() -> None:
    """A served network is made anew for every prediction, so that changed weights count; e3nn's tables are not."""
    toy_hyper = NequIP.Hyper(channels=4, tensor_channels=2, n_blocks=2, n_radial=4, cutoff=4.0)
    first, second = (NequIP(toy_hyper, (1, 8)).eval().requires_grad_(False) for _ in range(2))
    made, again, other = first.for_inference(), first.for_inference(), second.for_inference()
    for one, twin, foreign in zip(made.stages, again.stages, other.stages, strict=True):
        assert one.sums is twin.sums is foreign.sums
        assert not list(one.sums.parameters())
        assert one.linear_up is twin.linear_up is not foreign.linear_up
