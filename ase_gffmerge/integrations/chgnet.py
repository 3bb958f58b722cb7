"""CHGNet (Deng et al., doi:10.1038/s42256-023-00716-3): checkpoints of its trainer in, and out.

The package ``chgnet`` is needed for its pretrained weights alone; a checkpoint is read without it.
"""

from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from ase_gffmerge.errors import FileFormatError, first_line
from ase_gffmerge.integrations.base import Adapter, ConvertedModel, VendorObject, load_checkpoint
from ase_gffmerge.models import Potential
from ase_gffmerge.models.chgnet import CHGNet, CHGNetHyper

N_ELEMENTS = 94
"""CHGNet knows hydrogen to plutonium."""

PRETRAINED = {"0.3.0": "PBE and PBE+U of the Materials Project", "r2scan": "r2SCAN of the Materials Project"}
"""Names of weights that come with the package, and what they were trained on."""

TENSORS = "torch.save(model.as_dict(), FILE)"
"""Saves a model without code."""

REQUIRED: dict[str, VendorObject] = {
    "update_bond": True,
    "update_angle": True,
    "mlp_first": True,
    "non_linearity": "silu",
    "gMLP_norm": "layer",
    "readout_norm": "layer",
    "conv_norm": None,
    "mlp_out_bias": False,
    "angle_layer_hidden_dim": 0,
}
"""Arguments that have to be as in version 0.3.0; those that a checkpoint leaves out have these values by default."""


class CHGNetAdapter(Adapter):
    """Reads and writes checkpoints of CHGNet."""

    vendor, models, package = "chgnet", "CHGNet", ""
    shipped = tuple(PRETRAINED)
    architectures: ClassVar[dict[str, str]] = {CHGNet.architecture: "ase_gffmerge.models.chgnet:CHGNet"}

    def read(self, source: VendorObject, *, trust: bool = False) -> ConvertedModel:
        """Convert a ``CHGNet``, a checkpoint of its trainer, or a name in :data:`PRETRAINED`.

        Raises
        ------
        FileFormatError
            For files that hold no CHGNet, or one of another kind than version 0.3.0.
        """
        if isinstance(source, str | Path):
            name = str(source)
            path = pretrained(name) if name in PRETRAINED and not Path(name).exists() else Path(name)
            content = load_checkpoint(
                path, trust=trust, source=f"chgnet:{source}", tensors=TENSORS, names=PRETRAINED
            )
            origin, theory = str(path), PRETRAINED.get(name, "unknown")
        else:
            content, origin, theory = source, "the CHGNet given", "unknown"
        if hasattr(content, "as_dict"):
            content = content.as_dict()
        elif not isinstance(content, dict):
            raise FileFormatError(
                f"a {type(source).__name__} is no CHGNet; give a checkpoint's path, one of {', '.join(PRETRAINED)}, or a "
                "chgnet.model.CHGNet"
            )
        return _convert(content.get("model", content), origin, theory)

    def vendor_content(self, potential: Potential) -> dict[str, dict[str, VendorObject]]:
        """What ``CHGNet.from_file`` loads."""
        assert isinstance(potential, CHGNet)
        arguments = _vendor_arguments(potential.hyper)
        return {"model": {"state_dict": _vendor_state(potential), "model_args": arguments}}


ADAPTER = CHGNetAdapter()


def pretrained(name: str) -> Path:
    """File of the pretrained weights in the installed package."""
    spec = find_spec("chgnet")
    if spec is None or not spec.submodule_search_locations:
        raise FileFormatError(
            f"chgnet:{name} names weights that come with the package chgnet, which is not installed; pip install chgnet"
        )
    folder = Path(spec.submodule_search_locations[0]) / "pretrained" / name
    if not (files := sorted(folder.glob("*.pth.tar"))):
        raise FileFormatError(
            f"the installed package chgnet has no weights {name!r}; install a newer one (pip install -U chgnet)"
        )
    return files[0]


def _convert(content: Mapping[str, VendorObject], origin: str, theory: str) -> ConvertedModel:
    """Potential of a dictionary with ``state_dict`` and ``model_args``."""
    try:
        state, arguments = dict(content["state_dict"]), dict(content["model_args"])
        hyper = _hyper(arguments, state)
        with torch.random.fork_rng(devices=[]):
            potential = CHGNet(hyper, tuple(range(1, N_ELEMENTS + 1)))
        if "composition_model.fc.weight" in state:
            potential.references.copy_(state["composition_model.fc.weight"].flatten())
        own = {ours: state[theirs] for ours, theirs in _names(hyper)}
        own["embedding"] = own["embedding"][None]
        potential.load_state_dict(own | {"references": potential.references})
    except FileFormatError as error:
        raise FileFormatError(f"{origin}: {error}") from None
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise FileFormatError(
            f"{origin} holds no CHGNet of version 0.3.0's kind ({first_line(error)}); give what CHGNet's trainer saves"
        ) from None
    return ConvertedModel(
        potential=potential.eval().requires_grad_(False),
        vendor="chgnet",
        version=str(arguments.get("version") or ""),
        level_of_theory=theory,
        notes=("magnetic moments are carried along, not served",),
    )


def _hyper(arguments: Mapping[str, VendorObject], state: Mapping[str, Tensor]) -> CHGNetHyper:
    for key, value in REQUIRED.items():
        if arguments.get(key, value) != value:
            raise FileFormatError(
                f"its {key} is {arguments[key]!r}, only {value!r} can be read: models of version 0.3.0 and those fine-tuned "
                "from it; fine-tune again from 0.3.0"
            )
    channels, layers = arguments["atom_fea_dim"], list(arguments["mlp_hidden_dims"])
    widths = {channels, *layers, *(arguments[f"{kind}_fea_dim"] for kind in ("bond", "angle"))}
    widths |= {arguments[f"{kind}_conv_hidden_dim"] for kind in ("atom", "bond")}
    if len(widths) > 1:
        raise FileFormatError(
            f"its layers have different widths {sorted(widths)}; only one width for all can be read"
        )
    if "composition_model.fc.weight" not in state and arguments.get("composition_model"):
        raise FileFormatError(
            "its composition model is not a table of energies per element, and cannot be read"
        )
    return CHGNetHyper(
        cutoff=float(arguments["atom_graph_cutoff"]),
        channels=channels,
        n_blocks=arguments["n_conv"],
        n_radial=arguments["num_radial"],
        bond_cutoff=float(arguments["bond_graph_cutoff"]),
        n_angular=arguments["num_angular"],
        envelope_power=arguments["cutoff_coeff"],
        readout_layers=len(layers),
    )


def _names(hyper: CHGNetHyper) -> Iterator[tuple[str, str]]:
    """Names of the weights here and there."""
    yield "embedding", "atom_embedding.embedding.weight"
    expansion = "bond_basis_expansion.rbf_expansion"
    yield "stages.0.radial.frequencies", f"{expansion}_ag.frequencies"
    yield "stages.0.radial_short.frequencies", f"{expansion}_bg.frequencies"
    yield "stages.0.angular.frequencies", "angle_basis_expansion.fourier_expansion.frequencies"
    yield "stages.0.bonds.weight", "bond_embedding.weight"
    yield "stages.0.atom_weights.weight", "bond_weights_ag.weight"
    yield "stages.0.bond_weights.weight", "bond_weights_bg.weight"
    yield "stages.0.angles.weight", "angle_embedding.weight"
    last = hyper.n_blocks - 1
    for block in range(hyper.n_blocks):
        ours = 3 * block + (1 if block < last or not last else 0)
        yield from _gated(f"stages.{ours}", f"atom_conv_layers.{block}", "twoBody_atom", convolution=True)
    for block in range(last):
        ours_bond = f"stages.{3 * block + 2}"
        yield from _gated(ours_bond, f"bond_conv_layers.{block}", "twoBody_bond", convolution=True)
        ours_angle = f"stages.{3 * block + 3}" if block < last - 1 else "unused.angles"
        yield from _gated(ours_angle, f"angle_layers.{block}", "twoBody_bond", convolution=False)
    yield from _with_bias("unused.moments", "site_wise")
    yield from _with_bias("readout.norm", "readout_norm")
    for layer in range(hyper.readout_layers):
        yield from _with_bias(f"readout.hidden.{layer}", f"mlp.layers.{2 * layer}")
    yield from _with_bias("readout.out", f"mlp.layers.{2 * hyper.readout_layers + 1}")


def _gated(ours: str, theirs: str, gated: str, *, convolution: bool) -> Iterator[tuple[str, str]]:
    for part in ("core", "gate"):
        network = f"{theirs}.{gated}.mlp_{part}.layers"
        if convolution:
            yield from _with_bias(f"{ours}.gated.{part}_hidden", f"{network}.0")
        yield from _with_bias(f"{ours}.gated.{part}", f"{network}.{3 if convolution else 1}")
    yield from _with_bias(f"{ours}.gated.core_norm", f"{theirs}.{gated}.bn1")
    yield from _with_bias(f"{ours}.gated.gate_norm", f"{theirs}.{gated}.bn2")
    if convolution:
        yield f"{ours}.out.weight", f"{theirs}.mlp_out.layers.1.weight"


def _with_bias(ours: str, theirs: str) -> Iterator[tuple[str, str]]:
    for kind in ("weight", "bias"):
        yield f"{ours}.{kind}", f"{theirs}.{kind}"


def _vendor_state(potential: CHGNet) -> dict[str, Tensor]:
    """State dictionary under the vendor's names; rows of elements that the potential does not know are zero."""
    own = {name: value.detach().cpu().float() for name, value in potential.state_dict().items()}
    rows = torch.tensor(potential.species) - 1
    state = {theirs: own[ours] for ours, theirs in _names(potential.hyper)}
    table = torch.zeros(N_ELEMENTS, potential.hyper.channels).index_copy(0, rows, own["embedding"][0])
    references = torch.zeros(N_ELEMENTS).index_copy(0, rows, own["references"])
    return state | {"atom_embedding.embedding.weight": table, "composition_model.fc.weight": references[None]}


def _vendor_arguments(hyper: CHGNetHyper) -> dict[str, VendorObject]:
    widths = {
        f"{kind}_dim": hyper.channels
        for kind in ("atom_fea", "bond_fea", "angle_fea", "atom_conv_hidden", "bond_conv_hidden")
    }
    return {
        **REQUIRED,
        **widths,
        "composition_model": "MPtrj",
        "num_radial": hyper.n_radial,
        "num_angular": hyper.n_angular,
        "n_conv": hyper.n_blocks,
        "mlp_hidden_dims": [hyper.channels] * hyper.readout_layers,
        "is_intensive": True,
        "atom_graph_cutoff": hyper.cutoff,
        "bond_graph_cutoff": hyper.bond_cutoff,
        "cutoff_coeff": hyper.envelope_power,
        "learnable_rbf": True,
    }
