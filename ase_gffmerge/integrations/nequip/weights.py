"""Weights of a NequIP of the package ``nequip``: into a potential, and back into a checkpoint."""

from collections.abc import Iterator

import torch
from ase.data import chemical_symbols
from nequip.model import FullNequIPGNNModel
from torch import Tensor

from ase_gffmerge.errors import FileFormatError
from ase_gffmerge.integrations.base import VendorObject
from ase_gffmerge.integrations.conversion import per_element, rows_of_elements
from ase_gffmerge.integrations.nequip.io import MODEL, ZBL_TARGET, layers_of
from ase_gffmerge.integrations.nequip.model import NequIPPackage, nested_builders
from ase_gffmerge.models.layers.e3nn_compat import package_mode
from ase_gffmerge.models.layers.linear import element_weights, write_product

TRAINING_MODULE = "nequip.train.NequIPLightningModule"
"""The package's class that reads a checkpoint."""

TOLERANCE = 1e-5
"""Of the weights of a self-connection, relative to the largest: above round-off in float32."""


@torch.no_grad()
def copy_weights(potential: NequIPPackage, network: VendorObject, species: tuple[int, ...]) -> None:
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
    table = network.type_embed.embed_module.weight[rows_of_elements(species)].double()
    potential.embedding.copy_(table[None])
    own = dict(potential.named_parameters())
    for name, value, product in _parameters(network):
        own[name].copy_(value if product is None else element_weights(product, table))
    scaling = network.per_type_energy_scale_shift
    if scaling.has_scales:
        own["readout.scale"].copy_(per_element(scaling.scales, species))
    if scaling.has_shifts:
        potential.references.copy_(per_element(scaling.shifts, species))


@torch.no_grad()
def vendor_model(potential: NequIPPackage) -> VendorObject:
    """The package's model with the potential's weights; undoes :func:`copy_weights`.

    A self-connection is the product of the features with the embedding of the element: of the weights that give what it has
    to be for every element, the smallest are taken.

    Raises
    ------
    FileFormatError
        When no weights do, as elements are too many or too much alike.
    """
    settings = ("_target_", "seed", "model_dtype")
    arguments = {key: value for key, value in _builder(potential).items() if key not in settings}
    with package_mode(potential.dtype), nested_builders():
        model: VendorObject = FullNequIPGNNModel(**arguments)
    own = {name: value.cpu().double() for name, value in potential.named_parameters()}
    table = own["embedding"][0]
    model.func.type_embed.embed_module.weight.copy_(table)
    for name, value, product in _parameters(model.func):
        if product is None:
            value.copy_(own[name])
        else:
            write_product(product, _of_features(own[name], table, dtype=potential.dtype))
    return model


def _of_features(weights: Tensor, table: Tensor, *, dtype: torch.dtype) -> Tensor:
    """Weights (n_features, size) that give, times the embedding (n_species, n_features), the ``weights`` of the elements."""
    found = torch.linalg.pinv(table) @ weights
    difference = (table @ found.to(dtype).double() - weights).abs().max()
    if not difference <= TOLERANCE * weights.abs().max():
        raise FileFormatError(
            f"the potential has self-connections of their own for its {len(table)} elements, which NequIP makes of the "
            f"{table.shape[1]} features of its embedding; they are too few, or too much alike: save it as .safetensors, or "
            "merge models with a larger type_embed_num_features"
        )
    return found


def vendor_checkpoint(potential: NequIPPackage) -> dict[str, VendorObject]:
    """What the package loads: weights, and the configuration that builds a model for them, of plain values.

    Raises
    ------
    FileFormatError
        See :func:`vendor_model`.
    """
    import lightning
    from nequip.utils import get_current_code_versions

    state = vendor_model(potential).state_dict(prefix=MODEL.removesuffix("func."))
    return {
        "state_dict": {**state, "run_stage": torch.zeros(1, dtype=torch.long)},
        "hyper_parameters": {
            "model": _builder(potential),
            "num_datasets": {"train": 1, "val": 0, "test": 0, "predict": 0},
            "info_dict": {
                "versions": get_current_code_versions(verbose=False),
                "training_module": {"_target_": TRAINING_MODULE},
            },
        },
        "pytorch-lightning_version": lightning.__version__,
    }


def _builder(potential: NequIPPackage) -> dict[str, VendorObject]:
    """The package's function that builds such a model, and its arguments."""
    arguments = potential.hyper.arguments
    names = [chemical_symbols[z] for z in potential.species]
    scales = potential.get_parameter("readout.scale").tolist()
    repulsion = None
    if zbl := arguments.pop("zbl", None):
        own = {"units": zbl["units"], "polynomial_cutoff_p": zbl["power"]}
        repulsion = {"_target_": ZBL_TARGET, "chemical_species": names, **own}
    return {
        "_target_": "nequip.model.FullNequIPGNNModel",
        "seed": 0,
        "model_dtype": str(potential.dtype).removeprefix("torch."),
        "type_names": names,
        "per_type_energy_scales": dict(zip(names, scales, strict=True)),
        "per_type_energy_shifts": dict(zip(names, potential.references.tolist(), strict=True)),
        "pair_potential": repulsion,
        **arguments,
    }


def _parameters(network: VendorObject) -> Iterator[tuple[str, Tensor, VendorObject]]:
    """The network's parameters under the potential's names, and the tensor product with elements that one belongs to.

    Those of the embedding and of the energy scales and shifts are left out.
    """
    for block, layer in enumerate(layers_of(network)):
        for name, value in layer.named_parameters():
            yield f"stages.{block}.module.{name}", value, layer.conv.sc if name == "conv.sc.weight" else None
    for name, value in network.per_atom_energy_readout.mlp_module.named_parameters():
        yield f"readout.module.{name}", value, None
