"""MACE as the package ``mace-torch`` builds it (Batatia et al., arXiv 2206.07697), its layers wrapped as stages.

Self-connections with one-hot elements become :class:`.ElementLinear`, which compute the same. The linear layers that follow
the sums over neighbours are divided by the mean number of neighbours, and the last ones of the readouts multiplied by the
scale of the energies.

Weights of a MACE of the package ``mace-torch``: into a potential, and back into the package's model.
"""

import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from copy import copy, deepcopy
from typing import ClassVar

import numpy as np
import torch
from e3nn.o3 import FullyConnectedTensorProduct, Irreps
from torch import Tensor, nn
from torch.nn.functional import one_hot

from ase_gffmerge.graphs.graph import Topology
from ase_gffmerge.integrations.base import VendorObject, per_element, rows_of_elements
from ase_gffmerge.integrations.wrapped import (
    ChainPotential,
    Entries,
    ModuleStage,
    PackageHyper,
    SummedReadout,
)
from ase_gffmerge.models.base import HyperParameters, State
from ase_gffmerge.models.layers import package_mode
from ase_gffmerge.models.layers.equivariant import EdgeSums, SymmetricPowers
from ase_gffmerge.models.layers.linear import ElementLinear, element_weights, write_product

with redirect_stdout(sys.stderr):  # on which the package tells at import what it does not find
    from mace.modules import (
        MACE,
        LinearReadoutBlock,
        NonLinearReadoutBlock,
        ScaleShiftMACE,
        ZBLBasis,
        gate_dict,
        interaction_classes,
    )
    from mace.modules.symmetric_contraction import EmptyParam

FEATURES = ("node_feats",)

TABLES = ("source_embedding", "target_embedding")
"""Linear layers of one-hot vectors in some interactions."""


class MACEPackageHyper(PackageHyper):
    """Hyper-parameters of :class:`MACEPackage`; the arguments are those of the package's ``MACE`` with names for classes."""


def build_network(
    arguments: Mapping[str, VendorObject],
    species: Sequence[int],
    *,
    references: Sequence[float] | None = None,
    scale: float | None = None,
) -> nn.Module:
    """The package's model with random weights, of torch's default type.

    Parameters
    ----------
    arguments
        See :class:`MACEPackageHyper`.
    species
        Atomic numbers in the order of its types.
    references
        Energy per element in eV; default: zero.
    scale
        Of the energies of the network; default: a model without scale.
    """
    classes = {
        key: interaction_classes[arguments[key]] for key in ("interaction_cls", "interaction_cls_first")
    }
    irreps = {key: Irreps(arguments[key]) for key in ("hidden_irreps", "MLP_irreps")}
    own = {
        "num_elements": len(species),
        "atomic_numbers": list(species),
        "atomic_energies": np.array(references or [0.0] * len(species)),
        "avg_num_neighbors": 1.0,
        "gate": gate_dict[arguments["gate"]],
        "edge_irreps": Irreps(arguments["edge_irreps"]) if arguments["edge_irreps"] else None,
    }
    known = {**arguments, **classes, **irreps, **own}
    if scale is None:
        return MACE(**known)
    return ScaleShiftMACE(atomic_inter_scale=scale, atomic_inter_shift=0.0, **known)


class OneHot(nn.Module):
    """One-hot vectors of elements.

    Parameters
    ----------
    species
        Atomic numbers.
    """

    atomic_numbers: Tensor
    species_row: Tensor

    def __init__(self, species: tuple[int, ...]):
        super().__init__()
        rows = torch.full((119,), -1)
        rows[list(species)] = torch.arange(len(species))
        self.register_buffer("atomic_numbers", torch.tensor(species), persistent=False)
        self.register_buffer("species_row", rows, persistent=False)

    def forward(self, atomic_numbers: Tensor, like: Tensor) -> Tensor:
        """Map atomic numbers (n_atoms,) to vectors (n_atoms, n_species) of the type of ``like``."""
        return one_hot(self.species_row[atomic_numbers], len(self.atomic_numbers)).to(like.dtype)


class ElementTable(nn.Module):
    """One row per element, picked by one-hot vectors.

    Parameters
    ----------
    n_species, width
        Number of rows and their length.
    """

    def __init__(self, n_species: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n_species, width))

    def forward(self, node_attrs: Tensor) -> Tensor:
        """Map one-hot vectors (n_atoms, n_species) to rows (n_atoms, width)."""
        return node_attrs @ self.weight


class Layer(nn.Module):
    """An interaction of the package with its radial functions and the symmetric contraction that follows it.

    Parameters
    ----------
    network
        The package's model; its parts are taken out of it.
    index
        Which layer.
    species
        Atomic numbers.
    """

    def __init__(self, network: VendorObject, index: int, species: tuple[int, ...]):
        super().__init__()
        self.radial = deepcopy(network.radial_embedding)
        self.interaction, self.product = network.interactions[index], network.products[index]
        product: VendorObject = getattr(self.interaction, "skip_tp", None)
        self.by_element = isinstance(product, FullyConnectedTensorProduct)
        if self.by_element:
            self.interaction.skip_tp = ElementLinear(product.irreps_in1, product.irreps_out, species)
        for name in TABLES:
            if (linear := getattr(self.interaction, name, None)) is not None:
                setattr(self.interaction, name, ElementTable(len(species), linear.irreps_out.dim))
        self.elements = OneHot(species)

    def forward(self, data: Entries) -> Entries:
        """Replace the entry ``node_feats``."""
        edges, vectors = data["edge_index"], data["edge_vectors"]
        elements = self.elements(data["atomic_numbers"], vectors)
        lengths = vectors.square().sum(dim=1, keepdim=True).sqrt()
        radial, cutoff = self.radial(lengths, elements, edges, self.elements.atomic_numbers)
        features, skip = self.interaction(
            node_attrs=data["atomic_numbers"] if self.by_element else elements,
            node_feats=data["node_feats"],
            edge_attrs=data["edge_attrs"],
            edge_feats=radial,
            edge_index=edges,
            cutoff=cutoff,
        )
        return {"node_feats": self.product(node_feats=features, sc=skip, node_attrs=elements)}


class Repulsion(nn.Module):
    """The package's short-range repulsion of Ziegler, Biersack and Littmark, times the scale of the energies.

    Parameters
    ----------
    species
        Atomic numbers.
    power
        Of its cutoff function.
    """

    def __init__(self, species: tuple[int, ...], *, power: int):
        super().__init__()
        self.module = ZBLBasis(p=power)
        self.scale = nn.Parameter(torch.ones(1))
        self.elements = OneHot(species)

    def forward(self, vectors: Tensor, graph: Topology) -> Tensor:
        """Energies (n_atoms,) in eV."""
        lengths = vectors.square().sum(dim=1, keepdim=True).sqrt()
        elements = self.elements(graph.atomic_numbers, vectors)
        energies: Tensor = self.module(lengths, elements, graph.edge_index, self.elements.atomic_numbers)
        return energies * self.scale


class MACEPackage(ChainPotential):
    """A MACE of the package ``mace-torch``.

    Parameters
    ----------
    hyper
        Hyper-parameters.
    species
        Atomic numbers.
    """

    architecture: ClassVar[str] = "mace-package"
    Hyper: ClassVar[type[HyperParameters]] = MACEPackageHyper
    hyper: MACEPackageHyper
    edge_entries = ("edge_vectors", "edge_attrs")

    def __init__(self, hyper: MACEPackageHyper, species: tuple[int, ...]):
        super().__init__(hyper, species, embedding_width=hyper.channels)
        arguments = hyper.arguments
        with package_mode():
            network: VendorObject = build_network(arguments, self.species)
            self.harmonics = network.spherical_harmonics
            for index in range(hyper.n_blocks):
                layer = Layer(network, index, self.species)
                self.stages.append(ModuleStage(layer, reads=FEATURES, writes=FEATURES))
            power = arguments["num_polynomial_cutoff"]
            self.repulsion = Repulsion(self.species, power=power) if arguments["pair_repulsion"] else None
        _replace_empty_parameters(self)
        self._seal()

    def own_readout(self) -> nn.Module:
        """The package's readouts on the scalars: linear ones, and after the last of several layers a network."""
        arguments, scalars, one = self.hyper.arguments, Irreps(f"{self.hyper.channels}x0e"), Irreps("1x0e")
        n_linear = 1 if self.hyper.n_blocks == 1 else self.hyper.n_blocks - 1
        if arguments["use_last_readout_only"]:
            n_linear = 0
        with package_mode():
            parts: list[nn.Module] = [LinearReadoutBlock(scalars, one) for _ in range(n_linear)]
            if self.hyper.n_blocks > 1:
                hidden = Irreps(arguments["MLP_irreps"])
                parts.append(NonLinearReadoutBlock(scalars, hidden, gate_dict[arguments["gate"]], one))
        return SummedReadout(parts)

    def element_parameters(self) -> tuple[str, ...]:
        """Self-connections, embeddings and the weights of symmetric contractions."""
        own = [f"{name}.weight" for name, module in self.named_modules() if isinstance(module, ElementTable)]
        if not self.hyper.arguments["use_agnostic_product"]:
            own += [name for name, _ in self.named_parameters() if ".symmetric_contractions." in name]
        return (*super().element_parameters(), *own)

    @staticmethod
    def served(part: nn.Module) -> nn.Module | None:
        """Interactions, which hand a sum over neighbours to one module as the package provides for, and contractions."""
        contractions: VendorObject = getattr(part, "contractions", ())
        if contractions and all(c.correlation <= 3 for c in contractions):
            return SymmetricPowers(
                [[_symbols(c, power) for power in range(1, c.correlation + 1)] for c in contractions],
                [[*reversed(list(c.weights)), c.weights_max] for c in contractions],
            )
        product = getattr(part, "conv_tp", None)
        if product is None or not EdgeSums.can_replace(product):
            return None
        twin: VendorObject = copy(part)
        twin._modules = {**part._modules, "conv_tp": EdgeSums(product)}
        twin.conv_fusion = True
        return twin

    def indices(self, vectors: Tensor, graph: Topology) -> Entries:
        """Elements and edges, from sender to receiver as in the package."""
        return {"edge_index": graph.edge_index, "atomic_numbers": graph.atomic_numbers}

    def edge_functions(self, vectors: Tensor) -> State:
        """Edge vectors and their spherical harmonics; the package's vectors point from sender to receiver."""
        return vectors, self.harmonics(-vectors)

    def repulsion_energies(self, vectors: Tensor, graph: Topology) -> Tensor | None:
        """The package's, times the scale of the energies."""
        return None if self.repulsion is None else self.repulsion(vectors, graph)


def _symbols(contraction: VendorObject, power: int) -> Tensor:
    """Coupling tensor of a power (2 l + 1, n, ..., n, n_weights)."""
    tensor: Tensor = contraction.U_tensors(power)
    return tensor if tensor.ndim == power + 2 else tensor[None]


def _replace_empty_parameters(root: nn.Module) -> None:
    """Make plain parameters of the package's own kind for contractions without paths, which cannot be copied."""
    for module in root.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if isinstance(parameter, EmptyParam):
                module.register_parameter(name, nn.Parameter(parameter.detach().clone()))


@torch.no_grad()
def copy_weights(potential: MACEPackage, network: VendorObject, species: tuple[int, ...]) -> None:
    """Set all weights: rows of elements in the order of atomic numbers, self-connections per element.

    The mean number of neighbours goes into the linear layers after the sums over them.

    Parameters
    ----------
    potential
        Written in place.
    network
        The package's model, with one head.
    species
        Atomic numbers in the order of its types.
    """
    order = rows_of_elements(species)
    linear = network.node_embedding.linear
    one_hot = torch.eye(len(species)).to(linear.weight)
    potential.embedding.copy_(linear(one_hot)[order][None])
    own = dict(potential.named_parameters())
    for t, parts in enumerate(zip(network.interactions, network.products, strict=True)):
        for part, module in zip(("interaction", "product"), parts, strict=True):
            for name, value in module.named_parameters():
                own[f"stages.{t}.module.{part}.{name}"].copy_(_own_weight(module, name, value, order))
    scale, shift = _scale_and_shift(network)
    for i, readout in enumerate(network.readouts):
        for name, value in readout.named_parameters():
            last = not name.startswith("linear_1")
            own[f"readout.module.{i}.{name}"].copy_(value * scale if last else value)
    energies = network.atomic_energies_fn.atomic_energies
    potential.references.copy_(per_element(energies, species) + shift)
    if potential.repulsion is not None:
        potential.repulsion.scale.fill_(scale)


def _scale_and_shift(network: VendorObject) -> tuple[float, float]:
    """Factor of the energies of the network, and what is added to them per atom, in eV."""
    if not hasattr(network, "scale_shift"):
        return 1.0, 0.0
    return float(network.scale_shift.scale), float(network.scale_shift.shift)


@torch.no_grad()
def vendor_network(potential: MACEPackage) -> nn.Module:
    """The package's model with the potential's weights, in their type."""
    species, repulsion = potential.species, potential.repulsion
    scale = 1.0 if repulsion is None else float(repulsion.scale)
    before = torch.get_default_dtype()
    torch.set_default_dtype(potential.dtype)
    try:
        references = potential.references.tolist()
        network: VendorObject = build_network(
            potential.hyper.arguments, species, references=references, scale=scale
        )
    finally:
        torch.set_default_dtype(before)
    linear = network.node_embedding.linear
    linear.weight.copy_(potential.embedding[0].flatten() / linear.instructions[0].path_weight)
    own = dict(potential.named_parameters())
    for t, parts in enumerate(zip(network.interactions, network.products, strict=True)):
        for part, module in zip(("interaction", "product"), parts, strict=True):
            for name, value in module.named_parameters():
                _write_weight(module, name, value, own[f"stages.{t}.module.{part}.{name}"])
    for i, readout in enumerate(network.readouts):
        for name, value in readout.named_parameters():
            weight = own[f"readout.module.{i}.{name}"]
            value.copy_(weight if name.startswith("linear_1") else weight / scale)
    return network.cpu().eval()


def _write_weight(module: VendorObject, name: str, value: Tensor, weight: Tensor) -> None:
    """Set a parameter of an interaction or a product to what the potential's is."""
    layer = name.removesuffix(".weight")
    if layer in TABLES:
        value.copy_(weight.flatten() / module.get_submodule(layer).instructions[0].path_weight)
    elif weight.shape == value.shape:
        value.copy_(weight)
    else:
        write_product(module.get_submodule(layer), weight)


def _own_weight(module: VendorObject, name: str, value: Tensor, order: Tensor) -> Tensor:
    """What a parameter of an interaction or a product becomes."""
    if name == "skip_tp.weight" and isinstance(module.skip_tp, FullyConnectedTensorProduct):
        return element_weights(module.skip_tp, torch.eye(len(order))[order])
    if name.removesuffix(".weight") in TABLES:
        return module.get_submodule(name.removesuffix(".weight"))(torch.eye(len(order))[order].to(value))
    if name.startswith("symmetric_contractions") and len(value) == len(order):
        return value[order]
    if name == "linear.weight" and hasattr(module, "avg_num_neighbors") and not hasattr(module, "density_fn"):
        return value / float(module.avg_num_neighbors)
    return value
