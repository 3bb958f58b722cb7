"""Equivariance of NequIP's states, and its convolution against e3nn's tensor product."""

import e3nn
import numpy as np
import pytest
import torch
from e3nn import o3

from ase_gffmerge.graphs import build_graph
from ase_gffmerge.graphs.graph import edge_vectors
from ase_gffmerge.models import build_potential
from ase_gffmerge.models.nequip import SILU_SCALE, Convolution, CoupledHarmonics, Gate, natural


@pytest.fixture(autouse=True)
def float64():
    """e3nn's Wigner matrices are as exact as the default type."""
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def orthogonal(*, inversion: bool) -> torch.Tensor:
    return -o3.rand_matrix() if inversion else o3.rand_matrix()


@pytest.mark.parametrize("inversion", [False, True])
@pytest.mark.parametrize("l_max", [0, 1, 2, 3])
def test_states_are_equivariant(structures, l_max, inversion):
    hyper = {"channels": 6, "tensor_channels": 3, "n_blocks": 3, "l_max": l_max, "cutoff": 4.0}
    potential = build_potential("nequip", hyper, (1, 6, 8, 13)).double()
    matrix = orthogonal(inversion=inversion)
    graph = build_graph(structures[-1], 4.0)
    vectors = edge_vectors(graph)
    state, geometry = potential.embed(graph), potential.geometry(vectors, graph)
    turned, turned_geometry = potential.embed(graph), potential.geometry(vectors @ matrix.mT, graph)
    for _, stage in potential.named_stages():
        state, turned = stage(state, geometry), stage(turned, turned_geometry)
        irreps = stage.linear_down.irreps_out
        expected = state[0] @ irreps.D_from_matrix(matrix).mT
        torch.testing.assert_close(turned[0], expected, rtol=0, atol=1e-10)
    assert irreps == o3.Irreps("6x0e")


def slow_convolution(convolution: Convolution, x, directions, weights):
    """The same by e3nn, path by path, sorted by the order of the result."""
    irreps, harmonics = natural(convolution.channels), o3.Irreps.spherical_harmonics(convolution.l_max)
    y = o3.spherical_harmonics(harmonics, directions, normalize=True, normalization="component")
    results: list[list[torch.Tensor]] = [[] for _ in range(convolution.irreps_out.lmax + 1)]
    for path, w in zip(convolution.paths, weights.split(convolution.weight_channels, dim=1), strict=True):
        out = o3.Irreps([(convolution.channels[path.l1], (path.l3, (-1) ** path.l3))])
        product = o3.TensorProduct(
            irreps,
            harmonics,
            out,
            [(path.l1, path.l2, 0, "uvu", True)],
            path_normalization="none",
            shared_weights=False,
        )
        results[path.l3].append(product(x, y, w))
    return torch.cat([block for blocks in results for block in blocks], dim=1)


@pytest.mark.parametrize(
    ("channels", "l_max", "l_out"),
    [((4,), 2, 2), ((4, 3), 1, 1), ((4, 3, 2), 2, 2), ((4, 3, 2), 2, 0), ((5,), 0, 0)],
)
def test_convolution_is_e3nns_tensor_product(channels, l_max, l_out):
    convolution = Convolution(channels, l_max=l_max, l_out=l_out)
    x, directions = torch.randn(7, natural(channels).dim), torch.nn.functional.normalize(torch.randn(7, 3))
    weights = torch.randn(7, sum(convolution.weight_channels))
    got = convolution(x, CoupledHarmonics(l_max)(directions), weights)
    assert got.shape == (7, convolution.irreps_out.dim)
    torch.testing.assert_close(got, slow_convolution(convolution, x, directions, weights), rtol=0, atol=1e-12)


def test_gate_is_equivariant_and_keeps_the_second_moment():
    gate = Gate((5, 3, 2))
    assert gate.irreps_in == o3.Irreps("10x0e + 3x1o + 2x2e")
    x, matrix = gate.irreps_in.randn(20000, -1), orthogonal(inversion=True)
    gated = gate(x)
    turned = gate(x @ gate.irreps_in.D_from_matrix(matrix).mT)
    torch.testing.assert_close(
        turned, gated @ natural(gate.channels).D_from_matrix(matrix).mT, rtol=0, atol=1e-12
    )
    torch.testing.assert_close(gated.square().mean(), torch.tensor(1.0), rtol=0.05, atol=0)


def test_silu_scale():
    nodes, weights = np.polynomial.hermite_e.hermegauss(200)
    moment = weights @ (nodes / (1 + np.exp(-nodes))) ** 2 / np.sqrt(2 * np.pi)
    assert pytest.approx(moment**-0.5, rel=1e-12) == SILU_SCALE


def test_e3nn_defaults_are_restored():
    before = e3nn.get_optimization_defaults()
    build_potential("nequip", {"channels": 4, "n_blocks": 1}, (1,))
    assert e3nn.get_optimization_defaults() == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_depends_on_the_default_type(structures, dtype):
    potential = build_potential("nequip", {"channels": 4, "tensor_channels": 2}, (1, 6, 8, 13)).to(dtype)
    torch.set_default_dtype(torch.float32 if dtype == torch.float64 else torch.float64)
    graph = build_graph(structures[0], 5.0, dtype=dtype)
    assert all(x.dtype == dtype for x in potential.features(edge_vectors(graph), graph))
