r"""RegMean and RegMean++: every affine map solves the regression that its own Gram matrices pose.

RegMean (Jin et al., arXiv 2212.09849, eq. 2) merges the weights of K specialists, layer by layer, into

.. math::

   W = \Bigl(\sum_k \tilde G_k\Bigr)^{-1} \sum_k \tilde G_k W_k ,\qquad
   \tilde G_k = \alpha\,G_k + (1-\alpha)\,\mathrm{diag}\,G_k ,\qquad
   G_k = \frac{1}{n_k} X_k^\top X_k ,

where X_k are the rows that enter the layer in specialist k on its own calibration frames. Biases, embeddings and
reference energies are averaged. RegMean++ (arXiv 2508.03121) takes the rows that enter a *block* from the merged model
as built so far, and passes them through the specialist's own block to reach the layers inside.

α is chosen by the disagreement with the specialists on their calibration frames. Directions in which no specialist has
any input (at α = 1) keep the mean.
"""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import partial
from itertools import chain

import torch
from torch import Tensor, nn

from ase_gffmerge.forcefield.force_field import ForceField
from ase_gffmerge.graphs.graph import edge_vectors
from ase_gffmerge.least_squares.gram import Gram
from ase_gffmerge.least_squares.ridge import ridge_solve
from ase_gffmerge.merging.average import mean_potential
from ase_gffmerge.merging.calibration import (
    CalibrationBatch,
    CalibrationSet,
    advance,
    build_calibration,
    layer_inputs,
    run_stage,
)
from ase_gffmerge.merging.disagreement import DisagreementMetric
from ase_gffmerge.merging.recipe import PRESETS
from ase_gffmerge.merging.tangents import Tensors, pushforward
from ase_gffmerge.methods.base import MergeInputs, MergeOutput, Requirement, method
from ase_gffmerge.methods.weight_space import aligned_copies, grid_of, tune
from ase_gffmerge.models import Potential
from ase_gffmerge.models.affine_maps import affine_maps, layer_maps
from ase_gffmerge.runtime.progress import Progress

ALPHAS = (0.0, 0.1, 0.5, 0.9, 1.0)
"""Values of α that are tried."""

RIDGE = 1e-10
"""Relative ridge towards the mean: decides only where the inputs do not."""

Grams = Mapping[str, Tensor]
"""Gram matrix per row (d_in, d_in) of the inputs of every affine map, by its name."""


def regression_mean(grams: Sequence[Tensor], weights: Sequence[Tensor], *, alpha: float) -> Tensor:
    """Merge the weights (d_in, d_out) of one affine map.

    Parameters
    ----------
    grams
        G_k (d_in, d_in), float64, one per specialist.
    weights
        W_k (d_in, d_out).
    alpha
        Factor of the off-diagonal elements.

    Returns
    -------
    Tensor
        W (d_in, d_out), float64.
    """
    mean = torch.stack([weight.double() for weight in weights]).mean(0)
    shrunk = [alpha * gram + (1 - alpha) * torch.diag(gram.diagonal()) for gram in grams]
    total = torch.stack(shrunk).sum(0)
    offsets = [gram @ (weight - mean) for gram, weight in zip(shrunk, weights, strict=True)]
    gram = Gram(total, torch.stack(offsets).sum(0), yy=0.0, n_rows=0.0)
    return mean + ridge_solve(gram, torch.zeros_like(mean), ridge=RIDGE).theta


def input_grams(root: nn.Module, runs: Sequence[Callable[[], object]]) -> Grams:
    """Gram matrices of what enters the affine maps of ``root`` over several evaluations."""
    total: dict[str, Gram] = {}
    for run in runs:
        for name, x in layer_inputs(root, run).items():
            for affine_map in layer_maps(name, root.get_submodule(name)):
                rows = affine_map.rows(x)
                gram = Gram.of(rows, rows[:, :0])
                total[affine_map.name] = total[affine_map.name] + gram if affine_map.name in total else gram
    return {name: gram.xx / max(gram.n_rows, 1.0) for name, gram in total.items()}


@torch.no_grad()
def solve_maps(
    merged: nn.Module, originals: Sequence[nn.Module], grams: Sequence[Grams], *, alpha: float
) -> None:
    """Write the regression mean into all affine maps; biases stay.

    Parameters
    ----------
    merged
        Holds the mean; written in place.
    originals
        The same module in every specialist.
    grams
        Of what enters the maps in every specialist.
    alpha
        Factor of the off-diagonal elements.
    """
    theirs = [affine_maps(original) for original in originals]
    for name, affine_map in affine_maps(merged).items():
        theta, d = affine_map.read(), len(grams[0][name])
        weights = [maps[name].read()[:d] for maps in theirs]
        solution = regression_mean([gram[name] for gram in grams], weights, alpha=alpha)
        affine_map.write(torch.cat([solution.to(theta), theta[d:]]))


@method("regmean", citation="Jin et al., arXiv 2212.09849", needs=(Requirement.FRAMES,), merges=True)
@torch.no_grad()
def regmean(merge_inputs: MergeInputs, progress: Progress) -> MergeOutput:
    """Regression mean with the Gram matrices of every specialist's own activations."""
    specialists = aligned_copies(merge_inputs)
    mean = mean_potential(specialists, PRESETS["mean"])
    grams: list[Grams] = []
    for specialist, calibration_set in zip(specialists, _calibration(specialists, mean), strict=True):
        progress(0.5 * len(grams) / len(specialists), f"inputs of {specialist.name}")
        graphs = [batch.graph for batch in calibration_set.batches]
        runs = [partial(specialist.potential, edge_vectors(graph), graph) for graph in graphs]
        grams.append(input_grams(specialist.potential, runs))

    def build(alpha: float) -> Potential:
        merged = deepcopy(mean)
        solve_maps(merged, [specialist.potential for specialist in specialists], grams, alpha=alpha)
        return merged

    grid = grid_of(alpha=ALPHAS)
    trial = tune(
        build,
        grid,
        DisagreementMetric.of(specialists),
        progress=lambda x, text: progress(0.5 + 0.5 * x, text),
    )
    return trial.merge_output()


@method("regmean++", citation="Nguyen et al., arXiv 2508.03121", needs=(Requirement.FRAMES,), merges=True)
@torch.no_grad()
def regmean_plus_plus(merge_inputs: MergeInputs, progress: Progress) -> MergeOutput:
    """Regression mean with what the merged model as built so far sends into every block."""
    specialists = aligned_copies(merge_inputs)
    mean = mean_potential(specialists, PRESETS["mean"])
    calibration_sets = _calibration(specialists, mean)

    def build(alpha: float) -> Potential:
        return merge_blockwise(mean, specialists, calibration_sets, alpha=alpha)

    return tune(
        build, grid_of(alpha=ALPHAS), DisagreementMetric.of(specialists), progress=progress
    ).merge_output()


def _calibration(specialists: Sequence[ForceField], mean: Potential) -> list[CalibrationSet]:
    return build_calibration(specialists, mean, len(specialists) * [1.0], directions=0)


def merge_blockwise(
    mean: Potential,
    specialists: Sequence[ForceField],
    calibration_sets: Sequence[CalibrationSet],
    *,
    alpha: float,
) -> Potential:
    """Merge block after block on the merged model's own states.

    Parameters
    ----------
    mean
        The mean of the specialists, which gives everything that is not an affine map.
    specialists, calibration_sets
        Specialists and their calibration frames, embedded by ``mean``.
    alpha
        Factor of the off-diagonal elements of the Gram matrices.
    """
    merged = deepcopy(mean)
    batches = [
        [replace(batch, merged_scalars=[]) for batch in calibration_set.batches]
        for calibration_set in calibration_sets
    ]

    def run_readout(readout: nn.Module, batch: CalibrationBatch) -> Tensor:
        scalars = [dual.value[0] for dual in batch.merged_scalars]
        energies: Tensor = readout(scalars, merged.species_row[batch.graph.atomic_numbers])
        return energies

    for name, stage in merged.named_stages():
        originals = [specialist.potential.get_submodule(name) for specialist in specialists]
        _merge_block(stage, originals, batches, run=_run_stage, alpha=alpha)
        for batch in chain.from_iterable(batches):
            batch.merged = advance(stage, batch.merged, batch)
            if stage.emits_scalars:
                batch.merged_scalars.append(pushforward(lambda *x: merged.scalars(x), batch.merged))
    readouts = [specialist.potential.readout for specialist in specialists]
    _merge_block(merged.readout, readouts, batches, run=run_readout, alpha=alpha)
    return merged


def _run_stage(stage: nn.Module, batch: CalibrationBatch) -> Tensors:
    return run_stage(stage, batch, (batch.merged + batch.geometry).value)


def _merge_block(
    merged: nn.Module,
    originals: Sequence[nn.Module],
    batches: Sequence[Sequence[CalibrationBatch]],
    *,
    run: Callable[[nn.Module, CalibrationBatch], object],
    alpha: float,
) -> None:
    """Merge the affine maps of one block, with inputs from each specialist's block on the merged model's state."""
    grams = [
        input_grams(original, [partial(run, original, batch) for batch in group])
        for original, group in zip(originals, batches, strict=True)
    ]
    solve_maps(merged, originals, grams, alpha=alpha)
