"""M3GNet and TensorNet of the package ``matgl``, version 4: folders of ``model.pt``, ``state.pt`` and ``model.json``.

The package is not needed: what it saves are tensors and arguments, which :mod:`ase_gffmerge.models.m3gnet` and
:mod:`ase_gffmerge.models.tensornet` take.
"""

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch
from ase.data import atomic_numbers as NUMBERS
from ase.data import chemical_symbols
from torch import Tensor

from ase_gffmerge.errors import FileFormatError, first_line
from ase_gffmerge.integrations.base import (
    Adapter,
    ConvertedModel,
    VendorObject,
    load_checkpoint,
    per_element,
    require_energies,
    rows_of_elements,
)
from ase_gffmerge.models import Potential, build_potential
from ase_gffmerge.models.m3gnet import M3GNet
from ase_gffmerge.models.tensornet import TensorNet

FILES = ("model.pt", "state.pt", "model.json")
"""What ``save`` writes and ``matgl.load_model`` reads."""

VERSION = 2
"""Of the classes M3GNet and TensorNet; files of the first, for the DGL backend, sum messages at the other end of an edge."""

ENERGIES: dict[str, VendorObject] = {
    "is_intensive": False,
    "include_state": False,
    "ntargets": 1,
    "task_type": "regression",
}
"""Arguments of networks that give energies of atoms alone."""

REQUIRED: dict[str, dict[str, VendorObject]] = {
    "M3GNet": {**ENERGIES, "rbf_type": "SphericalBessel", "use_phi": False},
    "TensorNet": ENERGIES,
}
"""Arguments that have to be as here, by the name of the class."""

DEFAULTS: dict[str, VendorObject] = {
    "is_intensive": True,
    "include_state": False,
    "ntargets": 1,
    "use_phi": False,
}
"""What a file means that leaves them out."""


class SavedNetwork(NamedTuple):
    """Class, arguments and weights of a network, and of the potential around it."""

    kind: str
    arguments: dict[str, VendorObject]
    state: dict[str, Tensor]
    scale: Tensor
    references: Tensor | None


class MatGLAdapter(Adapter):
    """Reads and writes potentials of ``matgl``."""

    vendor, models, package, files = "matgl", "MatGL", "", FILES
    architectures: ClassVar[dict[str, str]] = {
        M3GNet.architecture: "ase_gffmerge.models.m3gnet:M3GNet",
        TensorNet.architecture: "ase_gffmerge.models.tensornet:TensorNet",
    }

    def read(self, source: VendorObject, *, trust: bool = False) -> ConvertedModel:
        """Convert a folder that ``Potential.save`` wrote, or a ``matgl.apps.pes.Potential``.

        Raises
        ------
        FileFormatError
            For folders and objects that hold no M3GNet or TensorNet for energies, or one with parts that are not known here.
        """
        if isinstance(source, str | Path):
            arguments, state, kind = _load(Path(source), trust=trust)
            origin = str(source)
        elif hasattr(source, "_init_args") and hasattr(source, "state_dict"):
            state = {name: value.detach().cpu() for name, value in source.state_dict().items()}
            arguments, kind = dict(source._init_args), type(source).__name__
            origin = "the model given"
        else:
            raise FileFormatError(
                f"a {type(source).__name__} is no model of MatGL; give a folder with {', '.join(FILES)}, or a "
                "matgl.apps.pes.Potential"
            )
        try:
            potential = _convert(_network(kind, arguments, state))
        except FileFormatError as error:
            raise FileFormatError(f"{origin}: {error}") from None
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise FileFormatError(
                f"{origin} holds no M3GNet or TensorNet of matgl 4 ({first_line(error)}); load it with that version and "
                "save it again"
            ) from None
        return ConvertedModel(potential=potential, vendor=self.vendor, version="4")

    def vendor_content(self, potential: Potential) -> dict[str, VendorObject]:
        """Arguments and weights of the three files by their names; ``model.json`` as text."""
        kind = "M3GNet" if isinstance(potential, M3GNet) else "TensorNet"
        network = {
            "@class": kind,
            "@module": f"matgl.models._{kind.lower()}",
            "@model_version": VERSION,
            "init_args": _vendor_arguments(potential),
        }
        references = potential.references.detach().cpu()
        arguments = {
            "model": network,
            "data_mean": 0.0,
            "data_std": 1.0,
            "element_refs": references.tolist(),
            "calc_stresses": True,
        }
        own = {name: value.detach().cpu() for name, value in potential.state_dict().items()}
        state = {f"model.{theirs}": own[ours].clone() for ours, theirs in _names(potential)}
        state[f"model.{EMBEDDING[kind]}"] = own["embedding"][0].clone()
        state["element_refs.property_offset"] = references.to(potential.dtype)
        state |= {"data_mean": torch.tensor(0.0), "data_std": torch.tensor(1.0)}
        about = {
            "@class": "Potential",
            "@module": "matgl.apps._pes",
            "@model_version": 3,
            "metadata": None,
            "kwargs": arguments,
        }
        return dict(zip(FILES, (arguments, state, json.dumps(about, indent=4)), strict=True))

    def write(self, potential: Potential, path: Path) -> Path:
        """Write a folder that ``matgl.load_model`` loads, once it was read back; it replaces one of the same files.

        Raises
        ------
        FileFormatError
            When the potential has more than the format, what was written does not have its energies, or something else is
            there.
        """
        self.require_exportable(potential)
        content = self.vendor_content(potential)
        if path.exists() and not (path.is_dir() and {file.name for file in path.iterdir()} == set(FILES)):
            raise FileFormatError(
                f"{path} exists and is no model of MatGL, whose format is a folder; choose another name"
            )
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}", dir=path.parent))
        except OSError as error:
            raise FileFormatError(f"cannot write {path}: {error.strerror}; choose another folder") from None
        try:
            for name, value in content.items():
                if isinstance(value, str):
                    (temporary / name).write_text(value)
                else:
                    torch.save(value, temporary / name)
            require_energies(self.read_back(temporary, potential), potential)
            temporary.chmod(0o755)
            _move_into_place(temporary, path)
        except OSError as error:
            raise FileFormatError(f"cannot write {path}: {error.strerror}; choose another folder") from None
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return path


ADAPTER = MatGLAdapter()


def _move_into_place(new: Path, path: Path) -> None:
    """Give a folder its name; one of that name is deleted only then, and stays where that fails."""
    before = new.with_name(f"{new.name}.before")
    if path.exists():
        path.rename(before)
    try:
        new.rename(path)
    except OSError:
        if before.exists():
            before.rename(path)
        raise
    shutil.rmtree(before, ignore_errors=True)


EMBEDDING = {"M3GNet": "embedding.layer_node_embedding.weight", "TensorNet": "tensor_embedding.emb.weight"}
"""Names of the tables of elements."""


def _load(path: Path, *, trust: bool) -> tuple[dict[str, VendorObject], dict[str, Tensor], str]:
    """Arguments, weights and class of a saved model."""
    if not path.is_dir():
        what = f"{path} is a file" if path.exists() else f"there is no folder {path}"
        raise FileFormatError(
            f"{what}; give the folder with {', '.join(FILES)} that potential.save(FOLDER) wrote; published models are "
            "saved by matgl.load_model(NAME).save(FOLDER)"
        )
    arguments, state = (
        load_checkpoint(path / name, trust=trust, source=f"matgl:{path}") for name in ("model.pt", "state.pt")
    )
    try:
        kind = str(json.loads((path / "model.json").read_text())["@class"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FileFormatError(
            f"{path / 'model.json'} does not say what the model is ({first_line(error)}); save the model again"
        ) from None
    return dict(arguments), dict(state), kind


def _network(kind: str, arguments: dict[str, VendorObject], state: dict[str, Tensor]) -> SavedNetwork:
    """The network inside a potential, or one that was saved without."""
    scale, references = torch.ones(()), None
    if kind == "Potential":
        inner = arguments["model"]
        known = ("M3GNet", "TensorNet")
        if inner["@class"] in known and inner.get("@model_version", 0) != VERSION:
            raise FileFormatError(
                f"its {inner['@class']} has version {inner.get('@model_version', 0)}, only {VERSION}, of matgl 4, is read; "
                "train it again with that"
            )
        if arguments.get("calc_repuls"):
            raise FileFormatError("it has a nuclear repulsion (calc_repuls), which is not read; leave it out")
        if abs(float(state["data_mean"])) > 0:
            raise FileFormatError(
                f"it adds {float(state['data_mean']):.3g} eV (data_mean) to every structure, whatever its size: that is no "
                "sum over atoms; train with element_refs and without data_mean"
            )
        scale, references = state["data_std"], state.get("element_refs.property_offset")
        if references is not None and references.dim() > 1:
            raise FileFormatError("it has reference energies per state, which are not read")
        kind, arguments = inner["@class"], dict(inner["init_args"])
        state = {name.removeprefix("model."): x for name, x in state.items() if name.startswith("model.")}
    if kind not in REQUIRED:
        raise FileFormatError(f"a {kind} is not read; M3GNet and TensorNet are")
    for name, value in REQUIRED[kind].items():
        if arguments.get(name, DEFAULTS.get(name, value)) != value:
            raise FileFormatError(
                f"its {name} is {arguments.get(name, DEFAULTS.get(name))!r}, only {value!r} is read: models of potential "
                "energies"
            )
    return SavedNetwork(kind, arguments, state, scale, references)


def _convert(saved: SavedNetwork) -> Potential:
    """Potential of a network's arguments and weights; the scale of its energies goes into the readout's last layer."""
    symbols = list(saved.arguments["element_types"])
    species = tuple(NUMBERS[symbol] for symbol in symbols)
    table = saved.state[EMBEDDING[saved.kind]]
    hyper = (_m3gnet_hyper if saved.kind == "M3GNet" else _tensornet_hyper)(saved.arguments)
    if "exponent" in hyper:  # MatGL has it in the precision of the weights
        hyper["exponent"] = float(torch.tensor(hyper["exponent"], dtype=table.dtype))
    with torch.random.fork_rng(devices=[]):
        potential = build_potential(saved.kind.lower(), hyper, species)
    potential.to(table.dtype)
    own = {ours: saved.state[theirs] for ours, theirs in _names(potential)}
    own |= {name: own[name] * saved.scale.to(own[name]) for name in LAST}
    own["embedding"] = table[rows_of_elements(species)][None]
    own["references"] = potential.references
    if saved.references is not None:
        own["references"] = per_element(saved.references, species)
    potential.load_state_dict(own)
    return potential.eval().requires_grad_(False)


LAST = ("readout.network.core.3.weight", "readout.network.core.3.bias")
"""Of the readout; its output is linear in them."""


def _m3gnet_hyper(arguments: Mapping[str, VendorObject]) -> dict[str, VendorObject]:
    return {
        "cutoff": float(arguments["cutoff"]),
        "channels": arguments["dim_node_embedding"],
        "n_blocks": arguments["nblocks"],
        "n_radial": arguments["max_n"],
        "l_max": arguments["max_l"] - 1,
        "three_body_cutoff": float(arguments["threebody_cutoff"]),
        "edge_channels": arguments["dim_edge_embedding"],
        "width": arguments["units"],
        "smooth": bool(arguments["use_smooth"]),
        "activation": arguments["activation_type"],
    }


def _tensornet_hyper(arguments: Mapping[str, VendorObject]) -> dict[str, VendorObject]:
    gaussian, smooth = arguments["rbf_type"] == "Gaussian", bool(arguments["use_smooth"])
    return {
        "cutoff": float(arguments["cutoff"]),
        "channels": arguments["units"],
        "n_blocks": arguments["nblocks"] + 1,
        "n_radial": arguments["num_rbf"] if gaussian else arguments["max_n"],
        "radial": "gaussian" if gaussian else "smooth-bessel" if smooth else "bessel",
        "l_max": arguments["max_l"] - 1,
        "exponent": float(arguments["width"]),
        "group": arguments["equivariance_invariance_group"],
        "activation": arguments["activation_type"],
    }


def _vendor_arguments(potential: Potential) -> dict[str, VendorObject]:
    hyper = potential.hyper
    common = {
        **ENERGIES,
        "element_types": tuple(chemical_symbols[z] for z in potential.species),
        "cutoff": hyper.cutoff,
    }
    if isinstance(potential, M3GNet):
        m3gnet = potential.hyper
        return common | {
            "rbf_type": "SphericalBessel",
            "use_phi": False,
            "dim_node_embedding": m3gnet.channels,
            "dim_edge_embedding": m3gnet.edge_channels,
            "max_n": m3gnet.n_radial,
            "max_l": m3gnet.l_max + 1,
            "nblocks": m3gnet.n_blocks,
            "threebody_cutoff": m3gnet.three_body_cutoff,
            "units": m3gnet.width,
            "use_smooth": m3gnet.smooth,
            "activation_type": m3gnet.activation,
        }
    assert isinstance(potential, TensorNet)
    tensornet = potential.hyper
    gaussian = tensornet.radial == "gaussian"
    return common | {
        "units": tensornet.channels,
        "nblocks": tensornet.n_blocks - 1,
        "num_rbf": tensornet.n_radial,
        "max_n": 3 if gaussian else tensornet.n_radial,
        "max_l": tensornet.l_max + 1,
        "rbf_type": "Gaussian" if gaussian else "SphericalBessel",
        "use_smooth": tensornet.radial == "smooth-bessel",
        "width": tensornet.exponent,
        "equivariance_invariance_group": tensornet.group,
        "activation_type": tensornet.activation,
    }


def _names(potential: Potential) -> Iterator[tuple[str, str]]:
    """Names of the weights here, but for the embedding, and there."""
    layers = _m3gnet_layers if isinstance(potential, M3GNet) else _tensornet_layers
    readout = _gated("readout.network", "final_layer.gated", 4)
    if isinstance(potential, TensorNet) and potential.hyper.radial == "gaussian":
        yield "radial.centers", "bond_expansion.rbf.centers"
    for ours, theirs in chain(layers(potential.hyper.n_blocks), readout):
        for name, _ in potential.get_submodule(ours).named_parameters():
            yield f"{ours}.{name}", f"{theirs}.{name}"


def _gated(ours: str, theirs: str, depth: int) -> Iterator[tuple[str, str]]:
    """Layers of a gated network; there is an activation between two of MatGL's."""
    for here, there in (("core", "layers"), ("gate", "gates")):
        for layer in range(depth):
            yield f"{ours}.{here}.{layer}", f"{theirs}.{there}.{2 * layer}"


def _m3gnet_layers(n_blocks: int) -> Iterator[tuple[str, str]]:
    yield "stages.0.edges", "embedding.layer_edge_embedding.layers.0"
    for block in range(n_blocks):
        three, ours = f"three_body_interactions.{block}", f"stages.{2 * block + 1}"
        yield f"{ours}.atoms", f"{three}.update_network_atom.layers.0"
        yield from _gated(f"{ours}.bonds", f"{three}.update_network_bond", 1)
        conv, ours = f"graph_layers.{block}.conv", f"stages.{2 * block + 2}"
        for here, there in (("edge", "edge"), ("atom", "node")):
            yield from _gated(f"{ours}.{here}_network", f"{conv}.{there}_update_func", 3)
            yield f"{ours}.{here}_weights", f"{conv}.{there}_weight_func"


def _tensornet_layers(n_blocks: int) -> Iterator[tuple[str, str]]:
    first, last = "tensor_embedding", f"stages.{n_blocks}"
    for kind in range(3):
        yield f"stages.0.distances.{kind}", f"{first}.distance_proj{kind + 1}"
        yield f"stages.0.mixed.kinds.{kind}", f"{first}.linears_tensor.{kind}"
    for here, there in (("pairs", "emb2"), ("norm", "init_norm")):
        yield f"stages.0.{here}", f"{first}.{there}"
    for i, here in enumerate(("hidden", "factors")):
        yield f"stages.0.{here}", f"{first}.linears_scalar.{i}"
    for block in range(1, n_blocks):
        ours, theirs = f"stages.{block}", f"layers.{block - 1}"
        for i in range(3):
            yield f"{ours}.distances.{i}", f"{theirs}.linears_scalar.{i}"
            yield f"{ours}.before.kinds.{i}", f"{theirs}.linears_tensor.{i}"
            yield f"{ours}.after.kinds.{i}", f"{theirs}.linears_tensor.{i + 3}"
    yield f"{last}.norm", "out_norm"
    yield f"{last}.linear", "linear"
