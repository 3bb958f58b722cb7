"""NequIP as the package ``nequip`` builds it (Batzner et al., arXiv 2101.03164), its layers wrapped as stages.

Its self-connections, tensor products with the element embedding, become :class:`.ElementLinear`, which compute the same.
Bessel functions, cutoff and spherical harmonics are functions of the edge vectors alone.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

import torch
from ase.data import chemical_symbols
from e3nn.o3 import SphericalHarmonics
from nequip.model.nequip_models import FullNequIPGNNModel
from nequip.model.utils import _IS_BUILDING_MODEL
from nequip.nn import ScalarMLPFunction
from nequip.nn.pair_potential import ZBL
from torch import Tensor, nn

from ase_gffmerge.graphs.graph import Topology
from ase_gffmerge.integrations.base import VendorObject
from ase_gffmerge.integrations.nequip import layers  # noqa: F401 (registers the package's layers)
from ase_gffmerge.integrations.wrapped import (
    ChainPotential,
    Entries,
    ModuleStage,
    PackageHyper,
    ScaledReadout,
)
from ase_gffmerge.models.base import HyperParameters, State
from ase_gffmerge.models.chgnet import envelope
from ase_gffmerge.models.layers import package_mode
from ase_gffmerge.models.layers.linear import ElementLinear

FEATURES = ("node_features",)


class NequIPPackageHyper(PackageHyper):
    """Hyper-parameters of :class:`NequIPPackage`; the arguments are those of the package's ``FullNequIPGNNModel``."""


@contextmanager
def nested_builders() -> Iterator[None]:
    """Let the package's builders work as if one of them called them, without the global state that changes torch's."""
    token = _IS_BUILDING_MODEL.set(True)
    try:
        yield
    finally:
        _IS_BUILDING_MODEL.reset(token)


def build_network(arguments: dict[str, VendorObject], species: tuple[int, ...]) -> VendorObject:
    """The package's chain of modules with random weights, in float64.

    Parameters
    ----------
    arguments
        Of ``FullNequIPGNNModel``.
    species
        Atomic numbers in the order of its types.
    """
    names = [chemical_symbols[z] for z in species]
    unit = {"per_type_energy_scales": 1.0, "per_type_energy_shifts": 0.0}
    known = {key: value for key, value in arguments.items() if key != "zbl"}
    with package_mode(), nested_builders():
        return FullNequIPGNNModel(type_names=names, **unit, **known).func


class Repulsion(nn.Module):
    """The package's short-range repulsion of Ziegler, Biersack and Littmark, in half the energy per direction of an edge.

    Parameters
    ----------
    species
        Atomic numbers.
    units, power
        ``metal`` (eV) or ``real`` (kcal/mol), and the power of its cutoff function.
    """

    def __init__(self, species: tuple[int, ...], *, units: str, power: float):
        super().__init__()
        names = [chemical_symbols[z] for z in species]
        irreps = {"normed_edge_lengths": "1x0e"}
        with package_mode():
            self.module = ZBL(names, names, units, polynomial_cutoff_p=power, irreps_in=irreps)

    def forward(self, vectors: Tensor, graph: Topology, species: Tensor, cutoff: float) -> Tensor:
        """Energies (n_atoms,) in eV.

        Parameters
        ----------
        vectors : (n_edges, 3)
            Edge vectors in Å.
        graph
            Edges and elements.
        species : (n_atoms,)
            Rows of the elements.
        cutoff
            Radius in Å.
        """
        lengths = vectors.square().sum(dim=1, keepdim=True).sqrt()
        self.module.model_dtype = vectors.dtype
        found = self.module(
            {
                "edge_vectors": vectors,
                "edge_lengths": lengths,
                "normed_edge_lengths": lengths / cutoff,
                "edge_index": graph.edge_index.flip(0),
                "atom_types": species,
            }
        )
        return found["atomic_energy"].squeeze(-1)


class NequIPPackage(ChainPotential):
    """A NequIP of the package ``nequip``.

    Parameters
    ----------
    hyper
        Hyper-parameters.
    species
        Atomic numbers.
    """

    architecture: ClassVar[str] = "nequip-package"
    Hyper: ClassVar[type[HyperParameters]] = NequIPPackageHyper
    hyper: NequIPPackageHyper
    edge_entries = ("edge_embedding", "edge_attrs")

    def __init__(self, hyper: NequIPPackageHyper, species: tuple[int, ...]):
        arguments = hyper.arguments
        super().__init__(hyper, species, embedding_width=arguments["type_embed_num_features"])
        network = build_network(arguments, self.species)
        self._power = float(arguments["polynomial_cutoff_p"])
        with package_mode():
            self.harmonics = SphericalHarmonics(
                arguments["irreps_edge_sh"], normalize=True, normalization="component"
            )
        for block in range(hyper.n_blocks):
            layer = getattr(network, f"layer{block}_convnet")
            if (product := layer.conv.sc) is not None:
                layer.conv.sc = ElementLinear(product.irreps_in1, product.irreps_out, self.species)
            self.stages.append(ModuleStage(layer, reads=FEATURES, writes=FEATURES))
        self.repulsion = Repulsion(self.species, **arguments["zbl"]) if arguments.get("zbl") else None
        self._seal()

    def own_readout(self) -> nn.Module:
        """The package's network on the scalars of the last layer."""
        arguments = self.hyper.arguments
        with package_mode():
            network = ScalarMLPFunction(
                input_dim=self.hyper.channels,
                output_dim=1,
                hidden_layers_depth=arguments["readout_mlp_hidden_layers_depth"],
                hidden_layers_width=arguments["readout_mlp_hidden_layers_width"],
                nonlinearity=arguments["readout_mlp_nonlinearity"],
                bias=False,
                forward_weight_init=True,
            )
        return ScaledReadout(network, len(self.species))

    def indices(self, vectors: Tensor, graph: Topology) -> Entries:
        """Elements in the place of their attributes; the package's edges run from the receiving atom."""
        numbers = graph.atomic_numbers
        return {"edge_index": graph.edge_index.flip(0), "atom_types": numbers, "node_attrs": numbers}

    def edge_functions(self, vectors: Tensor) -> State:
        """Bessel functions times the cutoff (DimeNet, arXiv 2003.03123, eqs. 7 and 8), and spherical harmonics."""
        x = vectors.square().sum(dim=1, keepdim=True).sqrt() / self.hyper.cutoff
        n = torch.arange(1, self.hyper.n_radial + 1, dtype=vectors.dtype, device=vectors.device)
        bessel = torch.sinc(x * n) * n * (2 * math.pi / self.hyper.cutoff**2)
        return bessel * envelope(x, self._power), self.harmonics(vectors)

    def repulsion_energies(self, vectors: Tensor, graph: Topology) -> Tensor | None:
        """The package's."""
        if self.repulsion is None:
            return None
        energies: Tensor = self.repulsion(
            vectors, graph, self.species_row[graph.atomic_numbers], self.hyper.cutoff
        )
        return energies
