"""Calculators of anyone's, merged through hooks."""

from copy import deepcopy

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule
from ase.calculators.calculator import Calculator, all_changes
from torch import nn

from ase_gffmerge import merge_calculators
from ase_gffmerge.errors import FramesError, IncompatibleSpecialistsError


class Network(nn.Module):
    """Pair distances through a small network; a scale that no layer covers."""

    def __init__(self, hidden: int = 32):
        super().__init__()
        self.first, self.second, self.out = (
            nn.Linear(6, hidden),
            nn.Linear(hidden, hidden),
            nn.Linear(hidden, 1),
        )
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, positions: torch.Tensor) -> torch.Tensor:
        i, j = torch.triu_indices(len(positions), len(positions), offset=1)
        r = (positions[i] - positions[j]).norm(dim=1, keepdim=True)
        basis = torch.exp(-((r - torch.linspace(0.5, 3.0, 6, dtype=r.dtype)) ** 2))
        x = torch.tanh(self.second(torch.tanh(self.first(basis))))
        return self.scale * self.out(x).sum()


class Pairs(Calculator):
    """A calculator that knows nothing of this package."""

    implemented_properties = ("energy", "forces")

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes):
        super().calculate(atoms, properties, system_changes)
        positions = torch.tensor(atoms.positions, requires_grad=True)
        energy = self.network(positions)
        (gradient,) = torch.autograd.grad(energy, positions)
        self.results = {"energy": float(energy.detach()), "forces": -gradient.numpy()}


def rattled(name: str, n: int) -> list[Atoms]:
    frames = []
    for seed in range(n):
        atoms = molecule(name)
        atoms.rattle(0.1, seed=seed)
        frames.append(atoms)
    return frames


@pytest.fixture
def calculators() -> list[Pairs]:
    torch.manual_seed(0)
    base = Network().double()
    found = []
    for _ in range(2):
        network = deepcopy(base)
        for layer in (network.first, network.second, network.out):
            for parameter in layer.parameters():
                parameter.data += 0.05 * torch.randn_like(parameter)
        found.append(Pairs(network))
    return found


FRAMES = [rattled("H2O", 8), rattled("C2H2", 8)]


def network_of(calculator: Pairs) -> nn.Module:
    return calculator.network


def test_it_is_nearer_to_both_than_the_mean(calculators):
    before = [deepcopy(calculator.network.state_dict()) for calculator in calculators]
    heard = []
    result = merge_calculators(
        calculators, FRAMES, module=network_of, progress=lambda fraction, text: heard.append(fraction)
    )
    assert [layer.name for layer in result.layers] == ["first", "second", "out"]
    assert result.averaged == ("scale",)
    errors = {(row.specialist, row.model): row.force_mae for row in result.disagreements}
    assert all(errors[k, "merged"] < 0.7 * errors[k, "mean"] for k in "01")
    assert heard == sorted(heard)
    assert heard[-1] == 1.0
    for calculator, state in zip(calculators, before, strict=True):
        assert all(torch.equal(calculator.network.state_dict()[name], value) for name, value in state.items())
    atoms = FRAMES[0][0].copy()
    atoms.calc = result.calculator
    assert np.isfinite(atoms.get_forces()).all()


def test_the_first_layer_is_the_least_squares_solution(calculators):
    """Its inputs depend on no weights; NumPy solves the same stacked rows."""
    result = merge_calculators(calculators, FRAMES, module=network_of, ridge=1e-14, derivative_weight=0.0)
    rows, targets = [], []
    for calculator, frames in zip(calculators, FRAMES, strict=True):
        caught: list[torch.Tensor] = []
        layer = calculator.network.first
        handle = layer.register_forward_pre_hook(
            lambda _, inputs, caught=caught: caught.append(inputs[0].detach())
        )
        for atoms in frames:
            calculator.reset()
            calculator.get_property("energy", atoms)
        handle.remove()
        x = torch.cat(caught)
        y = layer(x).detach()
        weight = float((y.square().mean() * len(x)) ** -0.5)
        rows.append(weight * torch.cat([x, torch.ones(len(x), 1)], dim=1).numpy())
        targets.append(weight * y.numpy())
    solution = np.linalg.lstsq(np.concatenate(rows), np.concatenate(targets), rcond=None)[0]
    found = result.calculator.network.first
    predicted = np.concatenate(rows) @ np.vstack(
        [found.weight.detach().numpy().T, found.bias.detach().numpy()]
    )
    np.testing.assert_allclose(predicted, np.concatenate(rows) @ solution, atol=1e-6)


def test_copies_give_the_original(calculators):
    copies = [calculators[0], deepcopy(calculators[0])]
    result = merge_calculators(copies, [FRAMES[0], FRAMES[0]], module=network_of)
    assert max(row.force_mae for row in result.disagreements) < 1e-10


def test_bad_input_is_refused(calculators):
    with pytest.raises(IncompatibleSpecialistsError, match="at least two"):
        merge_calculators(calculators[:1], FRAMES[:1], module=network_of)
    with pytest.raises(FramesError, match="needs frames"):
        merge_calculators(calculators, [FRAMES[0], []], module=network_of)
    with pytest.raises(IncompatibleSpecialistsError, match="first difference"):
        merge_calculators([calculators[0], Pairs(Network(4).double())], FRAMES, module=network_of)
    with pytest.raises(IncompatibleSpecialistsError, match="not a torch network"):
        merge_calculators(calculators, FRAMES, module=lambda calc: calc)
    with pytest.raises(IncompatibleSpecialistsError, match="called no layer"):
        merge_calculators([Pairs(Constant()), Pairs(Constant())], FRAMES, module=network_of)


class Constant(nn.Module):
    """Without any layer."""

    def __init__(self):
        super().__init__()
        self.strength = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, positions: torch.Tensor) -> torch.Tensor:
        return self.strength * positions.square().sum()


class Many(Network):
    """With a layer for structures of more than three atoms only."""

    def __init__(self):
        super().__init__()
        self.crowd = nn.Linear(6, 1)

    def forward(self, positions: torch.Tensor) -> torch.Tensor:
        energy = super().forward(positions)
        return energy if len(positions) < 4 else energy + self.crowd(positions.reshape(-1, 6)).sum()


def test_frames_that_do_not_reach_a_layer_are_left_out():
    torch.manual_seed(0)
    calculators = [Pairs(Many().double()) for _ in range(2)]
    result = merge_calculators(calculators, FRAMES, module=network_of)
    assert [layer.name for layer in result.layers] == ["first", "second", "out", "crowd"]
    ours, known = (c.network.crowd.weight for c in (result.calculator, calculators[1]))
    torch.testing.assert_close(ours, known, rtol=1e-2, atol=1e-3)  # only its frames need the layer
