import pytest
import torch
from e3nn import o3
from e3nn.nn import FullyConnectedNet
from torch import nn
from torch.func import functional_call
from torch_geometric.nn import Linear as GeometricLinear

from ase_gffmerge.merging.calibration import affine_layers, layer_input
from ase_gffmerge.models import affine_maps
from ase_gffmerge.models.affine_maps import AffineMap, flat_rows, is_affine, layer_maps, register_layer


def equivariant() -> tuple[o3.Linear, torch.Tensor, torch.Tensor]:
    layer = o3.Linear("3x0e + 2x1o + 4x0e + 2x1o + 1x2e", "5x0e + 3x1o + 2x2e + 2x0e").double()
    x = layer.irreps_in.randn(7, -1).double()
    return layer, x, layer(x)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", [nn.Linear, GeometricLinear])
def test_linear_is_its_problem(kind: type, bias: bool) -> None:
    layer = kind(4, 3, bias=bias).double()
    x = torch.randn(5, 3, 4, dtype=torch.float64)
    (problem,) = layer_maps("layer", layer)
    torch.testing.assert_close(problem.design(x) @ problem.read(), layer(x).reshape(-1, 3))
    assert problem.has_bias is bias


def test_radial_layers_are_their_problems_before_the_activation() -> None:
    net = FullyConnectedNet([4, 6, 3], torch.nn.functional.silu).double()
    x = torch.randn(9, 4, dtype=torch.float64)
    layers = [module for module in net.modules() if is_affine(module)]
    assert len(layers) == 2
    (first,), (second,) = (layer_maps("l", layer) for layer in layers)
    hidden = layer_input(layers[1], lambda: net(x))
    act = layers[0].act
    torch.testing.assert_close(act(first.design(x) @ first.read()) * layers[0].var_out ** 0.5, hidden)
    torch.testing.assert_close(second.design(hidden) @ second.read(), net(x))


def test_equivariant_linear_is_one_problem_per_output_irrep_with_path_weights() -> None:
    layer, x, y = equivariant()
    found = layer_maps("layer", layer)
    assert [p.name for p in found] == ["layer[0e #1]", "layer[1o]", "layer[2e]", "layer[0e #2]"]
    assert list(affine_maps.affine_maps(nn.ModuleDict({"layer": layer}))) == [p.name for p in found]
    for problem, part, (mul, irrep) in zip(found, layer.irreps_out.slices(), layer.irreps_out):
        expected = y[:, part].reshape(-1, mul, irrep.dim).transpose(1, 2).reshape(-1, mul)
        torch.testing.assert_close(problem.design(x) @ problem.read(), expected)


@pytest.mark.parametrize(
    "make", [lambda: nn.Linear(4, 3), lambda: equivariant()[0], lambda: nn.Linear(4, 3, bias=False)]
)
def test_writing_what_was_read_changes_nothing_and_writing_theta_sets_it(make) -> None:
    layer = make().double()
    before = [p.clone() for p in layer.parameters()]
    for problem in layer_maps("layer", layer):
        problem.write(problem.read())
    for old, new in zip(before, layer.parameters()):
        torch.testing.assert_close(old, new, rtol=1e-14, atol=1e-14)
    for problem in layer_maps("layer", layer):
        theta = torch.randn_like(problem.read())
        problem.write(theta)
        torch.testing.assert_close(problem.read(), theta)


def test_parameters_of_theta_are_differentiable() -> None:
    layer, x, _ = equivariant()
    problem = next(iter(layer_maps("layer", layer)))
    theta = problem.read().requires_grad_()
    functional_call(layer, problem.parameters(theta), (x,)).sum().backward()
    assert theta.grad is not None
    assert theta.grad.abs().sum() > 0


def test_layers_are_found_in_execution_order_and_unused_ones_left_out() -> None:
    class Crossed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.unused = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a(self.b(x))

    model = Crossed()
    assert affine_layers(model, lambda: model(torch.ones(1, 2))) == ["b", "a"]
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_an_equivariant_linear_layer_with_biases_is_a_map_with_offsets() -> None:
    layer = o3.Linear("2x0e+1x0e+2x1o", "3x0e+2x1o+1x0e", biases=True)
    with torch.no_grad():
        layer.bias.copy_(torch.arange(1.0, 5.0))
    x = torch.randn(7, 9)
    y = layer(x)
    maps = layer_maps("layer", layer)
    assert [one.has_bias for one in maps] == [True, False, True]
    outputs = [one.design(x) @ one.read() for one in maps]
    torch.testing.assert_close(outputs[0], y[:, :3])
    torch.testing.assert_close(outputs[1].unflatten(0, (7, 3)).transpose(1, 2).flatten(1), y[:, 3:9])
    torch.testing.assert_close(outputs[2], y[:, 9:])
    before = {name: value.clone() for name, value in layer.named_parameters()}
    for one in maps:
        one.write(2 * one.read())
    for name, value in layer.named_parameters():
        torch.testing.assert_close(value, 2 * before[name])


def test_a_linear_layer_whose_weights_are_a_vector_is_no_problem() -> None:
    layer = nn.Linear(118, 1, bias=False)
    assert is_affine(layer)
    layer.weight.data = torch.zeros(118)  # as Orb keeps its reference energies
    assert not is_affine(layer)


def test_layers_of_other_packages_can_be_registered(monkeypatch) -> None:
    """The kind that was registered last counts, so that a special layer may inherit from a known one."""
    monkeypatch.setattr(affine_maps, "_KINDS", list(affine_maps._KINDS))

    class Halved(nn.Linear):
        def forward(self, scale: float, x: torch.Tensor) -> torch.Tensor:
            return 0.5 * x @ self.weight.T

    @register_layer(lambda module: isinstance(module, Halved), entering=lambda layer, scale, x: x)
    def halved(name: str, layer: Halved):
        theta = 0.5 * layer.weight.detach().T
        yield AffineMap(name, layer, False, flat_rows, lambda: theta, lambda t: {"weight": 2 * t.T})

    layer, x = Halved(3, 2, bias=False), torch.randn(4, 3)
    (found,) = layer_maps("layer", layer)
    torch.testing.assert_close(found.design(x) @ found.read(), layer(1.0, x).detach())
    torch.testing.assert_close(layer_input(layer, lambda: layer(1.0, x)), x)
