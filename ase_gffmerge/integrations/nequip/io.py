"""Files of the package ``nequip``: checkpoints, read without executing code where that is possible, and packages."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ase_gffmerge.errors import FileFormatError, first_line
from ase_gffmerge.integrations.base import TRUST, VendorObject, load_checkpoint
from ase_gffmerge.models.layers import package_mode

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
            f"{path} is a package of nequip, which holds code that would be executed; for packages of people whom you trust "
            f"there is {TRUST.format(source=f'nequip:{path}')}"
        )
    return _from_checkpoint(load_checkpoint(path, trust=False, source=f"nequip:{path}"), path)


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


def _from_checkpoint(content: VendorObject, path: Path) -> nn.Module:
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
            f"{path} holds a model that {module}.{builder} makes of other files or of other parts; to let nequip load it "
            f"there is, for people whom you trust, {TRUST.format(source=f'nequip:{path}')}"
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
