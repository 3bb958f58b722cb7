"""SevenNet as the package ``sevenn`` builds it (Park et al., arXiv 2402.03789), its interaction blocks wrapped as stages.

It is a NequIP whose Bessel frequencies are learned, so that the first stage, which makes the radial functions, takes the
edge vectors themselves. Self-connections with one-hot elements become :class:`.ElementLinear`, which compute the same.

Weights of a SevenNet of the package ``sevenn``: into a potential, and back into a checkpoint.
"""

from collections import OrderedDict
from collections.abc import Iterator
from copy import deepcopy
from importlib.metadata import version
from typing import ClassVar

import torch
from ase.data import chemical_symbols
from e3nn.nn import FullyConnectedNet
from e3nn.o3 import Irreps, Linear
from sevenn._const import ACTIVATION
from sevenn.model_build import build_E3_equivariant_model
from torch import Tensor, nn

from ase_gffmerge.errors import FileFormatError
from ase_gffmerge.graphs.graph import Topology
from ase_gffmerge.integrations.base import VendorObject, per_element, rows_of_elements
from ase_gffmerge.integrations.wrapped import (
    ChainPotential,
    Entries,
    ModuleStage,
    PackageHyper,
    ScaledReadout,
)
from ase_gffmerge.models.base import HyperParameters, State
from ase_gffmerge.models.layers import package_mode
from ase_gffmerge.models.layers.equivariant import EdgeSums
from ase_gffmerge.models.layers.linear import ElementLinear, element_weights, write_product

BLOCK = (
    "self_connection_intro",
    "self_interaction_1",
    "convolution",
    "self_interaction_2",
    "self_connection_outro",
    "equivariant_gate",
)
"""Modules of an interaction block, in order."""


class SevenNetPackageHyper(PackageHyper):
    """Hyper-parameters of :class:`SevenNetPackage`; the arguments are what ``build_E3_equivariant_model`` wants."""


def build_network(arguments: dict[str, VendorObject], species: tuple[int, ...]) -> VendorObject:
    """The package's chain of modules with random weights.

    Parameters
    ----------
    arguments
        See :class:`SevenNetPackageHyper`.
    species
        Atomic numbers in the order of its types.
    """
    own = {
        "_number_of_species": len(species),
        "_type_map": {z: i for i, z in enumerate(species)},
        "shift": [0.0] * len(species),
        "scale": [1.0] * len(species),
    }
    with package_mode():
        return build_E3_equivariant_model({**arguments, **own})


class RadialFunctions(nn.Module):
    """The package's radial basis times its cutoff function."""

    def __init__(self, basis: nn.Module, cutoff: nn.Module):
        super().__init__()
        self.basis, self.cutoff = basis, cutoff

    def forward(self, data: Entries) -> Entries:
        """Add the entry ``edge_embedding`` (n_edges, n_radial)."""
        lengths = data["edge_vec"].square().sum(dim=1).sqrt()
        return {**data, "edge_embedding": self.basis(lengths) * self.cutoff(lengths)[:, None]}


class SummedConvolution(nn.Module):
    """A convolution of the package by :class:`.EdgeSums`.

    Parameters
    ----------
    convolution
        Whose weights are shared.
    """

    def __init__(self, convolution: VendorObject):
        super().__init__()
        self.radial, self.denominator = convolution.weight_nn, convolution.denominator
        self.sums = EdgeSums(convolution.convolution)

    def forward(self, data: Entries) -> Entries:
        """Replace the entry ``x``."""
        weights, edge_index = self.radial(data["edge_embedding"]), data["edge_index"].flip(0)
        return {**data, "x": self.sums(data["x"], data["edge_attr"], weights, edge_index) / self.denominator}


class SevenNetPackage(ChainPotential):
    """A SevenNet of the package ``sevenn``.

    Parameters
    ----------
    hyper
        Hyper-parameters.
    species
        Atomic numbers.
    """

    architecture: ClassVar[str] = "sevennet-package"
    Hyper: ClassVar[type[HyperParameters]] = SevenNetPackageHyper
    hyper: SevenNetPackageHyper
    edge_entries = ("edge_vec", "edge_attr")

    def __init__(self, hyper: SevenNetPackageHyper, species: tuple[int, ...]):
        arguments = hyper.arguments
        first = Irreps(arguments["irreps_manual"][0]).dim
        super().__init__(hyper, species, embedding_width=first)
        network = build_network(arguments, self.species)
        embedding = network.edge_embedding
        self.harmonics = embedding.spherical
        radial = RadialFunctions(embedding.basis_function, embedding.cutoff_function)
        state = ("x", "edge_embedding")
        self.stages.append(
            ModuleStage(radial, reads=("x",), writes=state, emits_scalars=False, gathers=False)
        )
        for block in range(hyper.n_blocks):
            parts = OrderedDict((name, network.get_submodule(f"{block}_{name}")) for name in BLOCK)
            intro: VendorObject = parts["self_connection_intro"]
            if hasattr(intro, "fc_tensor_product"):
                product = intro.fc_tensor_product
                intro.fc_tensor_product = ElementLinear(product.irreps_in1, product.irreps_out, self.species)
            self.stages.append(ModuleStage(nn.Sequential(parts), reads=state, writes=state))
        self._seal()

    def own_readout(self) -> nn.Module:
        """Two linear layers, or a network with activations."""
        arguments, channels = self.hyper.arguments, self.hyper.channels
        with package_mode():
            if arguments["readout_as_fcn"]:
                widths = [channels, *arguments["readout_fcn_hidden_neurons"], 1]
                network: nn.Module = FullyConnectedNet(
                    widths, ACTIVATION[arguments["readout_fcn_activation"]]
                )
            else:
                hidden, biases = f"{channels // 2}x0e", arguments["use_bias_in_linear"]
                network = nn.Sequential(
                    Linear(f"{channels}x0e", hidden, biases=biases), Linear(hidden, "1x0e", biases=biases)
                )
        return ScaledReadout(network, len(self.species))

    @staticmethod
    def served(part: nn.Module) -> nn.Module | None:
        """Convolutions."""
        product = getattr(part, "convolution", None)
        fits = hasattr(part, "weight_nn") and product is not None and EdgeSums.can_replace(product)
        return SummedConvolution(part) if fits else None

    def indices(self, vectors: Tensor, graph: Topology) -> Entries:
        """Elements in the place of their one-hot vectors; the package's edges run from the receiving atom."""
        return {"edge_index": graph.edge_index.flip(0), "node_attr": graph.atomic_numbers}

    def edge_functions(self, vectors: Tensor) -> State:
        """Edge vectors and their spherical harmonics."""
        return vectors, self.harmonics(vectors)


@torch.no_grad()
def one_modality(network: VendorObject, row: int) -> VendorObject:
    """The network for one of its modalities: features that say which one it is become biases of the layers they enter."""
    single = deepcopy(network)
    for module in single.modules():
        if getattr(module, "num_modalities", 0) > 1:
            module.linear = _with_bias(module.linear, row)
            module.num_modalities = 0
    del single.one_hot_modality
    rescale, own = network.rescale_atomic_energy, single.rescale_atomic_energy
    if rescale.use_modal_wise_shift:
        own.shift = nn.Parameter(rescale.shift[row].clone())
    if rescale.use_modal_wise_scale:
        own.scale = nn.Parameter(rescale.scale[row].clone())
    return single


def _with_bias(linear: Linear, row: int) -> Linear:
    """A layer without its last inputs, of which one is 1 and the others are 0, but with the bias that it amounts to."""
    *irreps, _ = linear.irreps_in
    with package_mode(linear.weight.dtype):
        made = Linear(irreps, linear.irreps_out, biases=True)
    last, offsets = len(irreps), linear.weight.new_zeros(linear.irreps_out.dim)
    slices = linear.irreps_out.slices()
    for i, path in enumerate(linear.instructions):
        if path.i_in == last:
            offsets[slices[path.i_out]] += linear.weight_view_for_instruction(i)[row] * path.path_weight
        elif path.i_in < 0:
            raise FileFormatError(
                "this SevenNet model has modalities and biases, which is not read; leave it out"
            )
        else:
            same = [(new.i_in, new.i_out) for new in made.instructions].index((path.i_in, path.i_out))
            view = linear.weight_view_for_instruction(i) * path.path_weight
            made.weight_view_for_instruction(same).copy_(view / made.instructions[same].path_weight)
    made.bias.copy_(torch.cat([offsets[slices[p.i_out]] for p in made.instructions if p.i_in < 0]))
    return made


@torch.no_grad()
def copy_weights(potential: SevenNetPackage, network: VendorObject, species: tuple[int, ...]) -> None:
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
    one_hot = torch.eye(len(species))[rows_of_elements(species)]
    linear, rescale = network.onehot_to_feature_x.linear, network.rescale_atomic_energy
    potential.embedding.copy_(linear(one_hot.to(linear.weight))[None])
    own = dict(potential.named_parameters())
    for name, value, product in _parameters(network, potential.hyper.n_blocks):
        own[name].copy_(value if product is None else element_weights(product, one_hot))
    own["readout.scale"].copy_(per_element(rescale.scale, species))
    potential.references.copy_(per_element(rescale.shift, species))


@torch.no_grad()
def vendor_network(potential: SevenNetPackage) -> VendorObject:
    """The package's chain of modules with the potential's weights in float32; undoes :func:`copy_weights`."""
    network = build_network(potential.hyper.arguments, potential.species)
    linear, rescale = network.onehot_to_feature_x.linear, network.rescale_atomic_energy
    linear.weight.copy_(potential.embedding[0].flatten() / linear.instructions[0].path_weight)
    own = {name: value.cpu().double() for name, value in potential.named_parameters()}
    for name, value, product in _parameters(network, potential.hyper.n_blocks):
        if product is None:
            value.copy_(own[name])
        else:
            write_product(product, own[name])
    rescale.scale.copy_(own["readout.scale"])
    rescale.shift.copy_(potential.references)
    return network.float()


def vendor_checkpoint(potential: SevenNetPackage) -> dict[str, VendorObject]:
    """What the package loads: weights, and the configuration that builds a network for them, of plain values."""
    network, species = vendor_network(potential), potential.species
    config = potential.hyper.arguments | {
        "version": version("sevenn"),
        "dtype": "single",
        "chemical_species": [chemical_symbols[z] for z in species],
        "_chemical_species_by_atomic_number": list(species),
        "_number_of_species": len(species),
        "_type_map": {z: i for i, z in enumerate(species)},
        "shift": network.rescale_atomic_energy.shift.tolist(),
        "scale": network.rescale_atomic_energy.scale.tolist(),
    }
    return {"config": config, "model_state_dict": dict(network.state_dict())}


def _parameters(network: VendorObject, n_blocks: int) -> Iterator[tuple[str, Tensor, VendorObject]]:
    """The network's parameters under the potential's names, and the tensor product with elements that one belongs to.

    Those of the embedding and of the energy scales and shifts are left out.
    """
    for name, value in network.edge_embedding.basis_function.named_parameters():
        yield f"stages.0.module.basis.{name}", value, None
    for block in range(n_blocks):
        for part in BLOCK:
            module = network.get_submodule(f"{block}_{part}")
            for name, value in module.named_parameters():
                product = module.fc_tensor_product if name == "fc_tensor_product.weight" else None
                yield f"stages.{block + 1}.module.{part}.{name}", value, product
    for name, value in _readout(network).named_parameters():
        yield f"readout.module.{name}", value, None


def _readout(network: VendorObject) -> nn.Module:
    if hasattr(network, "readout_FCN"):
        found: nn.Module = network.readout_FCN.fcn
        return found
    return nn.Sequential(network.reduce_input_to_hidden.linear, network.reduce_hidden_to_energy.linear)
