"""Weights of Orb in the vendor's state dictionaries and in our potentials."""

from collections.abc import Iterator, Mapping
from copy import deepcopy

import torch
from torch import Tensor, nn

from ase_gffmerge.integrations.base import VendorObject
from ase_gffmerge.integrations.orb.model import OrbPackage, OrbPackageHyper, build_network
from ase_gffmerge.models.layers.e3nn_compat import package_mode

EMBEDDING, REFERENCES = "model.atom_emb.embeddings.weight", "heads.energy.reference.linear.weight"


def hyper_of(state: Mapping[str, Tensor], **settings: VendorObject) -> OrbPackageHyper:
    """Hyper-parameters from the shapes of the weights.

    Parameters
    ----------
    state
        Of a conservative Orb v3.
    **settings
        Those that the shapes do not tell.

    Raises
    ------
    KeyError, TypeError, ValueError
        For other dictionaries and impossible settings.
    """
    encoder, head = "model._encoder._node_fn.mlp.NN-", "heads.energy.mlp.NN-"

    def hidden(prefix: str) -> int:
        return sum(key.startswith(prefix) and key.endswith(".weight") for key in state) - 1

    return OrbPackageHyper(
        channels=state[EMBEDDING].shape[1],
        n_blocks=sum(key.endswith("._receive_attn.weight") for key in state) + 1,
        mlp_width=state[f"{encoder}0.weight"].shape[0],
        mlp_depth=hidden(encoder),
        head_width=state[f"{head}0.weight"].shape[0],
        head_depth=hidden(head),
        confidence=any(key.startswith("heads.confidence.") for key in state),
        **settings,
    )


def network_of(hyper: OrbPackageHyper, state: Mapping[str, Tensor]) -> nn.Module:
    """The vendor's network with given weights.

    Raises
    ------
    RuntimeError
        When they do not fit.
    """
    with package_mode(state[EMBEDDING].dtype):
        network = build_network(hyper)
    network.load_state_dict(state)
    found: nn.Module = network.eval()
    return found


@torch.no_grad()
def copy_weights(potential: OrbPackage, state: Mapping[str, Tensor]) -> None:
    """Set all weights; mean and standard deviation of the labels go into the last layer."""
    rows = list(potential.species)
    potential.embedding.copy_(state[EMBEDDING][rows][None])
    potential.references.copy_(state[REFERENCES].flatten()[rows])
    for ours, theirs in _names(potential):
        potential.get_parameter(ours).copy_(state[theirs])
    last, (mean, deviation) = _last_layer(potential), _statistics(state)
    last.weight.mul_(deviation)
    last.bias.mul_(deviation).add_(mean)


@torch.no_grad()
def vendor_state(potential: OrbPackage) -> dict[str, Tensor]:
    """The reverse, with the mean and standard deviation of a new network; elements that are not known are zero."""
    with package_mode(potential.dtype):
        state: dict[str, Tensor] = dict(build_network(potential.hyper).state_dict())
    own = deepcopy(potential).cpu().double()
    last, (mean, deviation) = _last_layer(own), _statistics(state)
    last.bias.sub_(mean).div_(deviation)
    last.weight.div_(deviation)
    state |= {theirs: own.get_parameter(ours).data.to(potential.dtype) for ours, theirs in _names(own)}
    for name, rows in ((EMBEDDING, own.embedding[0]), (REFERENCES, own.references)):
        state[name] = torch.zeros_like(state[name])
        state[name][list(own.species)] = rows.to(state[name])
    unknown = () if own.hyper.confidence else ("heads.confidence.",)
    return {name: value for name, value in state.items() if not name.startswith(unknown)}


def _names(potential: OrbPackage) -> Iterator[tuple[str, str]]:
    """Names of the parameters here, but for embedding and references, and there."""
    modules = {
        "stages.0.module.encoder": "model._encoder",
        "readout.module": "heads.energy.mlp",
        "unused.decoder": "model._decoder",
    }
    for block in range(potential.hyper.n_blocks - 1):
        modules[f"stages.{block + 1}.module.network"] = f"model.gnn_stacks.{block}"
    if potential.hyper.confidence:
        modules["unused.confidence"] = "heads.confidence"
    for ours, theirs in modules.items():
        for name, _ in potential.get_submodule(ours).named_parameters():
            yield f"{ours}.{name}", f"{theirs}.{name}"


def _last_layer(potential: OrbPackage) -> nn.Linear:
    layer = potential.readout.get_submodule(f"module.NN-{potential.hyper.head_depth}")
    assert isinstance(layer, nn.Linear)
    return layer


def _statistics(state: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the labels (eV per atom) that the head was trained on."""
    mean, variance = (state[f"heads.energy.normalizer.bn.running_{what}"] for what in ("mean", "var"))
    return mean.double().squeeze(), variance.double().squeeze().sqrt()
