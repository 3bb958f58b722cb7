"""eSEN (Fu et al., arXiv 2502.12147) of the package ``fairchem-core``, version 2: checkpoints for inference (``.pt``)."""

import json
from collections.abc import Iterator
from copy import deepcopy
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from ase_gffmerge.errors import FileFormatError, first_line
from ase_gffmerge.graphs.graph import AtomGraph
from ase_gffmerge.integrations.base import (
    Adapter,
    ConvertedModel,
    VendorObject,
    converted,
    load_checkpoint,
)
from ase_gffmerge.integrations.fairchem.model import PREFIX, ESENPackage
from ase_gffmerge.integrations.wrapped import PackageHyper, on_cpu
from ase_gffmerge.models import Potential
from ase_gffmerge.models.layers import package_mode

ARGUMENTS = (
    *("max_num_elements", "sphere_channels", "lmax", "mmax", "cutoff", "edge_channels", "num_distance_basis"),
    *("num_layers", "hidden_channels", "norm_type", "act_type", "ff_type", "chg_spin_emb_type"),
    *("use_dataset_embedding", "dataset_mapping"),
)
"""Of the package's backbone, which has them as attributes."""

BACKBONE, HEAD = (f"{PREFIX}models.uma.escn_md.{name}" for name in ("eSCNMDBackbone", "MLP_EFS_Head"))
MLIP = f"{PREFIX}units.mlip_unit.mlip_unit"


class FairchemAdapter(Adapter):
    """Reads and writes eSENs of the package ``fairchem-core``."""

    vendor, models, package, distribution, choice = "fairchem", "eSEN", "fairchem", "fairchem-core", "task"
    architectures: ClassVar[dict[str, str]] = {
        ESENPackage.architecture: "ase_gffmerge.integrations.fairchem.model:ESENPackage"
    }

    def _read(self, source: VendorObject, name: str | None, *, trust: bool) -> ConvertedModel:
        """A checkpoint for inference, which has to be trusted, or a ``FAIRChemCalculator`` in memory."""
        self.require_package()
        model: VendorObject
        if isinstance(source, str | Path):
            model, tasks = _loaded(Path(source), trust=trust)
        else:
            unit = getattr(source, "predictor", source)
            model = getattr(getattr(unit, "model", unit), "module", unit)
            if not hasattr(model, "backbone") or not hasattr(model, "tasks"):
                raise FileFormatError(
                    f"a {type(source).__name__} is no model of fairchem; give a checkpoint for inference or "
                    "a FAIRChemCalculator"
                )
            tasks = list(model.tasks.values())
        with torch.random.fork_rng(devices=[]):  # which draws the angle about every edge
            potential = _convert(model, *_task(tasks, name or getattr(source, "task_name", None)))
        return ConvertedModel(potential=potential, vendor="fairchem-core", version=version("fairchem-core"))

    def vendor_content(self, potential: Potential) -> VendorObject:
        """A checkpoint for inference in float32, which ``load_predict_unit`` loads."""
        assert isinstance(potential, ESENPackage)
        return _vendor_checkpoint(potential)

    def read_back(self, path: Path, potential: Potential) -> Potential:
        """See :meth:`.Adapter.read_back`; the pickle is the one that was just made here."""
        return self.read(path, trust=True).potential


ADAPTER = FairchemAdapter()


def _loaded(path: Path, *, trust: bool) -> tuple[VendorObject, list[VendorObject]]:
    """Network with the averaged weights that the package serves, and tasks of a checkpoint."""
    import_module(f"{PREFIX}units.mlip_unit.api.inference")  # whose class it is of
    content = load_checkpoint(path, trust=trust, source=f"fairchem:{path}")
    if not hasattr(content, "model_config"):
        raise FileFormatError(f"{path} is no checkpoint that fairchem-core loads; give one for inference")
    _require_esen(str(content.model_config["backbone"]["model"]).rpartition(".")[2])
    try:
        averaged = import_module(f"{PREFIX}units.mlip_unit.utils").load_inference_model(
            str(path), preloaded_checkpoint=content, use_ema=True, return_checkpoint=False
        )
        instantiate = import_module("hydra.utils").instantiate
        return averaged.module, [instantiate(task) for task in content.tasks_config]
    except Exception as error:  # anything, of dictionaries of other packages
        raise FileFormatError(
            f"{path} is no checkpoint that fairchem-core {version('fairchem-core')} loads ({first_line(error)}); "
            "give one for inference"
        ) from None


def _require_esen(name: str) -> None:
    if name not in ("eSCNMDBackbone", "escnmd_backbone"):
        raise FileFormatError(
            f"its backbone is a {name}, only eSEN's eSCNMDBackbone is read: the experts of UMA are mixed anew for every "
            "composition, charge and task, so that it is no single network whose layers could be solved for"
        )


def _task(tasks: list[VendorObject], name: str | None) -> tuple[VendorObject, str]:
    """The task of energies, and the data set it is of."""
    found = {
        dataset: task
        for task in tasks
        if task.property == "energy" and not task.inference_only
        for dataset in task.datasets
    }
    if name is None and len(found) == 1:
        (name,) = found
    if name is None or name not in found:
        raise FileFormatError(
            f"this model has {'several tasks' if name is None else f'no task {name}'}; there are "
            f"{', '.join(found) or 'none'}; choose one behind the file's name, #task={next(iter(found), 'omol')}"
        )
    return found[name], name


def _convert(model: VendorObject, task: VendorObject, dataset: str) -> ESENPackage:
    """A potential with the network's weights that was seen to compute the same."""
    model = on_cpu(model)
    backbone, heads = model.backbone, list(model.output_heads.values())
    _require_esen(type(backbone).__name__)
    config = backbone.regress_config
    head = next((head for head in heads if type(head).__name__ == HEAD.rpartition(".")[2]), None)
    faults = {
        "forces that are predicted directly": config.direct_forces,
        "no head for energies (MLP_EFS_Head)": head is None,
        "the mean of energies over atoms": getattr(head, "reduce", "sum") != "sum",
        "a mean energy per structure": float(task.normalizer.mean) != 0,
        "channels that are balanced to charge or spin": backbone.charge_channel_end
        + backbone.spin_channel_end
        > 0,
    }
    if found := [words for words, there in faults.items() if there]:
        raise FileFormatError(
            f"this eSEN has {' and '.join(found)}, which is not read; leave it out of the merge"
        )
    arguments = {name: getattr(backbone, name) for name in ARGUMENTS}
    if arguments["dataset_mapping"] is not None:
        arguments["dataset_mapping"] = dict(arguments["dataset_mapping"])
    spin = 1 if dataset == "omol" else 0
    try:
        hyper = PackageHyper(
            cutoff=float(backbone.cutoff),
            channels=backbone.sphere_channels,
            n_blocks=1,
            config=json.dumps({"backbone": arguments, "spin": spin, "dataset": dataset}, sort_keys=True),
        )
        species = tuple(range(1, min(backbone.max_num_elements, 119)))
        return converted(
            lambda: ESENPackage(hyper, species),
            lambda potential: _copy_weights(potential, backbone, head, task),
            dtype=backbone.sphere_embedding.weight.dtype,
            vendor_energies=lambda graph: _vendor_energies(backbone, head, task, graph, dataset, spin),
            vendor="eSEN",
        )
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise FileFormatError(
            f"the eSEN has parts that are not known here ({first_line(error)}); leave it out of the merge"
        ) from None


def _references(task: VendorObject) -> Tensor | None:
    references = task.element_references
    return None if references is None else references.element_references.double().cpu()


def _copy_weights(
    potential: ESENPackage, backbone: VendorObject, head: VendorObject, task: VendorObject
) -> None:
    rows = list(potential.species)
    state = {**backbone.state_dict(), **head.state_dict()}
    for ours, theirs in _names(potential):
        value = state[theirs]
        potential.get_parameter(ours).copy_(value[rows] if ours in potential.element_parameters() else value)
    potential.embedding.copy_(state["sphere_embedding.weight"][rows][None])
    last = potential.get_submodule("readout.module.0.4")
    for value in last.parameters():
        value.mul_(float(task.normalizer.rmsd))
    if (references := _references(task)) is not None:
        potential.references.copy_(references[rows])


def _vendor_energies(
    backbone: VendorObject, head: VendorObject, task: VendorObject, graph: AtomGraph, dataset: str, spin: int
) -> Tensor:
    """Energies per atom by the network itself."""
    backbone, n = deepcopy(backbone), len(graph)
    backbone.otf_graph = False
    integers = {"charge": 0, "spin": spin, "natoms": n, "nedges": graph.n_edges}
    data = import_module(f"{PREFIX}datasets.atomic_data").AtomicData(
        pos=graph.positions.float(),
        atomic_numbers=graph.atomic_numbers,
        cell=graph.cell.float(),
        pbc=torch.zeros(1, 3, dtype=torch.bool),
        edge_index=graph.edge_index,
        cell_offsets=graph.shifts.float(),
        fixed=torch.zeros(n, dtype=torch.long),
        tags=torch.zeros(n, dtype=torch.long),
        dataset=dataset,
        **{name: torch.tensor([value]) for name, value in integers.items()},
    )
    data["batch"], data["dataset"] = graph.structure_index, [dataset]
    for name in ("pos", "cell", "cell_offsets"):
        data[name] = data[name].to(graph.positions.dtype)
    features = backbone.eval()(data)["node_embedding"][:, 0]
    energies: Tensor = head.energy_block(features).flatten() * float(task.normalizer.rmsd)
    references = _references(task)
    return energies if references is None else energies.double() + references[graph.atomic_numbers]


@torch.no_grad()
def _vendor_checkpoint(potential: ESENPackage) -> VendorObject:
    """What the package loads; undoes :func:`_copy_weights`, with a normalizer of 1."""
    arguments, rows = potential.hyper.arguments, list(potential.species)
    known = {"direct_forces": False, "regress_forces": True, "otf_graph": True, "always_use_pbc": False}
    with package_mode(torch.float32):
        network = import_module(f"{PREFIX}models.base").HydraModel(
            **(built := _model_config({**arguments["backbone"], **known}))
        )
    state, own = network.state_dict(), {name: x.detach().cpu() for name, x in potential.named_parameters()}
    (head,) = network.output_heads
    for ours, theirs in _names(potential):
        target = (
            f"output_heads.{head}.{theirs}" if theirs.startswith("energy_block") else f"backbone.{theirs}"
        )
        if ours in potential.element_parameters():
            state[target].zero_()[rows] = own[ours].float()
        else:
            state[target].copy_(own[ours])
    state["backbone.sphere_embedding.weight"].zero_()[rows] = own["embedding"][0].float()
    references = torch.zeros(119, dtype=torch.float64)
    references[rows] = potential.references.cpu()
    numbers = {"_target_": "torch.DoubleTensor", "_args_": [references.tolist()]}
    norm = f"{PREFIX}modules.normalization"
    kept = {"_target_": f"{norm}.element_references.ElementReferences", "element_references": numbers}
    tasks = [
        {
            "_target_": f"{MLIP}.Task",
            "name": name,
            "level": level,
            "property": name,
            "out_spec": {"_target_": f"{MLIP}.OutputSpec", "dim": [size], "dtype": "float32"},
            "normalizer": {"_target_": f"{norm}.normalizer.Normalizer", "mean": 0.0, "rmsd": 1.0},
            "element_references": kept if name == "energy" else None,
            "datasets": [arguments["dataset"]],
        }
        for name, level, size in (("energy", "system", 1), ("forces", "atom", 3))
    ]
    averaged = {f"module.{name}": value for name, value in state.items()}
    return import_module(f"{PREFIX}units.mlip_unit.api.inference").MLIPInferenceCheckpoint(
        model_config={"_target_": f"{PREFIX}models.base.HydraModel", **built},
        model_state_dict=state,
        ema_state_dict={"n_averaged": torch.tensor(1), **averaged},
        tasks_config=tasks,
    )


def _model_config(backbone: dict[str, VendorObject]) -> dict[str, VendorObject]:
    """Arguments of the package's model."""
    return {
        "pass_through_head_outputs": True,
        "otf_graph": True,
        "backbone": {"model": BACKBONE, **backbone},
        "heads": {"energyandforcehead": {"module": HEAD}},
    }


def _names(potential: ESENPackage) -> Iterator[tuple[str, str]]:
    """Names of the parameters here, but for the embedding, and there."""
    n_blocks = potential.hyper.arguments["backbone"]["num_layers"]
    prefixes = {
        "stages.0.source": "source_embedding.weight",
        "stages.0.target": "target_embedding.weight",
        "stages.0.degree": "edge_degree_embedding",
        "stages.0.mix": "mix_csd",
        "stages.0.charges": "charge_embedding",
        "stages.0.spins": "spin_embedding",
        "stages.0.datasets": "dataset_embedding",
        **{f"stages.{i + 1}.block": f"blocks.{i}" for i in range(n_blocks)},
        f"stages.{n_blocks + 1}": "",
        "readout.module.0": "energy_block",
    }
    for ours, _ in potential.named_parameters():
        for here, there in prefixes.items():
            if ours == here or ours.startswith(f"{here}."):
                yield ours, f"{there}{ours.removeprefix(here)}".lstrip(".")
