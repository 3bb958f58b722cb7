"""What is served computes what the model says, for any number of blocks of edges."""

import pytest
import torch
from ase.build import bulk
from torch.autograd.forward_ad import dual_level

from ase_gffmerge.graphs import build_graph, predict
from ase_gffmerge.models import painn as painn_served
from ase_gffmerge.models.painn import PaiNN, PaiNNHyper


@pytest.fixture
def painn() -> PaiNN:
    torch.manual_seed(0)
    hyper = PaiNNHyper(channels=8, n_blocks=3, n_radial=6, cutoff=4.0)
    return PaiNN(hyper, (13, 29)).double().requires_grad_(False)


@pytest.fixture
def graph():
    atoms = bulk("Cu", cubic=True) * (2, 1, 1)
    atoms.numbers[::3] = 13
    atoms.rattle(0.1, seed=1)
    return build_graph(atoms, 4.0)


@pytest.mark.parametrize("block", [1, 8, 80, 10**6])
def test_blocks_of_edges_leave_no_trace(painn, graph, monkeypatch, block) -> None:
    monkeypatch.setattr(painn_served, "BLOCK", block)
    expected, served = predict(painn, graph), predict(painn.for_inference(), graph)
    for name in ("energies", "energy", "forces", "strain_derivative"):
        torch.testing.assert_close(getattr(served, name), getattr(expected, name), rtol=1e-12, atol=1e-12)


def test_derivatives_of_the_sums(painn, graph) -> None:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()

    sender, receiver = torch.tensor([[0, 1, 2, 2, 0], [1, 0, 0, 1, 2]])
    inputs = random(3, 5, 4), random(5, 7), random(5, 3)
    maps = random(7, 12).detach()
    assert torch.autograd.gradcheck(
        lambda *tensors: painn_served.BlockedSums.apply(*tensors, maps, sender, receiver), inputs
    )


def test_second_derivatives_are_refused(painn, graph, monkeypatch) -> None:
    monkeypatch.setattr(painn_served, "BLOCK", 80)
    prediction = predict(painn.for_inference(), graph, differentiable=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        prediction.forces.sum().backward()


def test_the_model_itself_stays_differentiable_both_ways(painn, graph) -> None:
    painn.for_inference()
    with dual_level():
        vectors = torch.autograd.forward_ad.make_dual(*2 * (torch.rand(graph.n_edges, 3).double() + 1,))
        energies, _ = painn(vectors, graph)
        assert torch.autograd.forward_ad.unpack_dual(energies).tangent is not None


def test_weights_are_shared(painn) -> None:
    served = painn.for_inference()
    own = {p.data_ptr() for p in painn.parameters()}
    assert {p.data_ptr() for p in served.parameters()} <= own
    assert served.species == painn.species
    assert len(painn.stages) == len(served.stages)
    assert type(painn.stages[0]) is not type(served.stages[0])
