r"""Readout features φ(z) beyond silu(A z + b), and rows of the force-matched readout for any of them.

The product differentiates its one kind of features by hand; here :math:`\dot\phi = \partial\phi/\partial z\cdot\dot z` comes
from forward-mode differentiation, so that any readout with a method ``phi(z, species)`` can be tried.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot, silu

from ase_gffmerge.graphs import Prediction, predict
from ase_gffmerge.graphs.graph import AtomGraph, Topology, edge_vectors
from ase_gffmerge.merging.random_features import random_feature_derivatives, random_feature_readout
from ase_gffmerge.merging.readout_fit import readout_rows
from ase_gffmerge.merging.recipe import ReadoutOptions
from ase_gffmerge.merging.tangents import Directions, Dual, pushforward
from ase_gffmerge.models import Potential
from ase_gffmerge.models.layers.readout import RandomFeatureReadout
from ase_gffmerge.models.painn import PaiNN


class FeatureReadout(RandomFeatureReadout):
    """A random-feature readout with other features; subclasses define :meth:`phi`."""

    def phi(self, z: Tensor, species: Tensor) -> Tensor:
        """Features (n_atoms, width) for inputs (n_atoms, d) and element rows (n_atoms,)."""
        raise NotImplementedError

    def forward(self, scalars: Sequence[Tensor], species: Tensor) -> Tensor:
        """Map L tensors (n_atoms, channels) and element rows (n_atoms,) to energies (n_atoms,) in eV."""
        features = self.phi(self.random_features(scalars), species)
        return self.mlp(scalars, species) + (features * self.theta[species]).sum(-1) + self.constants[species]


class GatedReadout(FeatureReadout):
    """φ = silu(A z + b) · (A' z + b'), products of two projections."""

    def __init__(self, mlp: nn.Module, channels: int, n_species: int, *, width: int, blocks: int):
        super().__init__(mlp, channels, n_species, width=width, blocks=blocks)
        self.gate = nn.Linear(blocks * channels, width)

    def phi(self, z: Tensor, species: Tensor) -> Tensor:
        """Gated features."""
        return silu(self.lift(z)) * self.gate(z)


class ElementReadout(FeatureReadout):
    """φ = silu(A_Z z + b_Z), a projection per element (all are evaluated, one is kept: simple, not fast)."""

    def __init__(self, mlp: nn.Module, channels: int, n_species: int, *, width: int, blocks: int):
        super().__init__(mlp, channels, n_species, width=width, blocks=blocks)
        self.lifts = nn.ModuleList(nn.Linear(blocks * channels, width) for _ in range(n_species))

    def phi(self, z: Tensor, species: Tensor) -> Tensor:
        """Features of each atom's own element."""
        features = silu(self.lifts[0](z))
        for row, lift in enumerate(self.lifts):
            features = torch.where((species == row)[:, None], silu(lift(z)), features)
        return features


class PaiNNWithNorms(PaiNN):
    """PaiNN whose readout sees the norms of the vector features after every block as well."""

    def features(self, vectors: Tensor, graph: Topology) -> list[Tensor]:
        """Norms after every block, then scalars after every block, each (n_atoms, channels)."""
        state, geometry = self.embed(graph), self.geometry(vectors, graph)
        scalars, norms = [], []
        for stage in self.stages:
            state = stage(state, geometry)
            if stage.emits_scalars:
                scalars.append(state[0])
                norms.append((state[1].square().sum(1) + 1e-8).sqrt())
        return norms + scalars


def with_norms(potential: Potential, options: ReadoutOptions) -> Potential:
    """Copy of a PaiNN whose random-feature readout (θ = c = 0) sees scalars and norms of all blocks."""
    hyper, n_species = potential.hyper, len(potential.species)
    wide = PaiNNWithNorms(hyper, potential.species).to(dtype=potential.dtype)
    wide.load_state_dict(potential.state_dict())
    readout = RandomFeatureReadout(
        wide.readout, hyper.channels, n_species, width=options.width, blocks=2 * hyper.n_blocks
    )
    wide.readout = readout.to(wide.embedding)
    return wide.eval().requires_grad_(False)


def with_readout(kind: type[FeatureReadout], potential: Potential, options: ReadoutOptions) -> Potential:
    """Copy of a potential with a readout of the given kind at θ = c = 0."""
    from research.readout_fit import with_wide_readout

    wide = with_wide_readout(potential, options)
    hyper = wide.hyper
    readout = kind(
        random_feature_readout(wide).mlp,
        hyper.channels,
        len(wide.species),
        width=options.width,
        blocks=hyper.readout_blocks,
    )
    wide.readout = readout.to(wide.embedding)
    return wide.eval().requires_grad_(False)


def lifted_inputs(potential: Potential, graph: AtomGraph) -> Tensor:
    """Inputs z (n_atoms, d) of the readout's projection."""
    return random_feature_readout(potential).random_features(potential.features(edge_vectors(graph), graph))


def feature_rows(
    potential: Potential,
    graph: AtomGraph,
    target: Prediction,
    directions: Directions,
    *,
    elements: Tensor,
    frame_weights: Tensor,
    energy_weight: float,
) -> tuple[Tensor, Tensor]:
    """:func:`~ase_gffmerge.merging.readout_fit.readout_rows` for any readout, with the same arguments."""
    readout = random_feature_readout(potential)
    if not isinstance(readout, FeatureReadout):
        return readout_rows(
            potential,
            graph,
            target,
            directions,
            elements=elements,
            frame_weights=frame_weights,
            energy_weight=energy_weight,
        )
    base, species = predict(potential, graph), potential.species_row[graph.atomic_numbers]
    z, dz = random_feature_derivatives(potential, graph, directions)
    features = pushforward(lambda z: readout.phi(z, species), Dual((z,), (dz,)))
    element = torch.searchsorted(elements, species)
    n_frames, n_elements = len(frame_weights), len(elements)
    cell = graph.structure_index * n_elements + element

    def sums(values: Tensor) -> Tensor:
        total = values.new_zeros(n_frames * n_elements, values.shape[1])
        return total.index_add(0, cell, values).view(n_frames, -1)

    counts = z.new_zeros(n_frames, n_elements).index_add(
        0, graph.structure_index, one_hot(element, n_elements).to(z)
    )
    scale = frame_weights.sqrt()[:, None]
    weight = energy_weight * scale * counts.sum(1, keepdim=True).rsqrt()
    slopes = torch.cat([torch.cat([sums(x), 0 * counts], dim=1) * scale for x in features.tangent[0]])
    energies = torch.cat([sums(features.value[0]), counts], dim=1) * weight
    work = (directions.work(graph, target) - directions.work(graph, base)) * scale.T
    energy_targets = (target.energy - base.energy)[:, None].to(z) * weight
    return torch.cat([slopes, energies]), torch.cat([work.reshape(-1, 1), energy_targets])
