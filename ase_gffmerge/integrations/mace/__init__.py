"""MACE (Batatia et al., arXiv 2206.07697) of the package ``mace-torch``, version 0.3: models, calculators and files.

The package's own files are pickled modules, whose loading executes code from the file. What is read without trust is a
dictionary of ``torch.save`` with ``state_dict`` and the ``config`` that the package extracts from a model:

    from mace.tools.scripts_utils import extract_config_mace_model
    torch.save({"config": extract_config_mace_model(model), "state_dict": model.state_dict()}, path)
"""

import json
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ase_gffmerge.errors import FileFormatError, first_line
from ase_gffmerge.graphs.graph import AtomGraph
from ase_gffmerge.integrations.base import Adapter, ConvertedModel, VendorObject, converted
from ase_gffmerge.models import Potential

if TYPE_CHECKING:
    from ase_gffmerge.integrations.mace.model import MACEPackage


class MACEAdapter(Adapter):
    """Reads and writes models of the package ``mace-torch``."""

    vendor, models, package, distribution = "mace", "MACE", "mace", "mace-torch"
    choice = "head"
    architectures: ClassVar[dict[str, str]] = {
        "mace-package": "ase_gffmerge.integrations.mace.model:MACEPackage"
    }

    def _read(self, source: VendorObject, name: str | None, *, trust: bool) -> ConvertedModel:
        """A file, a ``MACECalculator`` or a model in memory."""
        self.require_package()
        from ase_gffmerge.integrations.mace.io import find_network, load_network

        if isinstance(source, str | Path):
            source = load_network(Path(source), trust=trust)
        network, row = find_network(source, name)
        return ConvertedModel(
            potential=_convert(network, row), vendor="mace-torch", version=version("mace-torch")
        )

    def vendor_content(self, potential: Potential) -> VendorObject:
        """The package's model, which ``MACECalculator`` unpickles."""
        from ase_gffmerge.integrations.mace.model import vendor_network

        return vendor_network(potential)  # type: ignore[arg-type]

    def write(self, potential: Potential, path: Path) -> Path:
        """See :meth:`.Adapter.write`; without the warnings of the compiler of TorchScript, which e3nn 0.4 calls."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return super().write(potential, path)

    def read_back(self, path: Path, potential: Potential) -> Potential:
        """See :meth:`.Adapter.read_back`; the pickle is the one that was just made here."""
        return self.read(path, trust=True).potential


ADAPTER = MACEAdapter()

RADIAL_TYPES = {"BesselBasis": "bessel", "GaussianBasis": "gaussian", "ChebychevBasis": "chebyshev"}
"""Classes of radial functions and what the package's builder calls them."""


def _convert(network: VendorObject, head: int) -> "MACEPackage":
    """A potential with the network's weights that was seen to compute the same as the network with that head."""
    from ase_gffmerge.integrations.mace.io import single_head
    from ase_gffmerge.integrations.mace.model import MACEPackage, MACEPackageHyper, copy_weights

    try:
        single = single_head(network, head)
        species = tuple(single.atomic_numbers.tolist())
        hyper = MACEPackageHyper(
            cutoff=float(single.r_max),
            channels=int(single.node_embedding.linear.irreps_out.dim),
            n_blocks=len(single.interactions),
            n_radial=int(single.radial_embedding.out_dim),
            config=json.dumps(_arguments(single), sort_keys=True),
        )
        return converted(
            lambda: MACEPackage(hyper, species),
            lambda potential: copy_weights(potential, single, species),
            dtype=single.node_embedding.linear.weight.dtype,
            vendor_energies=lambda graph: _vendor_energies(network, head, graph),
            vendor="MACE",
        )
    except FileFormatError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise FileFormatError(
            f"the MACE has parts that mace-torch {version('mace-torch')} does not build ({first_line(error)}); leave it out "
            "of the merge"
        ) from None


def _arguments(network: VendorObject) -> dict[str, VendorObject]:
    """Arguments of the package's ``MACE`` that make such a network, with names for classes."""
    from mace.tools.scripts_utils import extract_radial_MLP

    radial, readout = network.radial_embedding, network.readouts[-1]
    contractions = [product.symmetric_contractions.contractions[0] for product in network.products]
    edge_irreps = getattr(network, "edge_irreps", None)
    transform = getattr(radial, "distance_transform", None)
    return {
        "r_max": float(network.r_max),
        "num_bessel": int(radial.out_dim),
        "num_polynomial_cutoff": int(radial.cutoff_fn.p),
        "max_ell": int(network.spherical_harmonics._lmax),
        "interaction_cls": type(network.interactions[-1]).__name__,
        "interaction_cls_first": type(network.interactions[0]).__name__,
        "num_interactions": len(network.interactions),
        "hidden_irreps": str(network.products[0].linear.irreps_out),
        "MLP_irreps": str(getattr(readout, "hidden_irreps", "16x0e")),
        "correlation": [len(contraction.weights) + 1 for contraction in contractions],
        "gate": _gate(readout),
        "pair_repulsion": hasattr(network, "pair_repulsion_fn"),
        "apply_cutoff": bool(getattr(network, "apply_cutoff", True)),
        "use_reduced_cg": bool(getattr(network, "use_reduced_cg", False)),
        "use_so3": bool(getattr(network, "use_so3", False)),
        "use_agnostic_product": bool(getattr(network, "use_agnostic_product", False)),
        "use_last_readout_only": len(network.readouts) < len(network.interactions),
        "distance_transform": type(transform).__name__.removesuffix("Transform") if transform else "None",
        "edge_irreps": str(edge_irreps) if edge_irreps is not None else None,
        "use_edge_irreps_first": bool(getattr(network, "use_edge_irreps_first", False)),
        "radial_MLP": [int(width) for width in extract_radial_MLP(network)],
        "radial_type": RADIAL_TYPES[type(radial.bessel_fn).__name__],
    }


def _gate(readout: VendorObject) -> str:
    """Name of the activation of the last readout."""
    from mace.modules import gate_dict

    if not hasattr(readout, "non_linearity"):
        return "None"
    function = readout.non_linearity.acts[0].f
    names = [name for name, known in gate_dict.items() if known is function]
    if not names:
        raise FileFormatError(
            f"the readout of this MACE has the activation {getattr(function, '__name__', function)}, which is not read"
        )
    return names[0]


def _vendor_energies(network: VendorObject, head: int, graph: AtomGraph) -> Tensor:
    """Energies per atom by the network itself, of atoms without a cell."""
    like, device = network.node_embedding.linear.weight, network.node_embedding.linear.weight.device
    rows = torch.full((119,), -1)
    rows[network.atomic_numbers.cpu()] = torch.arange(len(network.atomic_numbers))
    n_atoms, n_edges = len(graph), graph.n_edges
    data = {
        "positions": graph.positions,
        "cell": torch.zeros(3, 3),
        "edge_index": graph.edge_index,
        "shifts": torch.zeros(n_edges, 3),
        "unit_shifts": torch.zeros(n_edges, 3),
        "node_attrs": torch.eye(len(network.atomic_numbers))[rows[graph.atomic_numbers]],
        "batch": torch.zeros(n_atoms, dtype=torch.int64),
        "ptr": torch.tensor([0, n_atoms]),
        "head": torch.tensor([head]),
    }
    moved = {k: v.to(device, like.dtype if v.is_floating_point() else v.dtype) for k, v in data.items()}
    found: Tensor = network(moved, compute_force=False)["node_energy"]
    return found.detach().cpu()
