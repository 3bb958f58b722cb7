r"""Random features of a potential's scalars, :math:`\phi(z)=\mathrm{silu}(A z+b)`, with their directional derivatives.

The readout that :mod:`.readout_fit` solves is linear in them. Sources: random-feature readouts ("franken", arXiv
2505.05652).
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from ase_gffmerge.graphs.graph import AtomGraph, edge_vectors
from ase_gffmerge.merging.recipe import ReadoutOptions
from ase_gffmerge.merging.tangents import Directions, Dual, pushforward
from ase_gffmerge.models import Potential, build_potential
from ase_gffmerge.models.layers.linear import SparseLinear
from ase_gffmerge.models.layers.readout import RandomFeatureReadout

MAX_UNKNOWNS = 8192
"""Coefficients of all elements together; their Gram matrix takes 0.5 GB."""


def random_feature_readout(potential: Potential) -> RandomFeatureReadout:
    """The potential's readout, which must have random features."""
    if not isinstance(potential.readout, RandomFeatureReadout):
        raise TypeError("force matching needs a readout of random features")
    return potential.readout


def readout_width(options: ReadoutOptions, n_elements: int) -> int:
    """Features of a readout that is solved for so many elements: those asked for, or fewer, in whole groups."""
    width = min(options.width, max(MAX_UNKNOWNS // n_elements, 1))
    return width - (width % options.groups if width > options.groups else 0)


def with_random_feature_readout(
    potential: Potential, options: ReadoutOptions, *, n_elements: int = 1
) -> Potential:
    """Copy of a potential with a readout of random features at θ = c = 0: the same energies and forces.

    Parameters
    ----------
    potential
        With a plain readout.
    options
        Width, groups and blocks.
    n_elements
        Elements to solve for; with many of them the readout is narrower than ``options.width``.
    """
    width = readout_width(options, n_elements)
    blocks = min(options.blocks, potential.hyper.n_blocks)
    sparse = options.inputs < blocks * potential.hyper.channels
    hyper = replace(
        potential.hyper,
        readout_width=width,
        readout_blocks=blocks,
        readout_groups=math.gcd(options.groups, width) if sparse else 0,
        readout_inputs=options.inputs if sparse else 0,
    )
    wide = build_potential(potential.architecture, hyper.to_dict(), potential.species)
    wide.to(dtype=potential.dtype, device=potential.device)
    state = {
        (f"readout.mlp.{name.removeprefix('readout.')}" if name.startswith("readout.") else name): value
        for name, value in potential.state_dict().items()
    }
    wide.load_state_dict(wide.state_dict() | state)
    return wide.eval().requires_grad_(False)


def draw_random_features(
    readout: RandomFeatureReadout, rows: Tensor, *, seed: int, spread: float = 0.5
) -> None:
    r"""Draw A and b so that :math:`A z + b` has zero mean and a given standard deviation.

    Parameters
    ----------
    readout
        Written in place.
    rows : (n_atoms, d)
        Typical z.
    seed
        Of A and b.
    spread
        The standard deviation.
    """
    mean, deviation = rows.double().mean(0), rows.double().std(0)
    deviation = torch.where(deviation > 1e-6, deviation, 1.0)  # of constants nothing is known
    generator = torch.Generator().manual_seed(seed)
    lift = readout.lift
    read = lift.inputs[:, None] if isinstance(lift, SparseLinear) else torch.arange(lift.in_features)
    a = torch.randn(lift.weight.shape, generator=generator, dtype=torch.float64).to(rows.device)
    a = a / math.sqrt(a.shape[-1]) / deviation[read]
    b = torch.randn(lift.out_features, generator=generator, dtype=torch.float64).to(rows.device)
    with torch.no_grad():
        lift.weight.copy_(spread * a)
        lift.bias.copy_(spread * (b - (a * mean[read]).sum(-1).flatten()))


def random_feature_derivatives(
    potential: Potential, graph: AtomGraph, directions: Directions, *, at_once: int | None = None
) -> tuple[Tensor, Tensor]:
    """Readout inputs z (n_atoms, d) and their derivatives (n_directions, n_atoms, d).

    Parameters
    ----------
    potential
        With a readout of random features.
    graph
        Batch of frames.
    directions
        Displacements and strains.
    at_once
        How many of them are differentiated along in one pass, which takes memory; default: all.
    """
    readout = random_feature_readout(potential)

    def inputs(vectors: Tensor) -> Tensor:
        return readout.random_features(potential.features(vectors, graph))

    vectors = edge_vectors(graph)
    tangents = directions.tangents(graph, vectors)
    found = [
        pushforward(inputs, Dual((vectors,), (part,))) for part in tangents.split(at_once or len(tangents))
    ]
    return found[0].value[0], torch.cat([z.tangent[0] for z in found])


def derivative_rows(
    readout: RandomFeatureReadout, z: Tensor, dz: Tensor, cell: Tensor, n_cells: int
) -> Iterator[Tensor]:
    r"""Rows :math:`\sum_i \partial\phi(z_i)\cdot\dot z_i` for each direction, summed over the atoms of a cell.

    Yields one tensor (n_cells, width) per direction.

    Parameters
    ----------
    readout
        A, b.
    z, dz : (n_atoms, d), (n_directions, n_atoms, d)
        Inputs and their derivatives.
    cell : (n_atoms,)
        The cell of every atom, which is one element of one frame.
    n_cells
        How many there are.
    """
    lift = readout.lift
    linear = lift.linear if isinstance(lift, SparseLinear) else partial(functional.linear, weight=lift.weight)
    a = lift(z)
    sigmoid = torch.sigmoid(a)
    slope = sigmoid * (1 + a * (1 - sigmoid))  # of silu
    for derivative in dz:
        rows = slope * linear(derivative)
        yield rows.new_zeros(n_cells, rows.shape[1]).index_add(0, cell, rows)
