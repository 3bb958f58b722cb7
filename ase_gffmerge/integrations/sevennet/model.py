"""SevenNet as the package ``sevenn`` builds it (Park et al., arXiv 2402.03789), its interaction blocks wrapped as stages.

It is a NequIP whose Bessel frequencies are learned, so that the first stage, which makes the radial functions, takes the
edge vectors themselves. Self-connections with one-hot elements become :class:`.ElementLinear`, which compute the same.
"""

from collections import OrderedDict
from typing import ClassVar

from e3nn.nn import FullyConnectedNet
from e3nn.o3 import Irreps, Linear
from sevenn._const import ACTIVATION
from sevenn.model_build import build_E3_equivariant_model
from torch import Tensor, nn

from ase_gffmerge.graphs.graph import Topology
from ase_gffmerge.integrations.base import VendorObject
from ase_gffmerge.integrations.wrapped import (
    ChainPotential,
    Entries,
    ModuleStage,
    PackageHyper,
    ScaledReadout,
)
from ase_gffmerge.models.base import HyperParameters, State
from ase_gffmerge.models.layers import package_mode
from ase_gffmerge.models.layers.linear import ElementLinear

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
        self.stages.append(ModuleStage(radial, reads=("x",), writes=state, emits_scalars=False))
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
                hidden = f"{channels // 2}x0e"
                network = nn.Sequential(Linear(f"{channels}x0e", hidden), Linear(hidden, "1x0e"))
        return ScaledReadout(network, len(self.species))

    def indices(self, vectors: Tensor, graph: Topology) -> Entries:
        """Elements in the place of their one-hot vectors; the package's edges run from the receiving atom."""
        return {"edge_index": graph.edge_index.flip(0), "node_attr": graph.atomic_numbers}

    def edge_functions(self, vectors: Tensor) -> State:
        """Edge vectors and their spherical harmonics."""
        return vectors, self.harmonics(vectors)
