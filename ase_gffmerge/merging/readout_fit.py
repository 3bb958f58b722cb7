r"""Step 5: a readout matched to the specialists' energies, forces and stresses in closed form.

With the node features fixed, energy and forces are linear in the readout's last weights θ and per-element constants c,

.. math::

   E = E^0 + \sum_i \theta_{Z_i}\cdot\phi(z_i) + c_{Z_i},\qquad
   \mathbf F = \mathbf F^0 - \sum_i \theta_{Z_i}\cdot\frac{\partial\phi(z_i)}{\partial\mathbf r},\qquad
   \phi(z)=\mathrm{silu}(A z+b),\quad z=[x_B;\dots;x_L] ,

where E⁰, F⁰ are the merged model's energy and forces at θ = c = 0, A and b are random and :math:`x_l` are the scalars after
block l. Over the :math:`N_k` frames f of specialist k (calibration frames and copies, :mod:`.augmentation`), of
:math:`n_f` atoms each, θ and c are

.. math::

   \min_{\theta, c}\ \sum_k \frac{a_k}{N_k s_k} \sum_{f\in k} \frac{1}{n_f} \Bigl[
   \sum_p \bigl( \partial_p E_f - \partial_p E^{(k)}_f \bigr)^2
   + \frac{w_E^2}{n_f} \bigl( E_f - E^{(k)}_f \bigr)^2 \Bigr]
   + \lambda\,\frac{\mathrm{tr}\,G}{d}\,\bigl( |\theta|^2 + |c|^2 \bigr) ,

with the specialist's weight :math:`a_k` and mean square force component :math:`s_k` (where forces are silent by symmetry, of
the rest: :meth:`.CalibrationSet.mean_square_target`), the ``energy_weight`` :math:`w_E`, and
derivatives :math:`\partial_p` along displacements of the atoms and strains of the cell (:mod:`.tangents`), whose squares
sum up to those of forces and weighted stresses. The derivatives :math:`\dot z` come from forward-mode differentiation, many
directions in one pass. Every fifth frame with its copies is held out and chooses λ; then all are solved together.

Sources: random-feature readouts ("franken", arXiv 2505.05652), linear ACE (Drautz, doi:10.1103/PhysRevB.99.014104).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from ase import Atoms
from torch import Tensor
from torch.nn.functional import one_hot, silu

from ase_gffmerge.graphs import Prediction, batch_graphs, build_graph, predict
from ase_gffmerge.graphs.graph import AtomGraph
from ase_gffmerge.least_squares.gram import Gram
from ase_gffmerge.least_squares.ridge import Solution, regularized_factor, ridge_solve
from ase_gffmerge.merging.augmentation import copies_per_frame, with_copies
from ase_gffmerge.merging.calibration import CalibrationSet
from ase_gffmerge.merging.random_features import (
    derivative_rows,
    draw_random_features,
    random_feature_derivatives,
    random_feature_readout,
    with_random_feature_readout,
)
from ase_gffmerge.merging.recipe import ReadoutOptions
from ase_gffmerge.merging.report import LayerReport
from ase_gffmerge.merging.tangents import Directions
from ase_gffmerge.models import Potential
from ase_gffmerge.runtime.devices import chunks
from ase_gffmerge.runtime.distributed import gathered, mine, n_ranks, pooled
from ase_gffmerge.runtime.progress import Progress, no_progress, part_of

RIDGES = tuple(10.0**-exponent for exponent in range(3, 9))
"""Values of λ that are tried."""

HELD_OUT = 5
"""Every fifth frame (with its copies) chooses the ridge."""

MAX_ATOMS = 180
"""Atoms per batch; much larger batches leave the processor's cache and are slower."""

MAX_ROWS = 4096
"""Rows that are collected before their Gram matrix is taken; each one costs a pass over the whole matrix."""


@torch.no_grad()
def match_forces(
    potential: Potential,
    calibration_sets: Sequence[CalibrationSet],
    options: ReadoutOptions,
    *,
    at_once: int | None = None,
    progress: Progress = no_progress,
) -> tuple[Potential, LayerReport, float]:
    """Widen the readout and solve it on energies and forces of all specialists.

    Parameters
    ----------
    potential
        The merged potential after steps 1 to 4.
    calibration_sets
        Specialists with the scalars that the merged potential has on their frames.
    options
        Size of the readout, copies, weights.
    at_once
        Directions along which a batch is differentiated in one pass, which takes memory; default: all.
    progress
        Called with a fraction (0 to 1) and a description.

    Returns
    -------
    potential
        The merged potential with its new readout.
    report
        Diagnosis of the solve.
    held_out
        Root mean square force error (with the weighted energy error) on held-out frames, relative to the specialists'
        root mean square force.
    """
    frames = [atoms for one in calibration_sets for atoms in one.specialist.calibration]
    numbers = np.unique(np.concatenate([atoms.numbers for atoms in frames]))
    merged = with_random_feature_readout(potential, options, n_elements=len(numbers))
    readout = random_feature_readout(merged)
    rows: dict[tuple[int, ...], Tensor] = {
        (one.index, batch.number, place): readout.random_features(
            [x.value[0] for x in batch.merged_scalars]
        ).cpu()
        for one in calibration_sets
        for place, batch in enumerate(one.batches)
    }
    draw_random_features(readout, torch.cat(gathered(rows)).to(merged.device), seed=options.seed)
    elements = merged.species_row[torch.as_tensor(numbers, device=merged.device)]
    fitting, held_out = _statistics(merged, calibration_sets, options, elements, at_once, progress)
    fit = fit_readout(fitting, held_out)
    width = len(elements) * readout.lift.out_features
    theta, constants = fit.solution.theta[:, 0].split([width, len(elements)])
    readout.theta[elements] = theta.view(len(elements), -1).to(merged.dtype)
    readout.constants[elements] = constants.to(merged.dtype)
    share = sum(
        calibration_set.weight * _held_out_share(calibration_set) for calibration_set in calibration_sets
    )
    relative_square = fit.held_out * held_out.yy / (3 * share) if share else fit.held_out
    cut = readout.lift.out_features < options.width
    name = f"readout.theta, {described(readout.lift.out_features, options)}" if cut else "readout.theta"
    return merged, LayerReport.of(name, "readout", fit.solution), relative_square**0.5


def readout_rows(
    potential: Potential,
    graph: AtomGraph,
    target: Prediction,
    directions: Directions,
    *,
    elements: Tensor,
    frame_weights: Tensor,
    energy_weight: float,
    at_once: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Rows (n_rows, n_unknowns) and targets (n_rows, 1) of one batch, for the unknowns [θ of the first element; ...; c].

    Parameters
    ----------
    potential
        Merged potential with a readout of random features at θ = c = 0.
    graph
        Batch of frames.
    target
        What the specialist says about them.
    directions
        Directions of the derivatives.
    elements
        Rows (n_elements,) of the species table that the frames contain; only these are solved for.
    frame_weights
        Weight of each frame (n_frames,).
    energy_weight
        See :class:`~ase_gffmerge.merging.recipe.ReadoutOptions`.
    at_once
        See :func:`match_forces`.
    """
    readout, base = random_feature_readout(potential), predict(potential, graph)
    z, dz = random_feature_derivatives(potential, graph, directions, at_once=at_once)
    element = torch.searchsorted(elements, potential.species_row[graph.atomic_numbers])
    n_frames, n_elements = len(frame_weights), len(elements)
    cell = graph.structure_index * n_elements + element
    scale = frame_weights.sqrt()[:, None]
    derivatives = torch.cat(
        [
            rows.view(n_frames, -1) * scale
            for rows in derivative_rows(readout, z, dz, cell, n_frames * n_elements)
        ]
    )
    no_constants = derivatives.new_zeros(len(derivatives), n_elements)
    derivatives = torch.cat([derivatives, no_constants], dim=1)
    work = (directions.work(graph, target) - directions.work(graph, base)) * scale.T
    phi = silu(readout.lift(z))
    sums = phi.new_zeros(n_frames * n_elements, phi.shape[1]).index_add(0, cell, phi).view(n_frames, -1)
    ones = one_hot(element, n_elements).to(phi)
    counts = phi.new_zeros(n_frames, n_elements).index_add(0, graph.structure_index, ones)
    weight = energy_weight * scale * counts.sum(1, keepdim=True).rsqrt()
    energies = torch.cat([sums, counts], dim=1) * weight
    energy_targets = (target.energy - base.energy)[:, None].to(phi) * weight
    return torch.cat([derivatives, energies]), torch.cat([work.reshape(-1, 1), energy_targets])


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


def fit_readout(fitting: Gram, held_out: Gram) -> ReadoutFit:
    """Choose the ridge on held-out frames, from the largest down until two in turn gain nothing; the anchor is zero."""
    prior = torch.zeros_like(fitting.xy)
    if not held_out.n_rows:
        solution = ridge_solve(fitting, prior, ridge=1e-6)
        return ReadoutFit(solution, 1e-6, solution.residual_after)
    trials: list[tuple[float, float]] = []
    for start in range(0, len(RIDGES), n_ranks()):  # as many at once as processes share the work
        if _settled(trials):
            break
        wave = RIDGES[start : start + n_ranks()]
        tried = gathered({k: _held_out_residual(fitting, held_out, ridge) for k, ridge in mine(wave)})
        for trial in zip(tried, wave, strict=True):
            trials += [] if _settled(trials) else [trial]
    best, ridge = min(trials)
    return ReadoutFit(ridge_solve(fitting + held_out, prior, ridge=ridge), ridge, best)


def _settled(trials: Sequence[tuple[float, float]]) -> bool:
    """Whether two in turn gained nothing."""
    return bool(trials) and len(trials) - trials.index(min(trials)) > 2


def _held_out_residual(fitting: Gram, held_out: Gram, ridge: float) -> float:
    factor, _ = regularized_factor(fitting, ridge=ridge)
    return held_out.residual(torch.cholesky_solve(fitting.xy, factor))


def _statistics(
    merged: Potential,
    calibration_sets: Sequence[CalibrationSet],
    options: ReadoutOptions,
    elements: Tensor,
    at_once: int | None,
    progress: Progress,
) -> tuple[Gram, Gram]:
    """Statistics of all specialists: of the frames to fit, and of the held-out ones."""
    size = len(elements) * (random_feature_readout(merged).lift.out_features + 1)
    grams = [Gram.zero(size, 1, device=merged.device) for _ in range(2)]
    n, title = len(calibration_sets), described(random_feature_readout(merged).lift.out_features, options)
    for k, calibration_set in enumerate(calibration_sets):
        specialist = calibration_set.specialist
        n_copies = copies_per_frame(specialist, specialist.calibration, options)
        scale = calibration_set.weight / calibration_set.mean_square_target(options)
        for held_out, group in enumerate(_split(specialist.calibration)):
            share = len(group) / len(specialist.calibration)
            begin = k + held_out * (1 - share)
            part = part_of(progress, begin / n, (begin + share) / n, prefix=f"{title}, {specialist.name}: ")
            part(0.0, "copies of frames")
            labelled = with_copies(specialist, group, options, n_copies=n_copies)
            grams[held_out] = _with_frames(
                grams[held_out],
                merged,
                calibration_set,
                labelled,
                options,
                elements,
                weight=scale * share / max(len(labelled), 1),
                at_once=at_once,
                progress=part,
            )
    return pooled(grams[0]), pooled(grams[1])


def described(width: int, options: ReadoutOptions) -> str:
    """Name of a readout, with its width and, where many elements leave less than was asked for, that."""
    return f"readout of {width}" + (f" (not {options.width})" if width < options.width else "") + " features"


def _held_out_share(calibration_set: CalibrationSet) -> float:
    frames = calibration_set.specialist.calibration
    return len(_split(frames)[1]) / len(frames)


def _split(frames: Sequence[Atoms]) -> tuple[list[Atoms], list[Atoms]]:
    """Frames to fit, and frames to choose the ridge."""
    held_out = [atoms for i, atoms in enumerate(frames) if i % HELD_OUT == HELD_OUT - 1]
    return [atoms for i, atoms in enumerate(frames) if i % HELD_OUT != HELD_OUT - 1], held_out


def _with_frames(
    total: Gram,
    merged: Potential,
    calibration_set: CalibrationSet,
    frames: Sequence[Atoms],
    options: ReadoutOptions,
    elements: Tensor,
    *,
    weight: float,
    at_once: int | None,
    progress: Progress,
) -> Gram:
    """Add frames, or the part of them that is for this process, which weigh ``weight`` per force component each."""
    rows: list[Tensor] = []
    targets: list[Tensor] = []
    own = list(mine(chunks(frames, MAX_ATOMS)))
    for i, chunk in own:
        progress((i + 1) / (own[-1][0] + 2), f"batch {i + 1} of {own[-1][0] + 1}")
        row, target = _batch_rows(
            merged,
            calibration_set,
            chunk,
            options,
            elements,
            weight=weight,
            seed=options.seed + i,
            at_once=at_once,
        )
        rows.append(row)
        targets.append(target)
        if sum(map(len, rows)) >= MAX_ROWS or i == own[-1][0]:
            total = total.add_rows(torch.cat(rows), torch.cat(targets))
            rows, targets = [], []
    return total


def _batch_rows(
    merged: Potential,
    calibration_set: CalibrationSet,
    frames: Sequence[Atoms],
    options: ReadoutOptions,
    elements: Tensor,
    *,
    weight: float,
    seed: int,
    at_once: int | None,
) -> tuple[Tensor, Tensor]:
    """Rows and targets of one batch, labelled by the specialist; every frame has the given weight."""
    specialist = calibration_set.specialist
    graphs = [build_graph(atoms, specialist.cutoff, dtype=merged.dtype) for atoms in frames]
    for graph in graphs:
        graph.specialist.fill_(calibration_set.index)
    batch = batch_graphs(graphs).to(merged.device)
    target = predict(specialist.potential.for_inference(), batch)
    n_atoms = torch.bincount(batch.structure_index).to(merged.dtype)
    return readout_rows(
        merged,
        batch,
        target,
        Directions.draw(batch, options.directions, stress_weight=options.stress_weight, seed=seed),
        elements=elements,
        frame_weights=weight / n_atoms,
        energy_weight=options.energy_weight,
        at_once=at_once,
    )
