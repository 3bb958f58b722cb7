"""NequIP (Batzner et al., arXiv 2101.03164) of the package ``nequip``, version 0.19: checkpoints, packages, models.

A checkpoint of ``nequip-train`` is read without executing code as long as its model is built from scratch. Whatever holds
code of its own (packages, checkpoints that were fine-tuned from a package) is loaded by the package itself, if trusted.
"""

import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from ase.data import atomic_numbers as NUMBERS
from torch import Tensor

from ase_gffmerge.errors import FileFormatError
from ase_gffmerge.graphs.graph import AtomGraph, edge_vectors
from ase_gffmerge.integrations.base import (
    Adapter,
    ConvertedModel,
    VendorObject,
    converted,
)
from ase_gffmerge.integrations.nequip.io import find_network, layers_of, load_network
from ase_gffmerge.integrations.wrapped import on_cpu, one_number_of_scalars
from ase_gffmerge.models import Potential

if TYPE_CHECKING:
    from ase_gffmerge.integrations.nequip.model import NequIPPackage


class NequIPAdapter(Adapter):
    """Reads and writes models of the package ``nequip``."""

    vendor, models, package = "nequip", "NequIP", "nequip"
    architectures: ClassVar[dict[str, str]] = {
        "nequip-package": "ase_gffmerge.integrations.nequip.model:NequIPPackage"
    }

    def read(self, source: VendorObject, *, trust: bool = False) -> ConvertedModel:
        """Convert a checkpoint (``.ckpt``), a package (``.nequip.zip``) or a model in memory.

        Raises
        ------
        FileFormatError
            When the package is not installed, there is no such file, it holds code and is not trusted, or a model with parts
            that are not known here.
        """
        self.require_package()
        network = (
            load_network(Path(source), trust=trust)
            if isinstance(source, str | Path)
            else find_network(source)
        )
        return ConvertedModel(potential=_convert(network), vendor=self.vendor, version=version("nequip"))

    def vendor_content(self, potential: Potential) -> dict[str, VendorObject]:
        """A checkpoint that ``NequIPCalculator`` loads, without the state and the data of a training.

        Raises
        ------
        FileFormatError
            When there are self-connections of more elements than the embedding tells apart.
        """
        from ase_gffmerge.integrations.nequip.model import vendor_checkpoint

        return vendor_checkpoint(potential)  # type: ignore[arg-type]

    def require_merge_exportable(
        self, specialists: Sequence[Potential], *, wide_readout: bool, embeddings: bool
    ) -> None:
        """See :meth:`.Adapter.require_merge_exportable`; the embedding, which is averaged, has to tell elements apart."""
        from ase_gffmerge.integrations.nequip.model import features_of

        super().require_merge_exportable(specialists, wide_readout=wide_readout, embeddings=embeddings)
        species = sorted({z for potential in specialists for z in potential.species})
        rows = {
            z: [p.embedding[0, p.species.index(z)] for p in specialists if z in p.species] for z in species
        }
        table = torch.stack([torch.stack(found).mean(dim=0) for found in rows.values()]).cpu()
        features_of(torch.eye(len(table), dtype=torch.float64), table.double(), dtype=specialists[0].dtype)


ADAPTER = NequIPAdapter()


def _convert(network: VendorObject) -> "NequIPPackage":
    """A potential with the network's weights that was seen to compute the same."""
    from ase_gffmerge.integrations.nequip.model import NequIPPackage, NequIPPackageHyper, copy_weights

    network = on_cpu(network)
    names = list(network.per_type_energy_scale_shift.type_names)
    if unknown := [name for name in names if name not in NUMBERS]:
        raise FileFormatError(
            f"the model's types {', '.join(unknown)} are no chemical elements; models of other types are not read"
        )
    species = tuple(NUMBERS[name] for name in names)
    arguments = _arguments(network)
    hyper = NequIPPackageHyper(
        cutoff=float(network.edge_norm.r_max),
        channels=one_number_of_scalars([_n_scalars(layer) for layer in layers_of(network)], of="layers"),
        n_blocks=len(layers_of(network)),
        n_radial=int(network.bessel_encode.num_bessels),
        config=json.dumps(arguments, sort_keys=True),
    )
    return converted(
        lambda: NequIPPackage(hyper, species),
        lambda potential: copy_weights(potential, network, species),
        dtype=network.type_embed.embed_module.weight.dtype,
        vendor_energies=lambda graph: _vendor_energies(network, graph, species),
        vendor="nequip",
    )


def _n_scalars(layer: VendorObject) -> int:
    """Even scalars after a layer."""
    return int(layer.equivariant_nonlin.irreps_out.count("0e"))


def _arguments(network: VendorObject) -> dict[str, VendorObject]:
    """Arguments of ``FullNequIPGNNModel`` that make such a network."""
    layers, readout = layers_of(network), network.per_atom_energy_readout.mlp_module
    bessel, norm = network.bessel_encode, layers[0].conv.avg_num_neighbors_norm.norm_const
    for condition, what in (
        (bessel.trainable, "trainable Bessel functions"),
        (network.edge_norm._rmax_recip.numel() > 1, "a cutoff per pair of elements"),
        (norm.numel() > 1, "a number of neighbours per element"),
        (network.type_embed.categorical_graph_field_embed_modules, "an embedding of more than elements"),
    ):
        if condition:
            raise FileFormatError(
                f"the NequIP model has {what}, which is not supported; leave it out of the merge"
            )
    return {
        "r_max": float(network.edge_norm.r_max),
        "irreps_edge_sh": str(network.spharm.irreps_edge_sh),
        "type_embed_num_features": int(network.type_embed.embed_module.embedding_dim),
        "feature_irreps_hidden": [str(layer.feature_irreps_hidden) for layer in layers],
        "radial_mlp_depth": [len(layer.conv.edge_mlp.dims) - 2 for layer in layers],
        "radial_mlp_width": [int(layer.conv.edge_mlp.dims[1]) for layer in layers],
        "num_bessels": int(bessel.num_bessels),
        "polynomial_cutoff_p": float(bessel.cutoff.p),
        "avg_num_neighbors": float(norm.double().item() ** -2),
        "convnet_sc": any(layer.conv.sc is not None for layer in layers),
        "convnet_resnet": any(layer.resnet for layer in layers),
        "learnable_shift": layers[0].conv.sc is not None,
        "convnet_nonlinearity_type": "gate" if hasattr(layers[0].equivariant_nonlin, "act_gates") else "norm",
        "readout_mlp_hidden_layers_depth": len(readout.dims) - 2,
        "readout_mlp_hidden_layers_width": int(readout.dims[1]),
        "readout_mlp_nonlinearity": "silu" if readout.is_nonlinear else None,
        "zbl": _repulsion(network),
    }


def _repulsion(network: VendorObject) -> dict[str, VendorObject] | None:
    pair = getattr(network, "pair_potential", None)
    if pair is None:
        return None
    if not hasattr(pair, "_qqr2exesquare"):
        raise FileFormatError(
            f"the NequIP model has the pair potential {type(pair).__name__}, only ZBL is read; leave it out of the merge"
        )
    units = "metal" if float(pair._qqr2exesquare) < 100 else "real"
    return {"units": units, "power": float(pair.cutoff.p)}


def _vendor_energies(network: VendorObject, graph: AtomGraph, species: tuple[int, ...]) -> Tensor:
    """Energies per atom by the network itself."""
    types = torch.full((119,), -1)
    types[list(species)] = torch.arange(len(species))
    data = {
        "edge_index": graph.edge_index.flip(0),
        "edge_vectors": edge_vectors(graph).double(),
        "atom_types": types[graph.atomic_numbers],
    }
    for name, module in network.named_children():
        if name != "total_energy_sum":
            data = module(data)
    return data["atomic_energy"].flatten()
