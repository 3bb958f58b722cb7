"""Weights of a SevenNet of the package ``sevenn``: into a potential, and back into a checkpoint."""

from collections.abc import Iterator
from importlib.metadata import version

import torch
from ase.data import chemical_symbols
from torch import Tensor, nn

from ase_gffmerge.integrations.base import VendorObject
from ase_gffmerge.integrations.conversion import per_element, rows_of_elements
from ase_gffmerge.integrations.sevennet.model import BLOCK, SevenNetPackage, build_network
from ase_gffmerge.models.layers.linear import element_weights, write_product


@torch.no_grad()
def copy_weights(potential: SevenNetPackage, network: VendorObject, species: tuple[int, ...]) -> None:
    """Set all weights: rows of elements in the order of atomic numbers, self-connections per element.

    Parameters
    ----------
    potential
        Written in place.
    network
        The package's chain of modules.
    species
        Atomic numbers in the order of its types.
    """
    one_hot = torch.eye(len(species))[rows_of_elements(species)]
    linear, rescale = network.onehot_to_feature_x.linear, network.rescale_atomic_energy
    potential.embedding.copy_(linear(one_hot.to(linear.weight))[None])
    own = dict(potential.named_parameters())
    for name, value, product in _parameters(network, potential.hyper.n_blocks):
        own[name].copy_(value if product is None else element_weights(product, one_hot))
    own["readout.scale"].copy_(per_element(rescale.scale, species))
    potential.references.copy_(per_element(rescale.shift, species))


@torch.no_grad()
def vendor_network(potential: SevenNetPackage) -> VendorObject:
    """The package's chain of modules with the potential's weights in float32; undoes :func:`copy_weights`."""
    network = build_network(potential.hyper.arguments, potential.species)
    linear, rescale = network.onehot_to_feature_x.linear, network.rescale_atomic_energy
    linear.weight.copy_(potential.embedding[0].flatten() / linear.instructions[0].path_weight)
    own = {name: value.cpu().double() for name, value in potential.named_parameters()}
    for name, value, product in _parameters(network, potential.hyper.n_blocks):
        if product is None:
            value.copy_(own[name])
        else:
            write_product(product, own[name])
    rescale.scale.copy_(own["readout.scale"])
    rescale.shift.copy_(potential.references)
    return network.float()


def vendor_checkpoint(potential: SevenNetPackage) -> dict[str, VendorObject]:
    """What the package loads: weights, and the configuration that builds a network for them, of plain values."""
    network, species = vendor_network(potential), potential.species
    config = potential.hyper.arguments | {
        "version": version("sevenn"),
        "dtype": "single",
        "chemical_species": [chemical_symbols[z] for z in species],
        "_chemical_species_by_atomic_number": list(species),
        "_number_of_species": len(species),
        "_type_map": {z: i for i, z in enumerate(species)},
        "shift": network.rescale_atomic_energy.shift.tolist(),
        "scale": network.rescale_atomic_energy.scale.tolist(),
    }
    return {"config": config, "model_state_dict": dict(network.state_dict())}


def _parameters(network: VendorObject, n_blocks: int) -> Iterator[tuple[str, Tensor, VendorObject]]:
    """The network's parameters under the potential's names, and the tensor product with elements that one belongs to.

    Those of the embedding and of the energy scales and shifts are left out.
    """
    for name, value in network.edge_embedding.basis_function.named_parameters():
        yield f"stages.0.module.basis.{name}", value, None
    for block in range(n_blocks):
        for part in BLOCK:
            module = network.get_submodule(f"{block}_{part}")
            for name, value in module.named_parameters():
                product = module.fc_tensor_product if name == "fc_tensor_product.weight" else None
                yield f"stages.{block + 1}.module.{part}.{name}", value, product
    for name, value in _readout(network).named_parameters():
        yield f"readout.module.{name}", value, None


def _readout(network: VendorObject) -> nn.Module:
    if hasattr(network, "readout_FCN"):
        found: nn.Module = network.readout_FCN.fcn
        return found
    return nn.Sequential(network.reduce_input_to_hidden.linear, network.reduce_hidden_to_energy.linear)
