"""Step 5 with every choice open: frames, copies, features, sharing, weights, and how the ridge is chosen."""

import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from ase import Atoms
from torch import Tensor

from ase_gffmerge.data.frames import displaced
from ase_gffmerge.graphs import batch_graphs, build_graph, predict
from ase_gffmerge.least_squares.gram import Gram
from ase_gffmerge.least_squares.ridge import regularized_factor, ridge_solve
from ase_gffmerge.merging.calibration import CalibrationSet
from ase_gffmerge.merging.random_features import draw_random_features, random_feature_readout
from ase_gffmerge.merging.readout_fit import HELD_OUT, MAX_ATOMS, MAX_ROWS, RIDGES, ReadoutFit, fit_readout
from ase_gffmerge.merging.recipe import ReadoutOptions
from ase_gffmerge.merging.tangents import Directions
from ase_gffmerge.models import Potential
from ase_gffmerge.models.layers.readout import RandomFeatureReadout
from ase_gffmerge.runtime.devices import chunks
from research.bench import Bench, MergeOutput, shared
from research.features import feature_rows, lifted_inputs
from research.trunk import Trunk

CHEAP = ReadoutOptions(
    width=1024,
    blocks=3,
    inputs=192,
    copies=2,
    temperature=0.0,
    displacement=0.02,
    directions=6,
    energy_weight=10.0,
)
"""The cheap reference that trials are compared with: dense features, rattled copies."""

Copies = Callable[[Sequence[Atoms], CalibrationSet, ReadoutOptions], list[Atoms]]
"""Further frames near the given ones of a territory."""

Lift = Callable[[RandomFeatureReadout, Tensor, Tensor], None]
"""``lift(readout, rows, element)`` draws the projection for inputs (n_atoms, d) of elements (n_atoms,)."""


def rattled(frames: Sequence[Atoms], calibration_set: CalibrationSet, options: ReadoutOptions) -> list[Atoms]:
    """Copies with every atom displaced on its own."""
    rng = np.random.default_rng(options.seed)
    return [
        displaced(atoms, rattle=options.displacement, strain=0.0, rng=rng)
        for _ in range(options.copies)
        for atoms in frames
    ]


def whitened(readout: RandomFeatureReadout, rows: Tensor, element: Tensor, *, spread: float = 0.5) -> None:
    """The product's features: random directions in inputs scaled to unit variance."""
    draw_random_features(readout, rows, seed=0, spread=spread)


def with_wide_readout(potential: Potential, options: ReadoutOptions) -> Potential:
    """Copy with a random-feature readout at θ = c = 0, whatever its stages are."""
    hyper, n_species = potential.hyper, len(potential.species)
    blocks = min(options.blocks, hyper.n_blocks)
    own = deepcopy(potential.readout)
    readout = RandomFeatureReadout(own, hyper.channels, n_species, width=options.width, blocks=blocks)
    wide = deepcopy(potential)
    wide.hyper = replace(hyper, readout_width=options.width, readout_blocks=blocks)
    wide.readout = readout.to(potential.embedding)
    return wide.eval().requires_grad_(False)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One way to fit the readout; the defaults are the cheap reference's.

    Attributes
    ----------
    options
        Width, blocks, weights, copies, directions.
    frames
        Frames of every specialist instead of its calibration frames.
    copies, lift, widen
        Make the copies, draw the projection, give a potential its new readout.
    shared_theta
        One θ for all elements.
    ridge
        Chosen on held-out frames, or by generalised cross-validation on all rows.
    frame_weights
        How much each frame of a batch counts, (n_frames,) with mean about 1.
    """

    options: ReadoutOptions = CHEAP
    frames: tuple[tuple[Atoms, ...], ...] | None = None
    copies: Copies = rattled
    lift: Lift = whitened
    with_random_feature_readout: Callable[[Potential, ReadoutOptions], Potential] = with_wide_readout
    shared_theta: bool = False
    ridge: Literal["held-out", "gcv"] = "held-out"
    frame_weights: Callable[[CalibrationSet, Sequence[Atoms]], np.ndarray] | None = None


@torch.no_grad()
def fit_potentials(
    potentials: Sequence[Potential], calibration_sets: Sequence[CalibrationSet], setting: Setting
) -> tuple[list[Potential], ReadoutFit]:
    """Fit one readout on all territories, with one trunk per territory (often the same).

    Returns
    -------
    potentials
        Copies of the given ones with the new readout; one object where the same was given.
    fit
        Solution and the ridge chosen.
    """
    given = {id(p): p for p in potentials}
    wide = {key: setting.with_random_feature_readout(p, setting.options) for key, p in given.items()}
    merged = [wide[id(p)] for p in potentials]
    scenes = [(m, scene) for m, t in zip(merged, calibration_sets, strict=True) for scene in t.batches]
    element = torch.cat([m.species_row[scene.graph.atomic_numbers] for m, scene in scenes])
    first = random_feature_readout(merged[0])
    setting.lift(first, torch.cat([lifted_inputs(m, scene.graph) for m, scene in scenes]), element)
    for model in merged[1:]:
        model.readout = first
    frames = setting.frames or tuple(t.specialist.calibration for t in calibration_sets)
    elements = merged[0].species_row[
        torch.as_tensor(np.unique(np.concatenate([a.numbers for f in frames for a in f])))
    ]
    size = len(elements) * (setting.options.width + 1)
    grams = [Gram.zero(size, 1) for _ in range(2)]
    for model, calibration_set, own in zip(merged, calibration_sets, frames, strict=True):
        for part, gram in enumerate(territory_grams(model, calibration_set, own, setting, elements)):
            grams[part] += gram
    fit, theta = solve_readout(grams, setting, n_elements=len(elements))
    first.theta[elements] = theta[: -len(elements)].view(len(elements), -1).to(first.theta)
    first.constants[elements] = theta[-len(elements) :].to(first.theta)
    return merged, fit


def split(frames: Sequence[Atoms]) -> tuple[list[Atoms], list[Atoms]]:
    """Frames to fit, and frames to choose the ridge."""
    last = HELD_OUT - 1
    return [a for i, a in enumerate(frames) if i % HELD_OUT != last], list(frames[last::HELD_OUT])


def territory_grams(
    merged: Potential,
    calibration_set: CalibrationSet,
    frames: Sequence[Atoms],
    setting: Setting,
    elements: Tensor,
) -> list[Gram]:
    """Statistics of the frames to fit and of those held out, with their copies; together they weigh a_k / s_k."""
    groups = [[*group, *setting.copies(group, calibration_set, setting.options)] for group in split(frames)]
    n_frames = sum(map(len, groups))
    size = len(elements) * (setting.options.width + 1)
    grams = []
    for group in groups:
        total, rows, targets = Gram.zero(size, 1), [], []
        batches = list(chunks(group, MAX_ATOMS))
        for i, batch in enumerate(batches):
            row, target = batch_rows(
                merged, calibration_set, batch, setting, elements, n_frames=n_frames, seed=i
            )
            rows.append(row)
            targets.append(target)
            if sum(map(len, rows)) >= MAX_ROWS or i == len(batches) - 1:
                total += Gram.of(torch.cat(rows), torch.cat(targets))
                rows, targets = [], []
        grams.append(total)
    return grams


def batch_rows(
    merged: Potential,
    calibration_set: CalibrationSet,
    frames: Sequence[Atoms],
    setting: Setting,
    elements: Tensor,
    *,
    n_frames: int,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """Rows and targets of one batch, labelled by the specialist."""
    specialist, options = calibration_set.specialist, setting.options
    graphs = [build_graph(atoms, specialist.cutoff, dtype=merged.dtype) for atoms in frames]
    batch = batch_graphs(graphs)
    weights = calibration_set.weight / (
        n_frames * torch.bincount(batch.structure_index) * calibration_set.mean_square_force
    )
    if setting.frame_weights is not None:
        weights = weights * torch.as_tensor(setting.frame_weights(calibration_set, frames))
    return feature_rows(
        merged,
        batch,
        predict(specialist.potential, batch),
        Directions.draw(
            batch, options.directions, stress_weight=options.stress_weight, seed=options.seed + seed
        ),
        elements=elements,
        frame_weights=weights.to(merged.dtype),
        energy_weight=options.energy_weight,
    )


def solve_readout(grams: Sequence[Gram], setting: Setting, *, n_elements: int) -> tuple[ReadoutFit, Tensor]:
    """Coefficients [θ of every element; c], float64, from the statistics to fit and those held out."""
    expand = None
    if setting.shared_theta:
        width = setting.options.width
        expand = torch.zeros(n_elements * (width + 1), width + n_elements, dtype=torch.float64)
        expand[: n_elements * width, :width] = torch.eye(width).repeat(n_elements, 1)
        expand[n_elements * width :, width:] = torch.eye(n_elements)
        grams = [Gram(expand.T @ g.xx @ expand, expand.T @ g.xy, g.yy, g.n_rows) for g in grams]
    fit = fit_readout(*grams) if setting.ridge == "held-out" else fit_by_gcv(grams[0] + grams[1])
    theta = fit.solution.theta if expand is None else expand @ fit.solution.theta
    return fit, theta[:, 0]


def fit_by_gcv(gram: Gram) -> ReadoutFit:
    r"""Choose the ridge by generalised cross-validation, :math:`n\,\mathrm{RSS}/(n-\mathrm{rank})^2` (Golub et al. 1979)."""
    prior, scores = torch.zeros_like(gram.xy), []
    for ridge in RIDGES:
        factor, mu = regularized_factor(gram, ridge=ridge)
        rank = len(factor) - mu * float(torch.cholesky_inverse(factor).diagonal().sum())
        residual = gram.residual(torch.cholesky_solve(gram.xy, factor))
        scores.append((residual / (1 - rank / gram.n_rows) ** 2, ridge))
    best, ridge = min(scores)
    return ReadoutFit(ridge_solve(gram, prior, ridge=ridge), ridge, best)


def fitted(trunk: Trunk, setting: Setting, *, extra_seconds: float = 0.0) -> MergeOutput:
    """Fit the readout of a finished trunk; ``extra_seconds`` were spent on frames or features before."""
    start = time.process_time()
    potentials, fit = fit_potentials(
        shared(trunk.potential, [t.specialist for t in trunk.calibration_sets]),
        trunk.calibration_sets,
        setting,
    )
    seconds = trunk.seconds + extra_seconds + time.process_time() - start
    note = f"ridge {fit.ridge:.0e}, rank {fit.solution.effective_rank:.0f}"
    return MergeOutput(potentials=tuple(potentials), seconds=seconds, note=note)


def on_shared_trunk(setting: Setting) -> Callable[[Bench], MergeOutput]:
    """A trial that changes only the readout."""
    return lambda bench: fitted(bench.trunk, setting)
