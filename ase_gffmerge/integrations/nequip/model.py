"""NequIP as the package ``nequip`` builds it (Batzner et al., arXiv 2101.03164), its layers wrapped as stages.

Its self-connections, tensor products with the element embedding, become :class:`.ElementLinear`, which compute the same.
Bessel functions, cutoff and spherical harmonics are functions of the edge vectors alone.

Weights of a NequIP of the package ``nequip``: into a potential, and back into a checkpoint.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

import torch
from ase.data import chemical_symbols
from e3nn.o3 import SphericalHarmonics
from nequip.model import FullNequIPGNNModel
from nequip.model.utils import _IS_BUILDING_MODEL
from nequip.nn import ScalarMLPFunction
from nequip.nn.pair_potential import ZBL
from torch import Tensor, nn

from ase_gffmerge.errors import FileFormatError
from ase_gffmerge.graphs.graph import Topology
from ase_gffmerge.integrations.base import VendorObject, per_element, rows_of_elements
from ase_gffmerge.integrations.nequip.io import MODEL, ZBL_TARGET, layers_of
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
from ase_gffmerge.models.layers.equivariant import EdgeSums
from ase_gffmerge.models.layers.linear import ElementLinear, element_weights, write_product

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
                "edge_index": graph.edge_index.flip(0).contiguous(),
                "atom_types": species,
            }
        )
        return found["atomic_energy"].squeeze(-1)


class SummedProduct(EdgeSums):
    """:class:`.EdgeSums` with the arguments of the package's ``TensorProductScatter``."""

    def forward(  # type: ignore[override]
        self, x: Tensor, edge_attr: Tensor, edge_weight: Tensor, edge_dst: Tensor, edge_src: Tensor
    ) -> Tensor:
        """Messages (n_atoms, irreps_out.dim).

        Parameters
        ----------
        x, edge_attr, edge_weight
            Features of the atoms, harmonics and weights of the edges.
        edge_dst, edge_src
            Receivers and senders (n_edges,).
        """
        return super().forward(x, edge_attr, edge_weight, torch.stack([edge_src, edge_dst]))


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

    @staticmethod
    def served(part: nn.Module) -> nn.Module | None:
        """Tensor products that are summed over neighbours."""
        product = getattr(part, "tp", None)
        return SummedProduct(product) if product is not None and EdgeSums.can_replace(product) else None

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


TRAINING_MODULE = "nequip.train.NequIPLightningModule"
"""The package's class that reads a checkpoint."""

TOLERANCE = 1e-5
"""Of the weights of a self-connection, relative to the largest: above round-off in float32."""


@torch.no_grad()
def copy_weights(potential: NequIPPackage, network: VendorObject, species: tuple[int, ...]) -> None:
    """Set all weights: rows of elements in the order of atomic numbers, self-connections per element.

    Parameters
    ----------
    potential
        Written in place.
    network
        The package's chain of modules.
    species
        Atomic numbers in the order of its types.
    """
    table = network.type_embed.embed_module.weight[rows_of_elements(species)].double()
    potential.embedding.copy_(table[None])
    own = dict(potential.named_parameters())
    for name, value, product in _parameters(network):
        own[name].copy_(value if product is None else element_weights(product, table))
    scaling = network.per_type_energy_scale_shift
    if scaling.has_scales:
        own["readout.scale"].copy_(per_element(scaling.scales, species))
    if scaling.has_shifts:
        potential.references.copy_(per_element(scaling.shifts, species))


@torch.no_grad()
def vendor_model(potential: NequIPPackage) -> VendorObject:
    """The package's model with the potential's weights; undoes :func:`copy_weights`.

    A self-connection is the product of the features with the embedding of the element: of the weights that give what it has
    to be for every element, the smallest are taken.

    Raises
    ------
    FileFormatError
        When no weights do, as elements are too many or too much alike.
    """
    settings = ("_target_", "seed", "model_dtype")
    arguments = {key: value for key, value in _builder(potential).items() if key not in settings}
    with package_mode(potential.dtype), nested_builders():
        model: VendorObject = FullNequIPGNNModel(**arguments)
    own = {name: value.cpu().double() for name, value in potential.named_parameters()}
    table = own["embedding"][0]
    model.func.type_embed.embed_module.weight.copy_(table)
    for name, value, product in _parameters(model.func):
        if product is None:
            value.copy_(own[name])
        else:
            write_product(product, features_of(own[name], table, dtype=potential.dtype))
    return model


def features_of(weights: Tensor, table: Tensor, *, dtype: torch.dtype) -> Tensor:
    """Weights (n_features, size) that give, times the embedding, those of the elements.

    Parameters
    ----------
    weights : (n_species, size)
        Of the elements.
    table : (n_species, n_features)
        The embedding, in the same type.
    dtype
        Of the weights in a file.

    Raises
    ------
    FileFormatError
        When there are none.
    """
    found = torch.linalg.pinv(table) @ weights
    difference = (table @ found.to(dtype).double() - weights).abs().max()
    if not difference <= TOLERANCE * weights.abs().max():
        raise FileFormatError(
            f"the potential has self-connections of their own for its {len(table)} elements, which NequIP makes of the "
            f"{table.shape[1]} features of its embedding; they are too few, or too much alike: save it as .safetensors, or "
            "merge models with a larger type_embed_num_features"
        )
    return found


def vendor_checkpoint(potential: NequIPPackage) -> dict[str, VendorObject]:
    """What the package loads: weights, and the configuration that builds a model for them, of plain values.

    Raises
    ------
    FileFormatError
        See :func:`vendor_model`.
    """
    import lightning
    from nequip.utils import get_current_code_versions

    state = vendor_model(potential).state_dict(prefix=MODEL.removesuffix("func."))
    return {
        "state_dict": {**state, "run_stage": torch.zeros(1, dtype=torch.long)},
        "hyper_parameters": {
            "model": _builder(potential),
            "num_datasets": {"train": 1, "val": 0, "test": 0, "predict": 0},
            "info_dict": {
                "versions": get_current_code_versions(verbose=False),
                "training_module": {"_target_": TRAINING_MODULE},
            },
        },
        "pytorch-lightning_version": lightning.__version__,
    }


def _builder(potential: NequIPPackage) -> dict[str, VendorObject]:
    """The package's function that builds such a model, and its arguments."""
    arguments = potential.hyper.arguments
    names = [chemical_symbols[z] for z in potential.species]
    scales = potential.get_parameter("readout.scale").tolist()
    repulsion = None
    if zbl := arguments.pop("zbl", None):
        own = {"units": zbl["units"], "polynomial_cutoff_p": zbl["power"]}
        repulsion = {"_target_": ZBL_TARGET, "chemical_species": names, **own}
    return {
        "_target_": "nequip.model.FullNequIPGNNModel",
        "seed": 0,
        "model_dtype": str(potential.dtype).removeprefix("torch."),
        "type_names": names,
        "per_type_energy_scales": dict(zip(names, scales, strict=True)),
        "per_type_energy_shifts": dict(zip(names, potential.references.tolist(), strict=True)),
        "pair_potential": repulsion,
        **arguments,
    }


def _parameters(network: VendorObject) -> Iterator[tuple[str, Tensor, VendorObject]]:
    """The network's parameters under the potential's names, and the tensor product with elements that one belongs to.

    Those of the embedding and of the energy scales and shifts are left out.
    """
    for block, layer in enumerate(layers_of(network)):
        for name, value in layer.named_parameters():
            yield f"stages.{block}.module.{name}", value, layer.conv.sc if name == "conv.sc.weight" else None
    for name, value in network.per_atom_energy_readout.mlp_module.named_parameters():
        yield f"readout.module.{name}", value, None
