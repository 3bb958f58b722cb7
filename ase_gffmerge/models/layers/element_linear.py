r"""Equivariant linear layer with weights of its own for every element, as in the self-connections of NequIP.

.. math:: y_i^{(l)} = \sum_{p\,:\,l_p = l} W_p^{(z_i)}\, x_i^{(l_p)}

Packages write it as a fully connected tensor product of the features with element attributes :math:`a_z` (one-hot
vectors, or rows of an embedding). Those enter only as :math:`W_p^{(z)} = c_p \sum_v a_{zv} W_{pv}`, which is what is kept
here: for each element the layer is linear in its parameters, and a merge can treat one element at a time.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from e3nn.o3 import FullyConnectedTensorProduct, Irreps
from torch import Tensor, nn
from torch.nn.functional import one_hot


@dataclass(frozen=True)
class Block:
    """One path from an input irrep to an output irrep.

    Attributes
    ----------
    source
        Columns of the input.
    i_out
        Position of the output irrep.
    shape
        Channels of input and output.
    coefficients
        Columns of the weights.
    """

    source: slice
    i_out: int
    shape: tuple[int, int]
    coefficients: slice


class ElementLinear(nn.Module):
    """Bias-free linear layer between irreps, one per element.

    Parameters
    ----------
    irreps_in, irreps_out
        Layouts of the features.
    species
        Atomic numbers, ascending; one row of ``weight`` each.
    """

    species_row: Tensor

    def __init__(self, irreps_in: Irreps, irreps_out: Irreps, species: Sequence[int]):
        super().__init__()
        self.irreps_in, self.irreps_out = Irreps(irreps_in), Irreps(irreps_out)
        self.species = tuple(species)
        self.blocks: list[Block] = []
        size = 0
        for source, (mul_in, ir_in) in zip(self.irreps_in.slices(), self.irreps_in, strict=True):
            for i_out, (mul_out, ir_out) in enumerate(self.irreps_out):
                if ir_in == ir_out:
                    end = size + mul_in * mul_out
                    self.blocks.append(Block(source, i_out, (mul_in, mul_out), slice(size, end)))
                    size = end
        rows = torch.full((119,), -1)
        rows[list(self.species)] = torch.arange(len(self.species))
        self.register_buffer("species_row", rows, persistent=False)
        self.weight = nn.Parameter(torch.randn(len(self.species), size))

    def forward(self, x: Tensor, atomic_numbers: Tensor) -> Tensor:
        """Map features (n_atoms, irreps_in.dim) and atomic numbers (n_atoms,) to (n_atoms, irreps_out.dim)."""
        weight = self.weight[self.species_row[atomic_numbers]]
        parts = [x.new_zeros(len(x), mul, ir.dim) for mul, ir in self.irreps_out]
        for block in self.blocks:
            w = weight[:, block.coefficients].unflatten(1, block.shape)
            features = x[:, block.source].unflatten(1, (block.shape[0], -1))
            parts[block.i_out] = parts[block.i_out] + w.mT @ features
        return torch.cat([part.flatten(1) for part in parts], dim=1)

    def per_element(self, x: Tensor, atomic_numbers: Tensor) -> Tensor:
        """Give (n_atoms, n_species, irreps_in.dim): the features in the row of the atom's element, zeros in the others."""
        mask = one_hot(self.species_row[atomic_numbers], len(self.species)).to(x.dtype)
        return x[:, None, :] * mask[:, :, None]


@torch.no_grad()
def element_weights(product: FullyConnectedTensorProduct, attributes: Tensor) -> Tensor:
    """Weights (n_species, size) of the :class:`ElementLinear` that a tensor product with element attributes is.

    Parameters
    ----------
    product
        Of features with invariant attributes; all of its paths have weights.
    attributes : (n_species, n_attributes)
        One row per element.
    """
    return torch.cat(
        [
            scale * torch.einsum("zv,uvw->zuw", attributes.to(view), view).flatten(1)
            for scale, view in _paths(product)
        ],
        dim=1,
    )


@torch.no_grad()
def write_product(product: FullyConnectedTensorProduct, weights: Tensor) -> None:
    """Set the weights of a tensor product, one row per attribute; with one-hot elements, undoes :func:`element_weights`.

    Parameters
    ----------
    product
        Written in place.
    weights : (n_attributes, size)
        What an :class:`ElementLinear` has for elements, for each of which one attribute is 1 and the others are 0.
    """
    start = 0
    for scale, view in _paths(product):
        n_in, n_attributes, n_out = view.shape
        block = weights[:, start : start + n_in * n_out].view(n_attributes, n_in, n_out)
        view.copy_(block.transpose(0, 1) / scale)
        start += n_in * n_out


def _paths(product: FullyConnectedTensorProduct) -> Iterator[tuple[float, Tensor]]:
    """Factor and weights (n_in, n_attributes, n_out) of every path, in the order of :class:`ElementLinear`."""
    paths = sorted(enumerate(product.instructions), key=lambda entry: (entry[1].i_in1, entry[1].i_out))
    for i, instruction in paths:
        scale = instruction.path_weight / product.irreps_out[instruction.i_out].ir.dim ** 0.5
        yield scale, product.weight_view_for_instruction(i)
