"""Linear layers per element, against the tensor products that they replace."""

from importlib import import_module

import pytest
import torch
from e3nn import o3

from ase_gffmerge.least_squares.gram import Gram
from ase_gffmerge.least_squares.ridge import ridge_solve
from ase_gffmerge.models.affine_maps import affine_maps, layer_maps, rows_entering
from ase_gffmerge.models.layers import package_mode
from ase_gffmerge.models.layers.linear import ElementLinear, element_weights, write_product

SPECIES = (1, 6, 8)
IN, OUT = "3x0e + 2x1o + 2x0e + 1x2e", "4x0e + 1x0o + 2x1o + 3x2e"
NUMBERS = torch.tensor([1, 8, 8, 6, 1])


@pytest.fixture
def layer() -> ElementLinear:
    torch.manual_seed(0)
    return ElementLinear(IN, OUT, SPECIES).double()


@pytest.fixture
def features() -> torch.Tensor:
    return torch.randn(
        len(NUMBERS), o3.Irreps(IN).dim, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )


def test_it_is_a_tensor_product_with_element_attributes(layer, features):
    attributes = torch.randn(3, 5, dtype=torch.float64)
    with package_mode():
        product = o3.FullyConnectedTensorProduct(IN, "5x0e", OUT)
    layer.weight.data = element_weights(product, attributes)
    rows = torch.tensor([SPECIES.index(z) for z in NUMBERS.tolist()])
    torch.testing.assert_close(
        layer(features, NUMBERS), product(features, attributes[rows]), rtol=0, atol=1e-13
    )


def test_a_tensor_product_is_written_back():
    with package_mode():
        product, other = (o3.FullyConnectedTensorProduct(IN, "3x0e", OUT) for _ in range(2))
    write_product(other, element_weights(product, torch.eye(3)))
    torch.testing.assert_close(other.weight, product.weight)


def test_its_problems_are_its_output(layer, features):
    """Rows times coefficients give the columns of each output irrep, for values and for slopes in front of them."""
    found = {problem.name: problem for problem in layer_maps("sc", layer)}
    assert len(found) == 3 * 3
    assert "sc[O, 1o]" in found
    rows = rows_entering(layer, (features, NUMBERS))
    oxygen = NUMBERS == 8
    problem = found["sc[O, 1o]"]
    product = (problem.rows(rows) @ problem.read()).view(len(NUMBERS), 3, 2)
    columns = layer(features, NUMBERS)[:, layer.irreps_out.slices()[2]].view(len(NUMBERS), 2, 3).mT
    torch.testing.assert_close(product[oxygen], columns[oxygen])
    assert not product[~oxygen].any()
    assert len(problem.rows(torch.stack([rows, rows]))) == 2 * len(NUMBERS) * 3


def test_writing_changes_one_element_and_irrep(layer):
    before = layer.weight.detach().clone()
    problem = affine_maps(layer)["[C, 2e]"]
    problem.write(problem.read() + 1)
    changed = (layer.weight != before).nonzero()
    assert set(changed[:, 0].tolist()) == {1}
    assert len(changed) == problem.read().numel()


def test_many_elements_are_left_to_the_mean():
    assert not affine_maps(ElementLinear("2x0e", "2x0e", tuple(range(1, 18))))


def test_an_element_without_rows_keeps_its_prior():
    prior = torch.randn(3, 2, dtype=torch.float64)
    solution = ridge_solve(Gram.zero(3, 2), prior, ridge=1e-4)
    torch.testing.assert_close(solution.theta, prior)
    assert solution.effective_rank == pytest.approx(0, abs=1e-6)


class ScalarLinearLayer(torch.nn.Module):
    """Named like nequip's layer, and as it is."""

    def __init__(self, *, bias: bool):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(4, 3))
        self.bias = torch.nn.Parameter(torch.randn(3)) if bias else None
        self.register_buffer("alpha", torch.tensor(0.3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x @ (self.alpha * self.weight)
        return y if self.bias is None else y + self.bias


@pytest.mark.parametrize("bias", [False, True])
def test_scaled_layers_of_nequip(bias):
    import_module("ase_gffmerge.integrations.nequip")
    layer, x = ScalarLinearLayer(bias=bias), torch.randn(5, 4)
    (problem,) = layer_maps("mlp", layer)
    torch.testing.assert_close(problem.design(x) @ problem.read(), layer(x).detach())
    theta = torch.randn(problem.read().shape)
    problem.write(theta)
    torch.testing.assert_close(problem.read(), theta)
