"""Models of the package ``mace-torch`` in memory and in files.

Weights of a MACE of the package ``mace-torch``: into a potential, and back into the package's model.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from e3nn.o3 import FullyConnectedTensorProduct
from torch import Tensor, nn

from ase_gffmerge.errors import FileFormatError, first_line
from ase_gffmerge.integrations.base import VendorObject, load_checkpoint, per_element, rows_of_elements
from ase_gffmerge.integrations.mace.model import TABLES, MACEPackage, build_network
from ase_gffmerge.models.layers import package_mode
from ase_gffmerge.models.layers.linear import element_weights, write_product

READ = "give a .model file, a MACECalculator, or a MACE or ScaleShiftMACE of mace.modules"

SAFE = (
    "torch.save({'config': mace.tools.scripts_utils.extract_config_mace_model(model), 'state_dict': model.state_dict()}, "
    "path) where the model is trusted, which is read without code"
)


def load_network(path: Path, *, trust: bool) -> VendorObject:
    """The model of a file.

    Raises
    ------
    FileFormatError
        When there is no such file, it holds code and is not trusted, or no model.
    """
    from e3nn.o3 import Irrep, Irreps
    from e3nn.o3._irreps import _MulIr
    from mace.modules import gate_dict, interaction_classes, readout_classes

    if trust and path.is_file():
        return _unpickled(path)
    named = [*interaction_classes.values(), *readout_classes.values(), *filter(None, gate_dict.values())]
    try:
        with torch.serialization.safe_globals([Irreps, Irrep, _MulIr, *named]):
            content = load_checkpoint(path, trust=False)
    except FileFormatError:
        if not path.is_file():
            raise
        raise FileFormatError(
            f"{path} is not read: unless it is damaged, it is a pickled model, whose loading executes code from the file; "
            "pass trust=True to load_force_field, or --trust to gffmerge convert, for files of your own, or save "
            f"{SAFE}"
        ) from None
    return _build(content, path)


def _unpickled(path: Path) -> VendorObject:
    """Whatever a trusted file holds; a dictionary is built."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=False)
    except Exception as error:  # code of the file can raise anything
        raise FileFormatError(f"{path} cannot be loaded: {first_line(error)}; write it again") from None
    return _build(content, path) if isinstance(content, dict) else content


def _build(content: Mapping[str, VendorObject], path: Path) -> nn.Module:
    """The model that a dictionary of configuration and weights describes."""
    from mace.modules import ScaleShiftMACE

    try:
        config, state = dict(content["config"]), content["state_dict"]
        if "error" in config:
            raise FileFormatError(f"{path}: {config['error']}; give the model itself")
        with package_mode(state["node_embedding.linear.weight"].dtype):
            network: nn.Module = ScaleShiftMACE(**config)
        network.load_state_dict(state)
    except FileFormatError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, AssertionError) as error:
        raise FileFormatError(
            f"{path} holds no MACE that this version of mace-torch can build ({first_line(error)}); save {SAFE}"
        ) from None
    return network


def find_network(source: VendorObject) -> tuple[VendorObject, int]:
    """Model and number of its head, of a calculator or a model.

    Raises
    ------
    FileFormatError
        When there is no model of a known class, several of them, or several heads and none is chosen.
    """
    network, head = source, None
    if hasattr(source, "models") and hasattr(source, "energy_units_to_eV"):
        if len(source.models) > 1:
            raise FileFormatError(
                f"the MACECalculator is a committee of {len(source.models)} models; give one of its models"
            )
        if (source.energy_units_to_eV, source.length_units_to_A) != (1.0, 1.0):
            raise FileFormatError("the MACECalculator converts units; a model in eV and Å is needed")
        network, head = source.models[0], getattr(source, "head", None)
    _require_known(network)
    heads = list(getattr(network, "heads", None) or ["Default"])
    if len(heads) == 1:
        return network, 0
    chosen = [
        i for i, name in enumerate(heads) if name == head or (head is None and name.lower() == "default")
    ]
    if len(chosen) != 1:
        raise FileFormatError(
            f"the MACE has the heads {', '.join(heads)}; choose one: give MACECalculator(models=model, head=...)"
        )
    return network, chosen[0]


def _require_known(network: VendorObject) -> None:
    """Raise for models with other parts than ours."""
    from e3nn.o3 import Linear
    from mace.modules import LinearReadoutBlock, NonLinearReadoutBlock, interaction_classes

    if type(network).__name__ not in ("MACE", "ScaleShiftMACE") or not hasattr(network, "interactions"):
        raise FileFormatError(f"a {type(network).__name__} is not read; {READ}")
    known = {
        "interactions": tuple(interaction_classes.values()),
        "readouts": (LinearReadoutBlock, NonLinearReadoutBlock),
    }
    for parts, classes in known.items():
        for part in getattr(network, parts):
            if type(part) not in classes:
                raise FileFormatError(
                    f"the MACE has a {type(part).__name__}, which is not read; leave it out"
                )
    if hasattr(network, "joint_embedding"):
        raise FileFormatError(
            "the MACE reads more than elements and places (embedding_specs), which is not read"
        )
    if type(network.node_embedding.linear) is not Linear or hasattr(network.interactions[0], "conv_fusion"):
        raise FileFormatError(
            "the MACE is accelerated by cuEquivariance or OpenEquivariance; give the one of e3nn"
        )


def single_head(network: VendorObject, head: int) -> VendorObject:
    """The model with one of its heads alone."""
    heads = list(getattr(network, "heads", None) or ["Default"])
    if len(heads) == 1:
        return network
    if type(network).__name__ != "ScaleShiftMACE":
        raise FileFormatError("a MACE with several heads is read if it is a ScaleShiftMACE")
    from mace.tools.scripts_utils import remove_pt_head

    with package_mode(network.node_embedding.linear.weight.dtype):
        return remove_pt_head(network, heads[head])


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
