"""Models of the package ``mace-torch`` in memory and in files."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from ase_gffmerge.errors import FileFormatError, first_line
from ase_gffmerge.integrations.base import TRUST, VendorObject, load_checkpoint
from ase_gffmerge.models.layers import package_mode

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
            content = load_checkpoint(path, trust=False, source=f"mace:{path}")
    except FileFormatError:
        if not path.is_file():
            raise
        raise FileFormatError(
            f"{path} is not read: unless it is damaged, it is a pickled model, whose loading executes code from the file; "
            f"for files of your own there is {TRUST.format(source=f'mace:{path}')}, or save {SAFE}"
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


def find_network(source: VendorObject, head: str | None = None) -> tuple[VendorObject, int]:
    """Model and number of its head; low-rank changes (LoRA) are added to the weights that they change.

    Raises
    ------
    FileFormatError
        When there is no model of a known class, several of them, or several heads and none of that name.
    """
    network = source
    if hasattr(source, "models") and hasattr(source, "energy_units_to_eV"):
        if len(source.models) > 1:
            raise FileFormatError(
                f"the MACECalculator is a committee of {len(source.models)} models; give one of its models"
            )
        if (source.energy_units_to_eV, source.length_units_to_A) != (1.0, 1.0):
            raise FileFormatError("the MACECalculator converts units; a model in eV and Å is needed")
        network, head = source.models[0], getattr(source, "head", None)
    network = _without_adapters(network)
    _require_known(network)
    heads = list(getattr(network, "heads", None) or ["Default"])
    if head is None and len(heads) == 1:
        return network, 0
    if head not in heads:
        raise FileFormatError(
            f"the MACE has the heads {', '.join(heads)}{f' and no {head}' if head else ''}; choose one, for example "
            f"mace:FILE#head={heads[-1]}, or MACECalculator(FILE, head={heads[-1]!r})"
        )
    return network, heads.index(head)


def _without_adapters(network: VendorObject) -> VendorObject:
    """The model with low-rank changes of its weights (LoRA) added to the weights."""
    try:
        from mace.modules import lora
    except ImportError:  # of versions that have none
        return network
    kinds = (lora.LoRADenseLinear, lora.LoRAFCLayer, lora.LoRAO3Linear)
    if not isinstance(network, nn.Module) or not any(isinstance(part, kinds) for part in network.modules()):
        return network
    return lora.merge_lora_weights(network, inplace=False)


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
