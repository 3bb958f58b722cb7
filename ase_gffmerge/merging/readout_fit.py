r"""Step 5: a readout matched to the specialists' energies and forces in closed form.

With the node features fixed, energy and forces are linear in the readout's last weights θ and per-element constants c,

.. math::

   E = E^0 + \sum_i \theta_{Z_i}\cdot\phi(z_i) + c_{Z_i},\qquad
   \mathbf F = \mathbf F^0 - \sum_i \theta_{Z_i}\cdot\frac{\partial\phi(z_i)}{\partial\mathbf r},\qquad
   \phi(z)=\mathrm{silu}(A z+b),\quad z=[x_B;\dots;x_L] ,

where E⁰, F⁰ are the merged model's energy and forces at θ = c = 0. Rows are energies per root of the number
of atoms (times ``energy_weight``) and derivatives along probes, displacements of the atoms and strains of the cell
(:mod:`.probes`); the derivatives :math:`\dot z` come from forward-mode differentiation, many probes in one pass.

Sources: random-feature readouts ("franken", arXiv 2505.05652), linear ACE (Drautz, doi:10.1103/PhysRevB.99.014104).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.functional import one_hot, silu

from ase_gffmerge.graphs import Prediction, predict
from ase_gffmerge.graphs.graph import AtomGraph, edge_vectors
from ase_gffmerge.least_squares.gram import Gram
from ase_gffmerge.least_squares.ridge import Solution, regularised_factor, ridge_solve
from ase_gffmerge.merging.directions import Probes
from ase_gffmerge.merging.tangents import Dual, pushforward
from ase_gffmerge.models import Potential
from ase_gffmerge.models.layers.readout import RandomFeatureReadout
from ase_gffmerge.models.layers.sparse_linear import SparseLinear

RIDGES = tuple(10.0**-exponent for exponent in range(3, 9))


@dataclass(frozen=True)
class ReadoutFit:
    """Solution of the force-matched readout.

    Attributes
    ----------
    solution
        Coefficients [θ; c] and diagnosis.
    ridge
        The relative ridge chosen.
    held_out
        Relative squared residual on held-out calibration frames at that ridge.
    """

    solution: Solution
    ridge: float
    held_out: float


def draw_random_features(
    readout: RandomFeatureReadout, rows: Tensor, *, seed: int, spread: float = 0.5
) -> None:
    r"""Draw A and b so that :math:`A z + b` has zero mean and standard deviation ``spread`` over rows z (n_atoms, d)."""
    mean, deviation = rows.double().mean(0), rows.double().std(0).clamp(min=1e-6)
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
    potential: Potential, graph: AtomGraph, probes: Probes
) -> tuple[Tensor, Tensor]:
    """Readout inputs z (n_atoms, d) and their derivatives (n_probes, n_atoms, d) along the probes."""
    readout = widened(potential)

    def inputs(vectors: Tensor) -> Tensor:
        graph.edge_vectors = vectors
        return readout.random_features(potential.features(graph))

    vectors = edge_vectors(graph)
    z = pushforward(inputs, Dual((vectors,), (probes.tangents(graph, vectors),)))
    return z.value[0], z.tangent[0]


def widened(potential: Potential) -> RandomFeatureReadout:
    """The potential's readout, which must be a widened one."""
    if not isinstance(potential.readout, RandomFeatureReadout):
        raise TypeError("force matching needs a widened readout")
    return potential.readout


def slope_rows(
    readout: RandomFeatureReadout, z: Tensor, dz: Tensor, cell: Tensor, n_cells: int
) -> Iterator[Tensor]:
    r"""Rows :math:`\sum_i \partial\phi(z_i)\cdot\dot z_i` for each probe, summed over the atoms of a cell.

    Yields one tensor (n_cells, width) per probe; a cell is one element of one frame.
    """
    lift = readout.lift
    linear = lift.linear if isinstance(lift, SparseLinear) else partial(functional.linear, weight=lift.weight)
    a = lift(z)
    sigmoid = torch.sigmoid(a)
    slope = sigmoid * (1 + a * (1 - sigmoid))
    for derivative in dz:
        rows = slope * linear(derivative)
        yield rows.new_zeros(n_cells, rows.shape[1]).index_add(0, cell, rows)


def readout_rows(
    potential: Potential,
    graph: AtomGraph,
    target: Prediction,
    probes: Probes,
    *,
    elements: Tensor,
    frame_weights: Tensor,
    energy_weight: float,
) -> tuple[Tensor, Tensor]:
    """Rows (n_rows, n_unknowns) and targets (n_rows, 1) of one batch, for the unknowns [θ of the first element; ...; c].

    Parameters
    ----------
    potential
        Merged potential with a widened readout at θ = c = 0.
    graph
        Batch of frames.
    target
        What the specialist says about them.
    probes
        Directions of the derivatives.
    elements
        Rows (n_elements,) of the species table that the frames contain; only these are solved for.
    frame_weights
        Weight of each frame (n_frames,).
    energy_weight
        See :class:`~ase_gffmerge.merging.recipe.ReadoutOptions`.
    """
    readout, base = widened(potential), predict(potential, graph)
    z, dz = random_feature_derivatives(potential, graph, probes)
    element = torch.searchsorted(elements, potential.species_row[graph.atomic_numbers])
    n_frames, n_elements = len(frame_weights), len(elements)
    cell = graph.structure_index * n_elements + element
    scale = frame_weights.sqrt()[:, None]
    slopes = torch.cat(
        [rows.view(n_frames, -1) * scale for rows in slope_rows(readout, z, dz, cell, n_frames * n_elements)]
    )
    slopes = torch.cat([slopes, slopes.new_zeros(len(slopes), n_elements)], dim=1)
    work = (probes.work(graph, target) - probes.work(graph, base)) * scale.T
    phi = silu(readout.lift(z))
    sums = phi.new_zeros(n_frames * n_elements, phi.shape[1]).index_add(0, cell, phi).view(n_frames, -1)
    ones = one_hot(element, n_elements).to(phi)
    counts = phi.new_zeros(n_frames, n_elements).index_add(0, graph.structure_index, ones)
    weight = energy_weight * scale * counts.sum(1, keepdim=True).rsqrt()
    energies = torch.cat([sums, counts], dim=1) * weight
    energy_targets = (target.energy - base.energy)[:, None].to(phi) * weight
    return torch.cat([slopes, energies]), torch.cat([work.reshape(-1, 1), energy_targets])


def fit_readout(fitting: Gram, held_out: Gram) -> ReadoutFit:
    """Choose the ridge on held-out frames, from the largest down until two in turn gain nothing; the anchor is zero."""
    prior = torch.zeros_like(fitting.xy)
    if not held_out.n_rows:
        solution = ridge_solve(fitting, prior, ridge=1e-6)
        return ReadoutFit(solution, 1e-6, solution.residual_after)
    trials: list[tuple[float, float]] = []
    for ridge in RIDGES:
        factor, _ = regularised_factor(fitting, ridge=ridge)
        trials.append((held_out.residual(torch.cholesky_solve(fitting.xy, factor)), ridge))
        if len(trials) - trials.index(min(trials)) > 2:
            break
    best, ridge = min(trials)
    return ReadoutFit(ridge_solve(fitting + held_out, prior, ridge=ridge), ridge, best)
