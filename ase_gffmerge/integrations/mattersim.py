"""MatterSim (Yang et al., arXiv 2405.04967) of the package ``mattersim``, version 1: checkpoints (``.pth``).

The package is not needed: what it saves are tensors and arguments, which
:class:`~ase_gffmerge.models.m3gnet.MatterSim` takes.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from ase_gffmerge.errors import FileFormatError, first_line
from ase_gffmerge.integrations.base import Adapter, ConvertedModel, VendorObject, load_checkpoint
from ase_gffmerge.models import Potential, build_potential
from ase_gffmerge.models.m3gnet import MatterSim

ARGUMENTS = {
    "cutoff": "cutoff",
    "threebody_cutoff": "three_body_cutoff",
    "units": "channels",
    "num_blocks": "n_blocks",
    "max_n": "n_radial",
}
"""Names of its arguments, and of the hyper-parameters here; ``max_l`` and ``max_z`` are one more and the last element."""

DEFAULTS = {
    "cutoff": 5.0,
    "threebody_cutoff": 4.0,
    "units": 128,
    "num_blocks": 4,
    "max_n": 4,
    "max_l": 4,
    "max_z": 94,
}
"""What a file means that leaves them out."""

EMBEDDING = "atom_embedding.mlp.0.linear.weight"
"""Name of the table (units, max_z + 1) of elements."""

NORMALIZER = {"readout.scale": "normalizer.scale", "references": "normalizer.shift"}
"""Names of energies by atomic number: here, and there."""

CONSTANTS = ("rbf.", "sbf.")
"""Beginnings of the names of what is computed from the arguments."""


class MatterSimAdapter(Adapter):
    """Reads and writes potentials of ``mattersim``."""

    vendor, models, package = "mattersim", "MatterSim", ""
    architectures: ClassVar[dict[str, str]] = {MatterSim.architecture: "ase_gffmerge.models.m3gnet:MatterSim"}

    def read(self, source: VendorObject, *, trust: bool = False) -> ConvertedModel:
        """Convert a checkpoint, or a ``MatterSimCalculator``, ``Potential`` or its network in memory.

        Raises
        ------
        FileFormatError
            For files and objects that hold no M3GNet of MatterSim, or one with parts that are not known here.
        """
        if isinstance(source, str | Path):
            content = load_checkpoint(Path(source), trust=trust, source=f"mattersim:{source}")
            origin = str(source)
        else:
            network: VendorObject = getattr(source, "potential", source)
            network = getattr(network, "model", network)
            if not hasattr(network, "model_args") or not hasattr(network, "state_dict"):
                raise FileFormatError(
                    f"a {type(source).__name__} is no model of MatterSim; give a checkpoint (.pth), a "
                    "MatterSimCalculator or a mattersim.forcefield.potential.Potential"
                )
            content = {
                "model_name": "m3gnet",
                "model_args": network.model_args,
                "model": network.state_dict(),
            }
            origin = "the model given"
        try:
            if (name := str(content["model_name"])).lower() != "m3gnet":
                raise FileFormatError(f"a {name} is not read; the M3GNet of MatterSim is")
            potential = _convert({**DEFAULTS, **content["model_args"]}, content["model"])
        except FileFormatError as error:
            raise FileFormatError(f"{origin}: {error}") from None
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise FileFormatError(
                f"{origin} holds no M3GNet of MatterSim 1 ({first_line(error)}); give what Potential.save wrote"
            ) from None
        return ConvertedModel(potential=potential, vendor=self.vendor, version="1")

    def vendor_content(self, potential: Potential) -> dict[str, VendorObject]:
        """A checkpoint that ``MatterSimCalculator.from_checkpoint`` loads, in float32, without the state of a training."""
        assert isinstance(potential, MatterSim)
        rows, own = list(potential.species), {k: x.detach().cpu() for k, x in potential.state_dict().items()}
        state = {theirs: own[ours].clone().float() for ours, theirs in _names(potential)}
        state[EMBEDDING] = torch.zeros(potential.hyper.channels, rows[-1] + 1)
        state[EMBEDDING][:, rows] = own["embedding"][0].float().T
        for (ours, theirs), others in zip(NORMALIZER.items(), (1.0, 0.0), strict=True):
            state[theirs] = torch.full((rows[-1] + 1,), others)
            state[theirs][rows] = own[ours].float()
        hyper = potential.hyper
        arguments = {theirs: getattr(hyper, ours) for theirs, ours in ARGUMENTS.items()}
        arguments |= {"max_l": hyper.l_max + 1, "max_z": rows[-1]}
        return {"model_name": "m3gnet", "model": state, "model_args": arguments}


ADAPTER = MatterSimAdapter()


def _convert(arguments: Mapping[str, VendorObject], state: Mapping[str, Tensor]) -> Potential:
    """Potential of a network's arguments and weights, for the elements whose embedding is not zero."""
    table = state[EMBEDDING]
    species = tuple(int(z) for z in table.any(dim=0).nonzero().flatten() if z > 0)
    hyper = {ours: arguments[theirs] for theirs, ours in ARGUMENTS.items()}
    lengths = {name: float(hyper[name]) for name in ("cutoff", "three_body_cutoff")}
    with torch.random.fork_rng(devices=[]):
        potential = build_potential(
            MatterSim.architecture, {**hyper, **lengths, "l_max": arguments["max_l"] - 1}, species
        )
    potential.to(table.dtype)
    names = dict(_names(potential))
    known = {*names.values(), EMBEDDING, *NORMALIZER.values()}
    if unknown := [name for name in state if name not in known and not name.startswith(CONSTANTS)]:
        raise FileFormatError(f"it has parts that are not known here: {', '.join(unknown[:3])}; leave it out")
    rows = list(species)
    own = {ours: state[theirs] for ours, theirs in names.items()}
    own |= {ours: state[theirs][rows] for ours, theirs in NORMALIZER.items()}
    own["embedding"] = table.T[rows][None]
    potential.load_state_dict(own)
    return potential.eval().requires_grad_(False)


def _names(potential: Potential) -> Iterator[tuple[str, str]]:
    """Names of the weights here and there, but for those of elements."""
    for ours, theirs in _layers(potential.hyper.n_blocks):
        for name, _ in potential.get_submodule(ours).named_parameters():
            yield f"{ours}.{name}", f"{theirs}.linear.{name}"


def _layers(n_blocks: int) -> Iterator[tuple[str, str]]:
    yield "stages.0.edges", "edge_encoder.mlp.0"
    for block in range(n_blocks):
        three, conv = f"stages.{2 * block + 1}", f"stages.{2 * block + 2}"
        theirs = f"graph_conv.{block}"
        yield f"{three}.atoms", f"{theirs}.three_body.atom_mlp"
        yield from _gated(f"{three}.bonds", f"{theirs}.three_body.edge_gate_mlp", 1)
        for name in ("edge", "atom"):
            yield from _gated(f"{conv}.{name}_network", f"{theirs}.gated_mlp_{name}", 2)
            yield f"{conv}.{name}_weights", f"{theirs}.edge_layer_{name}"
    yield from _gated("readout.network", "final", 3)


def _gated(ours: str, theirs: str, depth: int) -> Iterator[tuple[str, str]]:
    for here, there in (("core", "g"), ("gate", "sigma")):
        for layer in range(depth):
            yield f"{ours}.{here}.{layer}", f"{theirs}.{there}.{layer}"
