r"""Step 5: a readout matched to the specialists' energies and forces in closed form.

With the node features fixed, energy and forces are linear in the readout's last weights θ and per-element constants c,

.. math::

   E = E^0 + \sum_i \theta\cdot\phi(z_i) + c_{Z_i},\qquad
   \mathbf F = \mathbf F^0 - \theta\cdot\sum_i \frac{\partial\phi(z_i)}{\partial\mathbf r},\qquad
   \phi(z)=\mathrm{silu}(A z+b),\quad z=[x_B;\dots;x_L] ,

where E⁰, F⁰ are the merged model's energy and forces at θ = c = 0. Rows are energies per atom (times ``energy_weight``) and
directional derivatives along probes v: all 3n coordinates of a small frame, or random directions of a large one
(:math:`\mathbb E\,vv^\top = 1/P`, an unbiased sketch of the same normal equations). The derivatives
:math:`\partial z/\partial\mathbf r\cdot v` come from forward-mode differentiation, many probes in one pass.

The ridge is chosen on calibration frames that were held out of the solve; then all frames enter.

Sources: random-feature readouts ("franken", arXiv 2505.05652), linear ACE (Drautz, doi:10.1103/PhysRevB.99.014104).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import jvp, vmap
from torch.nn.functional import silu
from torch_geometric.data import Batch

from ase_gffmerge.graphs import predict
from ase_gffmerge.graphs.batches import edge_vectors
from ase_gffmerge.merging.recipe import ReadoutOptions
from ase_gffmerge.merging.solve import Solution, ridge_solve
from ase_gffmerge.merging.statistics import Gram
from ase_gffmerge.models import Potential
from ase_gffmerge.models.readout import WidenedReadout

RIDGES = tuple(10.0**-exponent for exponent in range(3, 12))


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


def random_lift(readout: WidenedReadout, features: Sequence[Tensor], *, seed: int) -> None:
    r"""Draw A and b so that :math:`A z + b` has unit variance on the calibration features (n_atoms, d)."""
    rows = torch.cat(list(features)).double()
    mean, deviation = rows.mean(0), rows.std(0).clamp(min=1e-6)
    generator = torch.Generator().manual_seed(seed)
    width, d = readout.lift.weight.shape
    a = torch.randn(width, d, generator=generator, dtype=torch.float64).to(rows.device) / math.sqrt(d) / deviation
    b = torch.randn(width, generator=generator, dtype=torch.float64).to(rows.device) - a @ mean
    with torch.no_grad():
        readout.lift.weight.copy_(a)
        readout.lift.bias.copy_(b)


def probe_directions(graph: Batch, probes: int, *, seed: int) -> Tensor:
    """Displacement directions (n_probes, n_atoms, 3): unit vectors, or Gaussian ones for frames with 3n > probes."""
    counts = torch.bincount(graph.batch).tolist()
    n_rows = min(probes, 3 * max(counts))
    directions = torch.zeros(n_rows, len(graph.pos), 3, dtype=graph.pos.dtype)
    generator = torch.Generator().manual_seed(seed)
    start = 0
    for n in counts:
        block = directions[:, start : start + n].view(n_rows, n, 3)
        if 3 * n <= n_rows:
            block[: 3 * n] = torch.eye(3 * n).view(3 * n, n, 3)
        else:
            block[:] = torch.randn(n_rows, n, 3, generator=generator) / math.sqrt(n_rows)
        start += n
    return directions.to(graph.pos.device)


def lifted_derivatives(potential: Potential, graph: Batch, directions: Tensor) -> tuple[Tensor, Tensor]:
    """Readout inputs z (n_atoms, d) and their derivatives (n_probes, n_atoms, d) along ``directions``."""
    readout = potential.readout
    if not isinstance(readout, WidenedReadout):
        raise TypeError("force matching needs a widened readout")

    def inputs(positions: Tensor) -> Tensor:
        graph.edge_vectors = edge_vectors(graph, positions)
        return readout.lifted(potential.features(graph))

    derivatives = vmap(lambda v: jvp(inputs, (graph.pos,), (v,))[1])(directions)
    return inputs(graph.pos).detach(), derivatives.detach()


def force_rows(readout: WidenedReadout, z: Tensor, dz: Tensor, batch: Tensor) -> Iterator[Tensor]:
    r"""Rows :math:`-\sum_i \partial\phi(z_i)\cdot v` for each probe, (n_frames, width)."""
    a = readout.lift(z)
    sigmoid = torch.sigmoid(a)
    slope = sigmoid * (1 + a * (1 - sigmoid))
    n_frames = int(batch.max()) + 1
    for derivative in dz:
        rows = slope * (derivative @ readout.lift.weight.T)
        yield -rows.new_zeros(n_frames, rows.shape[1]).index_add(0, batch, rows)


def readout_gram(
    potential: Potential,
    graph: Batch,
    target_energy: Tensor,
    target_forces: Tensor,
    options: ReadoutOptions,
    frame_weights: Tensor,
) -> Gram:
    """Gram statistics of one batch for [θ; c].

    Parameters
    ----------
    potential
        Merged potential with a widened readout at θ = c = 0.
    graph
        Batch of frames.
    target_energy, target_forces
        The specialist's energies (n_frames,) in eV and forces (n_atoms, 3) in eV/Å.
    options
        Recipe of the readout.
    frame_weights
        Weight of each frame (n_frames,).
    """
    readout: WidenedReadout = potential.readout  # type: ignore[assignment]
    base = predict(potential, graph)
    directions = probe_directions(graph, options.probes, seed=options.seed)
    z, dz = lifted_derivatives(potential, graph, directions)
    difference = target_forces - base.forces
    n_species = len(readout.constants)
    scale = frame_weights.sqrt()[:, None]
    blocks, targets = [], []
    for rows, direction in zip(force_rows(readout, z, dz, graph.batch), directions, strict=True):
        work = (difference * direction).sum(dim=1)
        target = work.new_zeros(len(scale)).index_add(0, graph.batch, work)
        blocks.append(torch.cat([rows, rows.new_zeros(len(rows), n_species)], dim=1) * scale)
        targets.append(target[:, None] * scale)
    phi = silu(readout.lift(z))
    composition = torch.nn.functional.one_hot(potential.species_row[graph.atomic_numbers], n_species).to(phi)
    per_atom = torch.cat([phi, composition], dim=1)
    n_atoms = torch.bincount(graph.batch).to(phi)[:, None]
    energies = per_atom.new_zeros(len(scale), per_atom.shape[1]).index_add(0, graph.batch, per_atom)
    weight = options.energy_weight * scale * n_atoms.rsqrt()
    blocks.append(energies * weight)
    targets.append((target_energy - base.energy)[:, None].to(phi) * weight)
    return Gram.of(torch.cat(blocks), torch.cat(targets))


def fit_readout(fitting: Gram, held_out: Gram, prior: Tensor) -> ReadoutFit:
    """Choose the ridge on held-out frames, then solve on all frames."""
    trials = [(held_out.residual(ridge_solve(fitting, prior, ridge=r).theta), r) for r in RIDGES]
    best, ridge = min(trials)
    return ReadoutFit(ridge_solve(fitting + held_out, prior, ridge=ridge), ridge, best)
