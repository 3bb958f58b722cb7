"""PET, the architecture of UPET and PET-MAD, of the package ``metatrain``, version 2026.4: checkpoints (``.ckpt``).

A checkpoint holds objects of compiled classes beside the weights, so that reading it needs the package and trust; merging,
serving and the files of this package do not, see :mod:`ase_gffmerge.models.pet`.
"""

import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from ase_gffmerge.errors import FileFormatError, first_line
from ase_gffmerge.graphs.graph import AtomGraph
from ase_gffmerge.integrations.base import (
    Adapter,
    ConvertedModel,
    VendorObject,
    converted,
    load_checkpoint,
    per_element,
    rows_of_elements,
)
from ase_gffmerge.integrations.wrapped import on_cpu
from ase_gffmerge.models import Potential
from ase_gffmerge.models.pet import PET, PETHyper

HYPERS = tuple(
    field.name
    for field in fields(PETHyper)
    if field.name not in ("channels", "n_blocks", "n_radial", "n_embeddings")
    and not field.name.startswith("readout_")
)
"""Hyper-parameters of the same names there."""

REFUSED = {
    "zbl": "a short-range repulsion (zbl)",
    "system_conditioning": "features of charge and spin (system_conditioning)",
}
"""Parts that are not read, by the hyper-parameter that asks for them."""


class MetatrainAdapter(Adapter):
    """Reads and writes PETs of the package ``metatrain``."""

    vendor, models, package, choice = "metatrain", "PET", "metatrain", "target"
    architectures: ClassVar[dict[str, str]] = {PET.architecture: "ase_gffmerge.models.pet:PET"}

    def potential_class(self, architecture: str) -> type[Potential]:
        """Class of PET, which needs nothing of the package."""
        return PET

    def _read(self, source: VendorObject, name: str | None, *, trust: bool) -> ConvertedModel:
        """A checkpoint, which has to be trusted, or a ``PET`` or what its ``export`` gives in memory."""
        self.require_package()
        with quiet_package():
            files = import_module("metatrain.utils.io")
            if isinstance(source, str | Path):
                content = load_checkpoint(Path(source), trust=trust, source=f"metatrain:{source}")
                try:
                    source = files.model_from_checkpoint(content, context="export")
                except Exception as error:  # anything, of dictionaries of other packages
                    raise FileFormatError(
                        f"{source} is no checkpoint that metatrain {version('metatrain')} loads ({first_line(error)}); give "
                        "the .ckpt of a training"
                    ) from None
            model = _pet(source)
            potential = _convert(model, _target(model, name))
        return ConvertedModel(potential=potential, vendor=self.vendor, version=version("metatrain"))

    def vendor_content(self, potential: Potential) -> dict[str, VendorObject]:
        """A checkpoint that ``metatrain`` loads, exports and fine-tunes, with one target, ``energy``."""
        assert isinstance(potential, PET)
        with quiet_package():
            return dict(_vendor_model(potential).get_checkpoint())

    def read_back(self, path: Path, potential: Potential) -> Potential:
        """See :meth:`.Adapter.read_back`; the file is the one that was just made here."""
        return self.read(path, trust=True).potential


ADAPTER = MetatrainAdapter()


@contextmanager
def quiet_package() -> Iterator[None]:
    """Import and use the package without its compiler's warnings, and with functions of torch that it can compile.

    Once ``torch_geometric`` is imported, two functions of torch are its own, which the compiler of TorchScript refuses.
    """
    geometric = sys.modules.get("torch_geometric.hash_tensor")
    replaced = {name: getattr(torch, name) for name in ("index_select", "select")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for name in replaced:
                setattr(torch, name, getattr(geometric, f"_old_{name}", replaced[name]))
            yield
        finally:
            for name, function in replaced.items():
                setattr(torch, name, function)


def _pet(source: VendorObject) -> nn.Module:
    """The network in a model, an exported one, or one that estimates its uncertainty."""
    kind = import_module("metatrain.pet").__model__
    for name in ("module", "model"):
        if not isinstance(source, kind):
            source = getattr(source, name, source)
    if not isinstance(source, kind):
        raise FileFormatError(
            f"a {type(source).__name__} is no PET of metatrain; give a .ckpt of its training or the model"
        )
    found: nn.Module = source
    return found


def _target(model: VendorObject, name: str | None) -> str:
    """The energy that is read."""
    infos = model.dataset_info.targets
    energies = [
        key for key, info in infos.items() if info.quantity == "energy" or key.split("/")[0] == "energy"
    ]
    if name is None and len(energies) == 1:
        name = energies[0]
    if name is None or name not in energies:
        what = "several energies" if name is None else f"no energy {name}"
        raise FileFormatError(
            f"this PET has {what}; there are {', '.join(energies) or 'none'}; choose one behind the file's name, "
            f"#target={energies[0] if energies else 'energy'}"
        )
    unit, length = infos[name].unit, model.dataset_info.length_unit
    if unit.lower() not in ("ev", "electronvolt") or length.lower() not in ("", "a", "angstrom"):
        raise FileFormatError(
            f"its {name} is in {unit or 'no unit'} and its lengths in {length}; only eV and Å are read"
        )
    return name


def _convert(model: VendorObject, target: str) -> PET:
    """A potential with the network's weights that was seen to compute the same."""
    model = on_cpu(model)
    hypers = model.hypers
    refused = [words for name, words in REFUSED.items() if hypers.get(name)]
    if hypers["long_range"]["enable"]:
        refused.append("long-range features")
    if refused:
        raise FileFormatError(
            f"this PET has {' and '.join(refused)}, which is not read; leave it out of the merge"
        )
    try:
        hyper = PETHyper(**{name: hypers[name] for name in HYPERS if name in hypers})
        species = tuple(int(z) for z in model.atomic_types)
        state = _weights(model.backend)
        return converted(
            lambda: PET(hyper, species).double(),  # for products with the scale
            lambda potential: _copy_weights(potential, model, state, target),
            dtype=state["edge_embedder.weight"].dtype,
            vendor_energies=lambda graph: _vendor_energies(model, target, graph),
            vendor="PET",
        )
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise FileFormatError(
            f"the PET has parts that are not known here ({first_line(error)}); leave it out of the merge"
        ) from None


def _weights(backend: nn.Module) -> dict[str, Tensor]:
    """Weights of the network by their names, low-rank changes (LoRA) added to what they change."""
    state = dict(backend.state_dict())
    for name, module in backend.named_modules():
        if hasattr(module, "lora_A"):
            change = module.scaling * (module.lora_B.weight @ module.lora_A.weight)
            state[f"{name}.weight"] = (module.linear.weight + change).detach()
            state[f"{name}.bias"] = module.linear.bias.detach()
    return state


def _copy_weights(potential: PET, model: VendorObject, state: Mapping[str, Tensor], target: str) -> None:
    species = tuple(int(z) for z in model.atomic_types)
    rows = rows_of_elements(species)
    by_element = potential.element_parameters()
    for ours, theirs in _names(potential, target):
        value = state[theirs]
        potential.get_parameter(ours).copy_(value[rows] if ours in by_element else value)
    potential.embedding.copy_(state["node_embedders.0.weight"][rows][None])
    scale = model.scaler.model.scales[target].block().values.item()
    for block in range(potential.hyper.n_blocks):
        layer = potential.get_submodule(f"readout.layers.{block}")
        assert isinstance(layer, nn.Linear)
        node, edge = _last(target, block, model.backend)
        weight = [state[f"{node}.weight"], state[f"{edge}.weight"], state[f"{edge}.bias"][:, None]]
        layer.weight.copy_(scale * torch.cat(weight, dim=1))
        layer.bias.copy_(scale * state[f"{node}.bias"])
    potential.references.copy_(per_element(_composition(model, target), species))


def _composition(model: VendorObject, target: str) -> Tensor:
    """Energies (n_elements, 1) in eV by the composition."""
    found: Tensor = model.additive_models[0].model.weights[target].block().values
    return found.cpu()  # itself, where it is there


def _vendor_energies(model: VendorObject, target: str, graph: AtomGraph) -> Tensor:
    """Energies per atom by the network itself."""
    backend, (sender, receiver) = model.backend, graph.edge_index
    data = backend.preprocess(
        graph.positions,
        receiver,
        sender,
        graph.atomic_numbers,
        graph.cell,
        graph.shifts.long(),
        graph.structure_index,
        model.cutoff_width_adaptive,
    )
    features = backend.calculate_features(data)
    found, *_ = backend.predict(*features, data, graph.cell, graph.structure_index, [target])
    scale = model.scaler.model.scales[target].block().values.item()
    rows = torch.tensor([list(model.atomic_types).index(z) for z in graph.atomic_numbers.tolist()])
    energies: Tensor = scale * found[target][0].flatten() + _composition(model, target).flatten()[rows]
    return energies


@torch.no_grad()
def _vendor_model(potential: PET) -> VendorObject:
    """A model of the package with the potential's weights; undoes :func:`_copy_weights`."""
    target, hyper = "energy", potential.hyper
    kind = import_module("metatrain.pet").__model__
    data, infos = (import_module(f"metatrain.utils.data{name}") for name in ("", ".target_info"))
    defaults = import_module("metatrain.utils.architectures").get_default_hypers("pet")["model"]
    info = infos.get_energy_target_info(
        target, {"quantity": "energy", "unit": "eV"}, add_position_gradients=True
    )
    species = list(potential.species)
    with torch.random.fork_rng(devices=[]):
        model = kind(
            {**defaults, **{name: getattr(hyper, name) for name in HYPERS}},
            data.DatasetInfo(length_unit="angstrom", atomic_types=species, targets={target: info}),
        )
    model.to(potential.dtype).eval()
    own = {name: value.detach().cpu() for name, value in potential.named_parameters()}
    state = {theirs: own[ours] for ours, theirs in _names(potential, target)}
    state["node_embedders.0.weight"] = own["embedding"][0]
    for block in range(hyper.n_blocks):
        node, edge = _last(target, block, model.backend)
        weight, d = own[f"readout.layers.{block}.weight"], hyper.d_head
        state |= {f"{node}.weight": weight[:, :d], f"{node}.bias": own[f"readout.layers.{block}.bias"]}
        state |= {f"{edge}.weight": weight[:, d : 2 * d], f"{edge}.bias": weight[:, 2 * d]}
    theirs = dict(model.backend.named_parameters())
    for name, value in state.items():
        theirs[name].copy_(value)
    composition = model.additive_models[0]
    _composition(model, target).copy_(potential.references[:, None].cpu())
    store = import_module("metatensor.torch")
    saved = store.save_buffer(store.make_contiguous(composition.model.weights[target]))
    composition.register_buffer(f"{target}_composition_buffer", saved)
    return model


def _last(target: str, block: int, backend: VendorObject) -> tuple[str, str]:
    """Names of the last layers of atoms and edges."""
    (key,) = backend.node_last_layers[target][block].keys()
    node, edge = (f"{kind}_last_layers.{target}.{block}.{key}" for kind in ("node", "edge"))
    return node, edge


def _names(potential: PET, target: str) -> Iterator[tuple[str, str]]:
    """Names of the parameters here and there, but for embedding and readout."""
    hyper = potential.hyper
    yield "stages.0.elements", "edge_embedder.weight"
    for layer in range(hyper.num_gnn_layers):
        ours, theirs = f"stages.{1 + layer * (1 + hyper.residual)}", f"gnn_layers.{layer}"
        modules = {f"{ours}.edges": f"{theirs}.edge_embedder"}
        modules |= {f"{ours}.compress.{i}": f"{theirs}.compress.{2 * i}" for i in range(2)}
        for i in range(hyper.num_attention_layers):
            here, there = f"{ours}.attentions.{i}", f"{theirs}.trans.layers.{i}"
            for name, _ in potential.get_submodule(here).named_children():
                inner = f"attention.{name}" if name.endswith("put_linear") else name
                modules[f"{here}.{name}"] = f"{there}.{inner}"
        if layer:
            yield f"{ours}.neighbors", f"{theirs}.neighbor_embedder.weight"
        if hyper.residual and layer:
            yield f"{ours}.elements", f"node_embedders.{layer}.weight"
        if not hyper.residual:
            modules[f"{ours}.combine_norm"] = f"combination_norms.{layer}"
            modules |= {f"{ours}.combine.{i}": f"combination_mlps.{layer}.{2 * i}" for i in range(2)}
        if hyper.residual or layer == hyper.num_gnn_layers - 1:
            heads, block = (
                f"stages.{2 + 2 * layer if hyper.residual else 1 + hyper.num_gnn_layers}",
                layer * hyper.residual,
            )
            for kind in ("node", "edge"):
                modules |= {f"{heads}.{kind}.{i}": f"{kind}_heads.{target}.{block}.{2 * i}" for i in range(2)}
        for here, there in modules.items():
            for name, _ in potential.get_submodule(here).named_parameters():
                yield f"{here}.{name}", f"{there}.{name}"
