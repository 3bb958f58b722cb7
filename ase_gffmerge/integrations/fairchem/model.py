"""eSEN as the package ``fairchem-core`` builds it, its blocks wrapped as stages, and its layers per order as affine maps.

Where an edge points is turned to one axis before a block's convolution; the angle about that axis, which energies do not
depend on, is random there and zero here. Charge 0 and a spin are put into all atoms: one vector, made by the first stage.
Networks are equivariant under rotations and, unlike those of e3nn with parity, not under reflections.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib import import_module
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from ase_gffmerge.graphs.graph import Topology
from ase_gffmerge.integrations.base import VendorObject
from ase_gffmerge.integrations.wrapped import (
    ChainGeometry,
    ChainPotential,
    Entries,
    PackageHyper,
    SummedReadout,
)
from ase_gffmerge.models.affine_maps import AffineMap, register_layer
from ase_gffmerge.models.base import HyperParameters, Stage, State
from ase_gffmerge.models.layers import package_mode
from ase_gffmerge.models.layers.linear import take_rows

PREFIX = "fairchem.core."


class CalledLinear(nn.Linear):
    """A linear layer that the package's convolutions call, as they do with all but plain ones, whose weights they take."""

    def forward(self, input: Tensor) -> Tensor:
        """Map (..., d_in) to (..., d_out) by one product of matrices, as the package does for weights that are fixed."""
        return super().forward(input.flatten(0, -2)).unflatten(0, input.shape[:-1])


def build_backbone(arguments: Mapping[str, VendorObject]) -> VendorObject:
    """The package's backbone with random weights, for energies and their derivatives."""
    kind = import_module(f"{PREFIX}models.uma.escn_md").eSCNMDBackbone
    backbone = kind(**arguments, direct_forces=False, regress_forces=True, otf_graph=False)
    for module in backbone.modules():
        if type(module).__name__ == "SO2_m_Conv":
            module.fc.__class__ = CalledLinear
    return backbone


class Start(Stage):
    """First features of atoms and edges, and the vector of charge, spin and data set."""

    emits_scalars = False

    def __init__(self, backbone: VendorObject, n_species: int, *, spin: int, dataset: str):
        super().__init__()
        self.spin, self.dataset, self.n_components = spin, dataset, backbone.sph_feature_size
        self.source, self.target = (
            nn.Parameter(torch.randn(n_species, backbone.edge_channels)) for _ in range(2)
        )
        self.degree, self.mix = backbone.edge_degree_embedding, backbone.mix_csd
        self.charges, self.spins = backbone.charge_embedding, backbone.spin_embedding
        self.datasets = backbone.dataset_embedding if backbone.use_dataset_embedding else None

    def forward(self, state: State, geometry: ChainGeometry) -> State:
        """Make features (n_atoms, (lmax + 1)^2, channels), the vector for every atom, and features of the edges."""
        given, (nodes,) = geometry.entries(), state
        number = torch.zeros(1, dtype=torch.long, device=nodes.device)
        parts = [self.charges(number), self.spins(number + self.spin)]
        if self.datasets is not None:
            parts.append(self.datasets([self.dataset]))
        system = silu(self.mix(torch.cat([part.to(nodes.dtype) for part in parts], dim=1)))
        rest = nodes.new_zeros(len(nodes), self.n_components - 1, nodes.shape[1])
        x = torch.cat([(nodes + system)[:, None], rest], dim=1)
        sender, receiver = given["edge_index"]
        ends = [
            take_rows(table, given["species"][end])
            for table, end in ((self.source, sender), (self.target, receiver))
        ]
        x_edge = torch.cat([given["radial"], *ends], dim=1)
        x = self.degree(x, x_edge, receiver, given["wigner_inv"])
        return x, system.repeat(len(nodes), 1), x_edge


class Block(Stage):
    """A block of the package."""

    emits_scalars = False

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block

    def forward(self, state: State, geometry: ChainGeometry) -> State:
        """Change the atoms' features."""
        x, system, x_edge = state
        given = geometry.entries()
        edges, wigner, inverse = (given[name] for name in ("edge_index", "wigner", "wigner_inv"))
        target = edges[1]
        x = self.block(
            x, x_edge, edges, wigner, inverse, len(x), sys_node_embedding=system, scatter_target=target
        )
        return x, system, x_edge


class Invariants(Stage):
    """The scalars after the last norm."""

    gathers = False

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.norm = norm

    def forward(self, state: State, geometry: ChainGeometry) -> State:
        """Give the scalars (n_atoms, channels) alone."""
        return (self.norm(state[0])[:, 0],)


class ESENPackage(ChainPotential):
    """An eSEN of the package ``fairchem-core``.

    Parameters
    ----------
    hyper
        Hyper-parameters; the arguments are those of the backbone, a spin and the name of a data set.
    species
        Atomic numbers.
    """

    architecture: ClassVar[str] = "esen-package"
    Hyper: ClassVar[type[HyperParameters]] = PackageHyper
    hyper: PackageHyper
    edge_entries = ("radial", "wigner", "wigner_inv")
    node_entries = 2
    decomposition = "none"

    def __init__(self, hyper: PackageHyper, species: tuple[int, ...]):
        arguments = hyper.arguments
        super().__init__(hyper, species, embedding_width=arguments["backbone"]["sphere_channels"])
        with package_mode():
            backbone = build_backbone(arguments["backbone"])
        spin, dataset = arguments["spin"], arguments["dataset"]
        self.stages.append(Start(backbone, len(self.species), spin=spin, dataset=dataset))
        self.stages.extend(Block(block) for block in backbone.blocks)
        self.stages.append(Invariants(backbone.norm))
        self.l_max, self.backend = backbone.lmax, backbone.backend
        self.distances, self.envelope = backbone.distance_expansion, backbone.envelope
        self.wigner, self.mapping = backbone.wigner_data, backbone.mappingReduced
        kept = backbone.coefficient_index if backbone.mmax != backbone.lmax else None
        self.register_buffer("kept", kept, persistent=False)
        self._seal()

    def own_readout(self) -> nn.Module:
        """Two hidden layers."""
        n, width = self.hyper.channels, self.hyper.arguments["backbone"]["hidden_channels"]
        layers = (nn.Linear(n, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1))
        return SummedReadout([nn.Sequential(*layers)])

    def element_parameters(self) -> tuple[str, ...]:
        """Tables of the edges' ends."""
        return "stages.0.source", "stages.0.target"

    def indices(self, vectors: Tensor, graph: Topology) -> Entries:
        """Edges and elements."""
        return {"edge_index": graph.edge_index, "species": self.species_row[graph.atomic_numbers]}

    def geometry(self, vectors: Tensor, graph: Topology) -> ChainGeometry:
        """Entries by name; the package's blocks need an edge, so that there is one without envelope where there is none."""
        if graph.n_edges:
            return super().geometry(vectors, graph)
        vectors = vectors.new_tensor([[0.0, 0.0, self.hyper.cutoff]])
        alone = replace(graph, edge_index=graph.edge_index.new_zeros(2, 1), shifts=torch.zeros_like(vectors))
        return super().geometry(vectors, alone)

    def edge_functions(self, vectors: Tensor) -> State:
        """Gaussians of the distance, Wigner matrices, and their inverses times the envelope."""
        rotations = import_module(f"{PREFIX}models.uma.common.quaternion.wigner_d_hybrid")
        lengths = vectors.square().sum(dim=1).sqrt()
        wigner, inverse = rotations.axis_angle_wigner_hybrid(
            vectors,
            self.l_max,
            gamma=torch.zeros_like(lengths),
            coeffs=self.wigner.coeffs,
            U_blocks=self.wigner.U_blocks,
            custom_kernels=self.wigner.custom_kernels,
        )
        wigner, inverse = self.backend.prepare_wigner(wigner, inverse, self.mapping, self.kept)
        envelope = self.envelope(lengths / self.hyper.cutoff)
        return self.distances(lengths), wigner, inverse * envelope[:, None, None]

    def scalars(self, state: State) -> Tensor:
        """Return the scalars (n_atoms, channels)."""
        return state[0]


@register_layer(lambda module: type(module).__name__ == "SO3_Linear")
def _so3_maps(name: str, layer: nn.Module) -> Iterator[AffineMap]:
    """A matrix for every order l, whose rows are the components of that order; scalars have a bias."""
    weight, bias = layer.get_parameter("weight"), layer.get_parameter("bias")
    for order in range(len(weight)):
        yield _so3_map(f"{name}[{order}]", layer, weight, bias, order)


def _so3_map(name: str, layer: nn.Module, weight: Tensor, bias: Tensor, order: int) -> AffineMap:
    def rows(x: Tensor) -> Tensor:
        return x[..., order**2 : (order + 1) ** 2, :].reshape(-1, x.shape[-1])

    def read() -> Tensor:
        theta = weight.detach()[order].T
        return theta if order else torch.cat([theta, bias.detach()[None]])

    def parameters(theta: Tensor) -> dict[str, Tensor]:
        changed = weight.detach().clone()
        changed[order] = theta[: weight.shape[2]].T
        return {"weight": changed} if order else {"weight": changed, "bias": theta[-1]}

    return AffineMap(name, layer, order == 0, rows, read, parameters)
