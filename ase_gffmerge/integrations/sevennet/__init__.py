"""SevenNet (Park et al., arXiv 2402.03789) of the package ``sevenn``, version 0.13: checkpoints and models."""

import json
from collections.abc import Mapping
from copy import deepcopy
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from e3nn.o3 import Irreps, Linear
from torch import Tensor, nn

from ase_gffmerge.errors import FileFormatError, first_line
from ase_gffmerge.graphs.graph import AtomGraph, edge_vectors
from ase_gffmerge.integrations.base import (
    Adapter,
    ConvertedModel,
    VendorObject,
    converted,
    load_checkpoint,
)
from ase_gffmerge.integrations.wrapped import on_cpu, one_number_of_scalars
from ase_gffmerge.models import Potential

if TYPE_CHECKING:
    from ase_gffmerge.integrations.sevennet.model import SevenNetPackage

PRETRAINED = ("7net-0", "7net-0_22may2024", "7net-l3i5")
"""Names of weights that come with the package and hold one force field; all were trained on the Materials Project."""

SEVERAL = ("7net-mf-0",)
"""Names of weights that come with the package and hold one force field per modality."""

MATERIALS_PROJECT = "PBE and PBE+U of the Materials Project"


class SevenNetAdapter(Adapter):
    """Reads and writes models of the package ``sevenn``."""

    vendor, models, package = "sevenn", "SevenNet", "sevenn"
    shipped, choice = PRETRAINED, "modality"
    architectures: ClassVar[dict[str, str]] = {
        "sevennet-package": "ase_gffmerge.integrations.sevennet.model:SevenNetPackage"
    }

    def _read(self, source: VendorObject, name: str | None, *, trust: bool) -> ConvertedModel:
        """A checkpoint (``.pth``), a name of weights in the package, or a calculator or model in memory."""
        modality = name or getattr(source, "modal", None)
        self.require_package()
        theory = modality or "unknown"
        if not isinstance(source, str | Path):
            network = getattr(source, "model", source)
        else:
            path, names = Path(source), (*PRETRAINED, *SEVERAL)
            if str(source) in names and not path.exists():
                path = _pretrained(str(source))
                theory = modality or MATERIALS_PROJECT
            content = load_checkpoint(path, trust=trust, source=f"sevenn:{source}", names=names)
            network = _build(content, path) if isinstance(content, dict) else content
        return ConvertedModel(
            potential=_convert(network, modality),
            vendor=self.vendor,
            version=version("sevenn"),
            level_of_theory=theory,
        )

    def vendor_content(self, potential: Potential) -> dict[str, VendorObject]:
        """A checkpoint that ``SevenNetCalculator`` loads, in float32, without the state of a training."""
        from ase_gffmerge.integrations.sevennet.model import vendor_checkpoint

        return vendor_checkpoint(potential)  # type: ignore[arg-type]


ADAPTER = SevenNetAdapter()


def _pretrained(name: str) -> Path:
    from sevenn.util import pretrained_name_to_path

    return Path(pretrained_name_to_path(name))


def _build(content: Mapping[str, VendorObject], path: Path) -> nn.Module:
    """The network that a checkpoint describes, with its weights, by the package's own rules for old files."""
    from sevenn.checkpoint import SevenNetCheckpoint, _config_cp_routine

    checkpoint = SevenNetCheckpoint(path)
    try:
        checkpoint._config = _config_cp_routine(content["config"])
        checkpoint._model_state_dict = content["model_state_dict"]
        checkpoint._loaded = True
        network: nn.Module = checkpoint.build_model()
    except (KeyError, TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise FileFormatError(
            f"{path} is no checkpoint of SevenNet that sevenn {version('sevenn')} can build ({first_line(error)}); give the "
            "checkpoint that its training wrote"
        ) from None
    return network


def _convert(network: VendorObject, modality: str | None) -> "SevenNetPackage":
    """A potential with the weights of the network, for one of its modalities if it has any, that computes the same."""
    from ase_gffmerge.integrations.sevennet.model import (
        SevenNetPackage,
        SevenNetPackageHyper,
        copy_weights,
        one_modality,
    )

    if not hasattr(network, "edge_embedding") or not getattr(network, "type_map", None):
        raise FileFormatError(
            f"a {type(network).__name__} is no SevenNet model; give a checkpoint, a SevenNetCalculator or its model"
        )
    network = on_cpu(network)
    known = getattr(network, "modal_map", None) or {}
    if known and modality not in known:
        first, unknown = next(iter(known)), f" and no {modality}" if modality else ""
        raise FileFormatError(
            f"this SevenNet model has the modalities {', '.join(known)}{unknown}; choose one, for example "
            f"sevenn:FILE#modality={first}, or SevenNetCalculator(FILE, modal={first!r})"
        )
    if modality and not known:
        raise FileFormatError(
            f"this SevenNet model has no modalities to choose {modality} from; leave it out"
        )
    row = known[modality] if known else None
    single = network if row is None else one_modality(network, row)
    arguments = _arguments(single)
    species = tuple(sorted(network.type_map, key=network.type_map.__getitem__))
    scalars = [Irreps(irreps).count("0e") for irreps in arguments["irreps_manual"][1:]]
    hyper = SevenNetPackageHyper(
        cutoff=float(network.cutoff),
        channels=one_number_of_scalars(scalars, of="blocks"),
        n_blocks=arguments["num_convolution_layer"],
        n_radial=int(network.edge_embedding.basis_function.num_basis),
        config=json.dumps(arguments, sort_keys=True),
    )
    return converted(
        lambda: SevenNetPackage(hyper, species),
        lambda potential: copy_weights(potential, single, species),
        dtype=network.onehot_to_feature_x.linear.weight.dtype,
        vendor_energies=lambda graph: _vendor_energies(network, graph, row),
        vendor="SevenNet",
    )


def _arguments(network: VendorObject) -> dict[str, VendorObject]:
    """Configuration of the package that makes such a network."""
    from sevenn._const import ACTIVATION

    edges, linear = network.edge_embedding, network.onehot_to_feature_x.linear
    blocks = range(sum(name.endswith("_convolution") for name, _ in network.named_children()))
    parts = [
        {name: getattr(network, f"{t}_{name}") for name in ("convolution", "equivariant_gate")}
        for t in blocks
    ]
    radial = parts[0]["convolution"].weight_nn_kwargs
    intros = [getattr(network, f"{t}_self_connection_intro") for t in blocks]
    readout = getattr(network, "readout_FCN", None)
    names = {function: name for name, function in ACTIVATION.items()}
    power = getattr(edges.cutoff_function, "p", None)
    biases = [bool(module.bias.numel()) for module in network.modules() if isinstance(module, Linear)]
    return {
        "cutoff": float(network.cutoff),
        "channel": Irreps(linear.irreps_out).dim,
        "irreps_manual": [str(linear.irreps_out)]
        + [str(part["equivariant_gate"].gate.irreps_out) for part in parts],
        "lmax": int(edges.spherical.lmax),
        "lmax_edge": -1,
        "lmax_node": -1,
        "is_parity": str(edges.spherical.irreps_in) == "1x1o",
        "num_convolution_layer": len(blocks),
        "radial_basis": {
            "radial_basis_name": "bessel",
            "bessel_basis_num": int(edges.basis_function.num_basis),
            "trainable_coeff": isinstance(edges.basis_function.coeffs, nn.Parameter),
        },
        "cutoff_function": (
            {"cutoff_function_name": "poly_cut", "poly_cut_p_value": power}
            if power is not None
            else {"cutoff_function_name": "XPLOR", "cutoff_on": edges.cutoff_function.r_on}
        ),
        "act_radial": names[radial["act"]],
        "act_scalar": {"e": "silu", "o": "tanh"},
        "act_gate": {"e": "silu", "o": "tanh"},
        "weight_nn_hidden_neurons": [int(width) for width in radial["hs"][1:-1]],
        "self_connection_type": ["nequip" if hasattr(i, "fc_tensor_product") else "linear" for i in intros],
        "interaction_type": "nequip",
        "conv_denominator": 1.0,
        "train_denominator": False,
        "train_shift_scale": False,
        "use_bias_in_linear": any(biases),
        "_normalize_sph": bool(edges.spherical.sph.normalize),
        "readout_as_fcn": readout is not None,
        "readout_fcn_hidden_neurons": [int(width) for width in readout.fcn.hs[1:-1]]
        if readout is not None
        else [],
        "readout_fcn_activation": names[readout.fcn.layer0.act.f] if readout is not None else "silu",
    }


def _vendor_energies(network: VendorObject, graph: AtomGraph, modality: int | None) -> Tensor:
    """Energies per atom by the network itself, for one of its modalities if it has any; it works in float32 only."""
    network = deepcopy(network).float()
    types = torch.full((119,), -1)
    for number, row in network.type_map.items():
        types[number] = row
    data = {
        "edge_index": graph.edge_index.flip(0),
        "edge_vec": edge_vectors(graph).float(),
        "x": types[graph.atomic_numbers],
    }
    if modality is not None:
        network.set_is_batch_data(True)
        data |= {
            "modal_type": torch.tensor([modality]),
            "batch": torch.zeros(len(graph), dtype=torch.int64),
        }
    for name, module in network.named_children():
        if name not in ("reduce_total_enegy", "force_output"):
            data = module(data)
    return data["atomic_energy"].flatten()
