"""Orb v3 (Rhodes et al., arXiv 2504.06231) of the package ``orb_models`` (0.5 to 0.7): conservative models, in and out.

What its training saves is a state dictionary, which tells everything but the number of neighbours that an atom attends to:
the vendor, too, loads it by the name of the published model that was fine-tuned.
"""

import inspect
from collections.abc import Mapping
from copy import deepcopy
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from ase import Atoms
from torch import Tensor, nn

from ase_gffmerge.errors import FileFormatError, first_line
from ase_gffmerge.graphs.graph import AtomGraph
from ase_gffmerge.integrations.base import Adapter, ConvertedModel, VendorObject, converted, load_checkpoint
from ase_gffmerge.models import Potential

if TYPE_CHECKING:
    from ase_gffmerge.integrations.orb.model import OrbPackage, OrbPackageHyper

OMAT, MPA = "PBE and PBE+U of OMat24", "PBE and PBE+U of the Materials Project and Alexandria"

PRETRAINED = {
    f"orb-v3-conservative-{neighbours}-{data}": (limit, theory)
    for neighbours, limit in (("20", 20), ("inf", 120))
    for data, theory in (("omat", OMAT), ("mpa", MPA))
}
"""Names of published models, neighbours that an atom attends to in them, and what they were trained on."""

TENSORS = "torch.save(model.state_dict(), FILE)"
"""Saves a model without code."""

SETTINGS = {"max_num_neighbors": "max_neighbors", "radius": "cutoff", "activation": "activation"}
"""Vendor's words for what a state dictionary does not tell, and ours."""

SPECIES = tuple(range(1, 118))
"""Elements with a reference energy."""

MISFITS = (KeyError, TypeError, ValueError, AttributeError, AssertionError, RuntimeError)
"""What a state dictionary of another kind makes the package raise."""


class OrbAdapter(Adapter):
    """Reads and writes conservative models of the package ``orb_models``."""

    vendor, models, package, distribution = "orb", "Orb", "orb_models", "orb-models"
    architectures: ClassVar[dict[str, str]] = {
        "orb-package": "ase_gffmerge.integrations.orb.model:OrbPackage"
    }

    def require_package(self) -> None:
        """See :meth:`.Adapter.require_package`; modules of ``orb_models`` have other names since 0.6."""
        super().require_package()
        if not any(map(find_spec, ("orb_models.common", "orb_models.forcefield.atomic_system"))):
            raise FileFormatError(
                f"orb-models {version('orb-models')} is installed, built otherwise than 0.5 to 0.7, which "
                "are read here; pip install 'orb-models>=0.5.5,<0.8'"
            )

    def read(self, source: VendorObject, *, trust: bool = False) -> ConvertedModel:
        """Convert a state dictionary, a published model by name, or a model in memory.

        Parameters
        ----------
        source
            One of

            * ``name@path``: the state dictionary that the vendor's training saved, and which published model was fine-tuned,
              one of :data:`PRETRAINED`;
            * that name alone: its weights, which the vendor's package downloads;
            * a path: a dictionary ``{"architecture": ..., "state_dict": ...}``, whose architecture is such a name or has the
              key ``max_num_neighbors`` and perhaps ``radius`` (default 6 Å) and ``activation`` (default ``silu``);
            * an ``ORBCalculator``; a ``ConservativeForcefieldRegressor`` of 0.5; since 0.6 a tuple of model and atoms
              adapter, which the vendor's loaders return.
        trust
            Execute code that the file may contain.

        Raises
        ------
        FileFormatError
            When the package is not installed, there is no such file, it holds code and is not trusted, the model predicts
            forces directly, or it has parts that are not known here.
        """
        self.require_package()
        name, theory = "", "unknown"
        if isinstance(source, str | Path):
            network, hyper, theory = _from_file(str(source), trust=trust)
            name = "" if Path(source).exists() else Path(str(source).partition("@")[2]).name.split(".")[0]
        else:
            network, hyper = _from_object(source)
        return ConvertedModel(
            potential=_convert(network, hyper),
            vendor=self.vendor,
            version=version("orb_models"),
            level_of_theory=theory,
            name=name,
            notes=("the confidence is carried along, not served",),
        )

    def vendor_content(self, potential: Potential) -> dict[str, Tensor]:
        """A state dictionary, which the vendor loads with ``weights_path=`` and :meth:`read` by ``name@path``.

        What only further training uses, statistics of labels, begins anew.
        """
        from ase_gffmerge.integrations.orb.model import vendor_state

        return vendor_state(potential)  # type: ignore[arg-type]

    def read_back(self, path: Path, potential: Potential) -> Potential:
        """See :meth:`.Adapter.read_back`; a state dictionary does not tell all hyper-parameters."""
        from ase_gffmerge.integrations.orb.model import network_of

        hyper: OrbPackageHyper = potential.hyper  # type: ignore[assignment]
        return _convert(network_of(hyper, load_checkpoint(path, trust=False, source=f"orb:{path}")), hyper)


ADAPTER = OrbAdapter()


def _from_file(source: str, *, trust: bool) -> "tuple[nn.Module, OrbPackageHyper, str]":
    """The network in a file, its hyper-parameters, and what it was trained on."""
    from ase_gffmerge.integrations.orb.model import hyper_of, network_of

    name, path = _located(source)
    content = load_checkpoint(path, trust=trust, source=f"orb:{source}", tensors=TENSORS, names=PRETRAINED)
    if isinstance(content, nn.Module):
        return *_from_object(content), PRETRAINED.get(_published(name), (0, "unknown"))[1]
    state = content.get("state_dict", content)
    _require_readable(state, str(path))
    settings, theory = _settings(name or content.get("architecture"), path)
    try:
        hyper = hyper_of(state, **settings)
        return network_of(hyper, state), hyper, theory
    except MISFITS as error:
        raise FileFormatError(
            f"{path} holds no conservative Orb v3 that orb_models {version('orb_models')} can build ({first_line(error)}); "
            f"give the state dictionary of a model that was fine-tuned from one of {', '.join(PRETRAINED)}"
        ) from None


def _located(source: str) -> tuple[str, Path]:
    """Name of the published model, empty where none is given, and the file."""
    name, _, path = source.partition("@")
    if path and not Path(source).exists():
        return name, Path(path)
    if _published(source) and not Path(source).exists():
        return source, _downloaded(_published(source))
    return "", Path(source)


def _published(name: str) -> str:
    """The vendor's spelling of a name in :data:`PRETRAINED`, empty for other names."""
    dashed = name.replace("_", "-")
    return dashed if dashed in PRETRAINED else ""


def _downloaded(name: str) -> Path:
    """File of published weights in the vendor's cache."""
    from cached_path import cached_path
    from orb_models.forcefield.pretrained import ORB_PRETRAINED_MODELS

    address = inspect.signature(ORB_PRETRAINED_MODELS[name]).parameters["weights_path"].default
    try:
        return Path(cached_path(address))
    except Exception as error:  # whatever its transport raises
        raise FileFormatError(
            f"the weights of {name} cannot be downloaded ({first_line(error)}); fetch {address} where that is possible, and "
            f"give orb:{name}@FILE"
        ) from None


def _settings(architecture: VendorObject, path: Path) -> tuple[dict[str, VendorObject], str]:
    """Hyper-parameters that a state dictionary does not tell, and the level of theory."""
    if isinstance(architecture, str) and (name := _published(architecture)):
        limit, theory = PRETRAINED[name]
        return {"max_neighbors": limit}, theory
    if isinstance(architecture, Mapping) and {"max_num_neighbors"} <= set(architecture) <= set(SETTINGS):
        settings = {SETTINGS[key]: value for key, value in architecture.items()}
        if isinstance(settings.get("cutoff"), int):
            settings["cutoff"] = float(settings["cutoff"])
        return settings, "unknown"
    what = (
        "does not say to how many neighbours an atom attends"
        if architecture is None
        else f"has an architecture that is not known ({architecture!r})"
    )
    raise FileFormatError(
        f"{path} {what}; name the published model that was fine-tuned, as in orb:{next(iter(PRETRAINED))}@{path} (or "
        f"{', '.join([*PRETRAINED][1:])}), or save {{'architecture': {{'max_num_neighbors': 20}}, 'state_dict': ...}}"
    )


def _from_object(source: VendorObject) -> "tuple[nn.Module, OrbPackageHyper]":
    """An uncompiled copy of a network in memory, and its hyper-parameters."""
    from ase_gffmerge.integrations.orb.model import hyper_of, network_of

    network, config = source if isinstance(source, tuple) and len(source) == 2 else (source, None)
    network = network if hasattr(network, "heads") else getattr(network, "model", None)
    if not isinstance(network, nn.Module) or not hasattr(network, "heads"):
        raise FileFormatError(
            f"a {type(source).__name__} is no Orb model; give a file, an ORBCalculator, or (model, atoms_adapter)"
        )
    direct = getattr(source, "conservative", None) is False
    _require_readable({} if direct else network.state_dict(), "this Orb model", direct=direct)
    for name in ("adapter", "system_config"):
        config = config or getattr(source, name, None)
    if config is None:
        raise FileFormatError(
            "this Orb model has no system_config, which says to how many neighbours an atom attends; give an ORBCalculator "
            "that was made with one, or since orb-models 0.6 (model, atoms_adapter)"
        )
    copy: VendorObject = deepcopy(network).cpu().eval()
    state, head = copy.state_dict(), copy.heads["energy"]
    try:
        if not head.atom_avg:
            raise ValueError("its energy is not n times a function of the mean latent")
        if copy.pair_repulsion and copy.pair_repulsion_fn.node_aggregation != "mean":
            raise ValueError("its repulsion is no mean over the atoms, as that of the published models is")
        hyper = hyper_of(
            state,
            cutoff=float(config.radius),
            max_neighbors=int(getattr(source, "max_num_neighbors", None) or config.max_num_neighbors),
            activation=type(head.mlp[1]).__name__.lower(),
            repulsion=bool(copy.pair_repulsion),
        )
        network_of(hyper, state)
    except MISFITS as error:
        raise FileFormatError(
            f"this Orb model is not of the conservative v3 kind ({first_line(error)}); leave it out of the merge"
        ) from None
    return copy, hyper


def _require_readable(state: VendorObject, origin: str, *, direct: bool = False) -> None:
    """Raise :class:`FileFormatError` for kinds of models that no potential can be."""
    names = [key for key in state if isinstance(key, str)] if isinstance(state, Mapping) else []
    if not direct and not any(name.startswith(("heads.", "node_head.")) for name in names):
        raise FileFormatError(f"{origin} holds no weights of Orb with its heads; give model.state_dict()")
    if direct or not any(name.startswith("grad_forces_normalizer.") for name in names):
        raise FileFormatError(
            f"{origin} predicts forces directly and not as the gradient of an energy, which is what a specialist is; merge "
            "calculators of such models with ase_gffmerge.merge_calculators([calc_a, calc_b], [frames_a, frames_b], "
            "module=lambda calc: calc.model)"
        )
    if any(name.startswith("model.conditioner.") for name in names):
        raise FileFormatError(
            f"{origin} reads charge and spin of a structure (OrbMol), which a specialist does not know; use one of "
            f"{', '.join(PRETRAINED)} or models fine-tuned from them"
        )


def _convert(network: nn.Module, hyper: "OrbPackageHyper") -> "OrbPackage":
    """A potential with the network's weights that was seen to compute the same."""
    from ase_gffmerge.integrations.orb.model import OrbPackage, copy_weights

    return converted(
        lambda: OrbPackage(hyper, SPECIES),
        lambda potential: copy_weights(potential, network.state_dict()),
        dtype=next(network.parameters()).dtype,
        vendor_energies=lambda graph: _vendor_energies(network, graph, hyper),
        vendor="Orb",
    )


def _vendor_energies(network: VendorObject, graph: AtomGraph, hyper: "OrbPackageHyper") -> Tensor:
    """Equal parts of the energy by the network itself, and the atoms' references."""
    numbers, cpu = graph.atomic_numbers, torch.device("cpu")
    atoms = Atoms(numbers.numpy(), positions=graph.positions.double().numpy())
    dtype, limits = next(network.parameters()).dtype, (hyper.cutoff, hyper.max_neighbors)
    try:
        from orb_models.forcefield.forcefield_adapter import ForcefieldAtomsAdapter

        batch = ForcefieldAtomsAdapter(*limits).from_ase_atoms(atoms, device=cpu, output_dtype=dtype)
    except ModuleNotFoundError:  # 0.5
        from orb_models.forcefield.atomic_system import SystemConfig, ase_atoms_to_atom_graphs

        batch = ase_atoms_to_atom_graphs(atoms, SystemConfig(*limits), device=cpu, output_dtype=dtype)
    with torch.enable_grad():
        energy = network.predict(batch)["energy"].detach().double()
    references = network.heads["energy"].reference.linear.weight.flatten().double()[numbers]
    return (energy - references.sum()) / len(numbers) + references
