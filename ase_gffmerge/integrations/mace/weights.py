"""Weights of a MACE of the package ``mace-torch``: into a potential, and back into the package's model."""

import torch
from e3nn.o3 import FullyConnectedTensorProduct
from torch import Tensor, nn

from ase_gffmerge.errors import FileFormatError
from ase_gffmerge.integrations.base import VendorObject
from ase_gffmerge.integrations.conversion import per_element, rows_of_elements
from ase_gffmerge.integrations.mace.model import TABLES, MACEPackage, build_network
from ase_gffmerge.models.layers.linear import element_weights, write_product


@torch.no_grad()
def copy_weights(potential: MACEPackage, network: VendorObject, species: tuple[int, ...]) -> None:
    """Set all weights: rows of elements in the order of atomic numbers, self-connections per element.

    The mean number of neighbours goes into the linear layers after the sums over them.

    Parameters
    ----------
    potential
        Written in place.
    network
        The package's model, with one head.
    species
        Atomic numbers in the order of its types.
    """
    order = rows_of_elements(species)
    linear = network.node_embedding.linear
    one_hot = torch.eye(len(species)).to(linear.weight)
    potential.embedding.copy_(linear(one_hot)[order][None])
    own = dict(potential.named_parameters())
    for t, parts in enumerate(zip(network.interactions, network.products, strict=True)):
        for part, module in zip(("interaction", "product"), parts, strict=True):
            for name, value in module.named_parameters():
                own[f"stages.{t}.module.{part}.{name}"].copy_(_own_weight(module, name, value, order))
    scale, shift = _scale_and_shift(network)
    for i, readout in enumerate(network.readouts):
        for name, value in readout.named_parameters():
            last = not name.startswith("linear_1")
            own[f"readout.module.{i}.{name}"].copy_(value * scale if last else value)
    energies = network.atomic_energies_fn.atomic_energies
    potential.references.copy_(per_element(energies, species) + shift)
    if potential.repulsion is not None:
        potential.repulsion.scale.fill_(scale)


def _scale_and_shift(network: VendorObject) -> tuple[float, float]:
    """Factor of the energies of the network, and what is added to them per atom, in eV."""
    if not hasattr(network, "scale_shift"):
        return 1.0, 0.0
    return float(network.scale_shift.scale), float(network.scale_shift.shift)


@torch.no_grad()
def vendor_network(potential: MACEPackage) -> nn.Module:
    """The package's model with the potential's weights, in their type.

    Raises
    ------
    FileFormatError
        When the repulsion counts differently for different elements.
    """
    species, repulsion = potential.species, potential.repulsion
    scale = 1.0 if repulsion is None else float(repulsion.scale[0])
    if repulsion is not None and not torch.allclose(repulsion.scale, repulsion.scale[0]):
        raise FileFormatError(
            "the potential scales the repulsion per element, which a MACE cannot; merge models of one energy scale to export"
        )
    before = torch.get_default_dtype()
    torch.set_default_dtype(potential.dtype)
    try:
        references = potential.references.tolist()
        network: VendorObject = build_network(
            potential.hyper.arguments, species, references=references, scale=scale
        )
    finally:
        torch.set_default_dtype(before)
    linear = network.node_embedding.linear
    linear.weight.copy_(potential.embedding[0].flatten() / linear.instructions[0].path_weight)
    own = dict(potential.named_parameters())
    for t, parts in enumerate(zip(network.interactions, network.products, strict=True)):
        for part, module in zip(("interaction", "product"), parts, strict=True):
            for name, value in module.named_parameters():
                _write_weight(module, name, value, own[f"stages.{t}.module.{part}.{name}"])
    for i, readout in enumerate(network.readouts):
        for name, value in readout.named_parameters():
            weight = own[f"readout.module.{i}.{name}"]
            value.copy_(weight if name.startswith("linear_1") else weight / scale)
    return network.cpu().eval()


def _write_weight(module: VendorObject, name: str, value: Tensor, weight: Tensor) -> None:
    """Set a parameter of an interaction or a product to what the potential's is."""
    layer = name.removesuffix(".weight")
    if layer in TABLES:
        value.copy_(weight.flatten() / module.get_submodule(layer).instructions[0].path_weight)
    elif weight.shape == value.shape:
        value.copy_(weight)
    else:
        write_product(module.get_submodule(layer), weight)


def _own_weight(module: VendorObject, name: str, value: Tensor, order: Tensor) -> Tensor:
    """What a parameter of an interaction or a product becomes."""
    if name == "skip_tp.weight" and isinstance(module.skip_tp, FullyConnectedTensorProduct):
        return element_weights(module.skip_tp, torch.eye(len(order))[order])
    if name.removesuffix(".weight") in TABLES:
        return module.get_submodule(name.removesuffix(".weight"))(torch.eye(len(order))[order].to(value))
    if name.startswith("symmetric_contractions") and len(value) == len(order):
        return value[order]
    if name == "linear.weight" and hasattr(module, "avg_num_neighbors") and not hasattr(module, "density_fn"):
        return value / float(module.avg_num_neighbors)
    return value
