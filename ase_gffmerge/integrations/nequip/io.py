"""Files of the package ``nequip``: checkpoints, read without executing code where that is possible, and packages.

Weights of a NequIP of the package ``nequip``: into a potential, and back into a checkpoint.
"""

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from ase.data import chemical_symbols
from nequip.model import FullNequIPGNNModel
from torch import Tensor, nn

from ase_gffmerge.errors import FileFormatError, first_line
from ase_gffmerge.integrations.base import VendorObject, load_checkpoint, per_element, rows_of_elements
from ase_gffmerge.integrations.nequip.model import NequIPPackage, nested_builders
from ase_gffmerge.models.layers import package_mode
from ase_gffmerge.models.layers.linear import element_weights, write_product

BUILDERS = ("NequIPGNNModel", "PresetNequIPGNNModel", "FullNequIPGNNModel")
"""Functions of ``nequip.model`` whose models are read."""

ZBL_TARGET = "nequip.nn.pair_potential.ZBL"

MODEL = "model.sole_model.model.func."
"""Prefix of the network's parameters in a checkpoint."""

AVERAGE = "ema.ema_weight_"
"""Prefix of the running means of the parameters, which are numbered."""


def find_network(model: VendorObject) -> nn.Module:
    """The chain of modules inside a model.

    Raises
    ------
    FileFormatError
        When there is none.
    """
    if isinstance(model, nn.Module):
        for module in model.modules():
            if hasattr(module, "layer0_convnet") and hasattr(module, "type_embed"):
                return module
    raise FileFormatError(
        f"a {type(model).__name__} is no NequIP model; give the model that nequip's load_saved_model or a builder returned, "
        "a checkpoint or a package (Allegro models are not read)"
    )


def layers_of(network: VendorObject) -> list[VendorObject]:
    """Interaction layers of a chain of modules."""
    return [module for name, module in network.named_children() if name.endswith("_convnet")]


def load_network(path: Path, *, trust: bool) -> nn.Module:
    """The chain of modules that a checkpoint or a package holds.

    Raises
    ------
    FileFormatError
        When there is no such file, it holds code and is not trusted, or no model.
    """
    package = path.name.endswith(".nequip.zip")
    if not path.exists():
        raise FileFormatError(f"there is no file {path}; check the path")
    if trust:
        from nequip.model.saved_models.load_utils import load_saved_model

        with _defaults_kept():
            return find_network(load_saved_model(path))
    if package:
        raise FileFormatError(
            f"{path} is a package of nequip, which holds code that would be executed; pass trust=True for packages of "
            "people whom you trust"
        )
    return _from_checkpoint(load_checkpoint(path, trust=False), path)


@contextmanager
def _defaults_kept() -> Iterator[None]:
    """Undo what the package does to the process: default type, random numbers, options of e3nn."""
    import e3nn
    from nequip.utils.global_state import set_global_state

    dtype, options = torch.get_default_dtype(), e3nn.get_optimization_defaults()
    states = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng():
        try:
            set_global_state()
            yield
        finally:
            torch.set_default_dtype(dtype)
            e3nn.set_optimization_defaults(**options)
            random.setstate(states[0])
            np.random.set_state(states[1])  # noqa: NPY002


def _from_checkpoint(content: Mapping[str, VendorObject], path: Path) -> nn.Module:
    """Build the network that a checkpoint describes, and load its weights: their running mean if there is one."""
    import nequip.model

    from ase_gffmerge.integrations.nequip.model import nested_builders

    try:
        config, state = dict(content["hyper_parameters"]["model"]), content["state_dict"]
        module, _, builder = str(config.pop("_target_")).rpartition(".")
        dtype = state[MODEL + "type_embed.embed_module.weight"].dtype
    except (KeyError, TypeError, AttributeError):
        raise FileFormatError(f"{path} is no checkpoint of nequip-train; give its .ckpt file") from None
    if module != "nequip.model" or builder not in BUILDERS or not _is_plain(config.get("pair_potential")):
        raise FileFormatError(
            f"{path} holds a model that {module}.{builder} makes of other files or of other parts; pass trust=True to let "
            "nequip load it, for files whose authors you trust"
        )
    arguments = {
        key: value for key, value in config.items() if key not in ("seed", "model_dtype", "compile_mode")
    }
    try:
        with package_mode(dtype), nested_builders():
            network: nn.Module = getattr(nequip.model, builder)(**arguments).func
        with torch.no_grad():
            for name, value in network.state_dict(keep_vars=True).items():
                value.copy_(state[MODEL + name])
            for i, parameter in enumerate(network.parameters() if f"{AVERAGE}0" in state else ()):
                parameter.copy_(state[f"{AVERAGE}{i}"])
    except (KeyError, TypeError, RuntimeError, AssertionError) as error:
        raise FileFormatError(
            f"{path} does not fit this version of nequip ({first_line(error)}); install the version that wrote it"
        ) from None
    return network


def _is_plain(pair: VendorObject) -> bool:
    """Whether a pair potential is none or the repulsion of plain values; the builder makes whatever it names."""
    if not pair:
        return True
    values = {key: value for key, value in pair.items() if key != "_target_"}
    words = [
        word for value in values.values() for word in (value if isinstance(value, list | tuple) else [value])
    ]
    return (
        pair.get("_target_") == ZBL_TARGET
        and not any(key.startswith("_") for key in values)
        and all(isinstance(word, str | float | int) for word in words)
    )


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
