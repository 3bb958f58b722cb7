r"""Steps 1-3: align the affine layers of a block, one after the other, with every specialist's.

Each layer maps rows linearly, :math:`y = [x\ 1]\,\Theta`. In the order of execution, each is solved as

.. math::

   \min_\Theta\ \sum_k \frac{a_k}{n_k s_k} \bigl\| [X_k\ 1]\,\Theta - Y_k \bigr\|^2
   \;+\; \lambda\,\frac{\mathrm{tr}\,G}{d}\, \bigl\| \Theta - \Theta_{\rm mean} \bigr\|^2 ,\qquad
   G = \sum_k \frac{a_k}{n_k s_k}\,[X_k\ 1]^\top [X_k\ 1] .

What the reference method (:mod:`.paper`) does not do: X_k come from the merged model as built so far, so that later layers
correct the errors of earlier ones; specialists count the same, however many frames they bring and however large their
outputs are; the ridge pulls to the mean, where nothing else is known. Forces are derivatives, which values do not determine:
along P random displacements of the atoms (:mod:`.tangents`) the same Θ maps :math:`\dot X_k` to :math:`\dot Y_k`, which are
further rows without the column of ones, scaled so that all targets :math:`\dot Y_k` together weigh ``derivative_weight``
times what Y_k do. The problem stays convex, and is solved from Gram statistics by a Cholesky factorisation in float64.

=================================================  ======================================================================
symbol                                             variable
=================================================  ======================================================================
Θ = [W; b], Θ_mean                                 ``affine_map`` of the merged model, after and before it is solved
X_k, :math:`\dot X_k`                              ``ours.value``, ``ours.tangent``: what enters the merged model's layer
Y_k = [X 1] Θ_k, :math:`\dot Y_k = \dot X Θ_k`     targets: specialist k's own input ``own``, mapped by its own ``theta``
[X_k 1]                                            ``affine_map.design(x)``; the ones only where the layer has a bias
G, C = Σ_k [X_k 1]ᵀ Y_k                            ``gram.xx``, ``gram.xy``
n_k, s_k                                           ``Gram.n_rows``, ``Gram.mean_square_target``: rows, and mean square of Y_k
a_k, λ                                             ``CalibrationSet.weight``, ``recipe.ridge``
=================================================  ======================================================================

Equivariant layers are such maps, too, one per irrep (:mod:`ase_gffmerge.models.affine_maps`).
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ase_gffmerge.least_squares.gram import Gram, normalized_sum
from ase_gffmerge.least_squares.ridge import ridge_solve
from ase_gffmerge.merging.calibration import CalibrationSet, Inputs, Run, affine_layers, entering
from ase_gffmerge.merging.recipe import Recipe
from ase_gffmerge.merging.report import LayerReport
from ase_gffmerge.merging.tangents import Dual
from ase_gffmerge.models.affine_maps import AffineMap, layer_maps
from ase_gffmerge.runtime.distributed import agreed, pooled
from ase_gffmerge.runtime.progress import Progress, no_progress


def align_layers(
    prefix: str,
    merged: nn.Module,
    originals: Sequence[nn.Module],
    calibration_sets: Sequence[CalibrationSet],
    recipe: Recipe,
    *,
    run: Run,
    inputs: Inputs,
    outputs: Mapping[str, Tensor] | None = None,
    prior: nn.Module | None = None,
    progress: Progress = no_progress,
) -> list[LayerReport]:
    """Solve every affine layer of a block in execution order.

    Parameters
    ----------
    prefix
        Qualified name of the block, for the report.
    merged
        The block (a stage or the readout) in the merged model; written in place.
    originals
        The same block in every specialist.
    calibration_sets
        Calibration frames, in the order of ``originals``.
    recipe
        λ and the weight of derivatives.
    run, inputs
        How to evaluate the block on a batch of frames.
    outputs
        For maps of a block with fewer channels, by name, which outputs of the originals are theirs.
    prior
        The block whose weights the ridge pulls to; default: ``merged`` as it is before.
    progress
        Called with a fraction (0 to 1) and a description.
    """
    reports, chosen = [], outputs or {}
    names = _order(merged, calibration_sets, run=run, inputs=inputs)
    for n_done, name in enumerate(names):
        progress(n_done / len(names), f"{prefix}.{name}")
        maps = layer_maps(name, merged.get_submodule(name))
        anchors = layer_maps(name, (prior or merged).get_submodule(name))
        statistics = [
            layer_statistics(
                maps,
                layer_maps(name, original.get_submodule(name)),
                (
                    (
                        entering(merged, name, batch, inputs(batch, True), run=run),
                        entering(original, name, batch, inputs(batch, False), run=run),
                    )
                    for batch in calibration_set.batches
                ),
                derivative_weight=recipe.derivative_weight,
                outputs=[chosen.get(affine_map.name) for affine_map in maps],
            )
            for original, calibration_set in zip(originals, calibration_sets, strict=True)
        ]
        for i, affine_map in enumerate(maps):
            gram = normalized_sum(
                [grams[i] for grams in statistics], [one.weight for one in calibration_sets]
            )
            solution = ridge_solve(gram, anchors[i].read().double(), ridge=recipe.ridge)
            affine_map.write(solution.theta.to(affine_map.read().dtype))
            reports.append(LayerReport.of(f"{prefix}.{affine_map.name}", "layer", solution))
    return reports


def layer_statistics(
    maps: Sequence[AffineMap],
    originals: Sequence[AffineMap],
    batches: Iterable[tuple[Dual, Dual]],
    *,
    derivative_weight: float,
    outputs: Sequence[Tensor | None] | None = None,
) -> list[Gram]:
    """Statistics of one specialist for every map of a layer.

    Parameters
    ----------
    maps, originals
        The layer's maps in the merged model and in the specialist.
    batches
        What enters the layer in the merged model and in the specialist.
    derivative_weight
        Weight of all derivatives against all values.
    outputs
        Which outputs of every original are targets; default: all.
    """
    thetas = [
        original.read() if columns is None else original.read()[:, columns]
        for original, columns in zip(originals, outputs or [None] * len(originals), strict=True)
    ]
    values, derivatives = (
        [Gram.zero(*one.read().shape, device=theta.device) for one, theta in zip(maps, thetas)]
        for _ in range(2)
    )
    for ours, own in batches:
        for i, (affine_map, original, theta) in enumerate(zip(maps, originals, thetas, strict=True)):
            targets = original.design(own.value[0]) @ theta
            values[i] += Gram.of(affine_map.design(ours.value[0]), targets)
            if ours.tangent:
                rows, own_rows = affine_map.rows(ours.tangent[0]), original.rows(own.tangent[0])
                no_ones = rows.new_zeros(len(rows), int(affine_map.has_bias))
                targets = own_rows @ theta[: own_rows.shape[1]]
                derivatives[i] += Gram.of(torch.cat([rows, no_ones], dim=1), targets)
    pairs = zip(map(pooled, values), map(pooled, derivatives), strict=True)
    return [value.balanced(own, derivative_weight) for value, own in pairs]


def _order(
    block: nn.Module, calibration_sets: Sequence[CalibrationSet], *, run: Run, inputs: Inputs
) -> list[str]:
    """Names of the affine layers in the order of execution."""
    batches = (batch for one in calibration_sets for batch in one.batches)
    first = next(batches, None)  # of several processes the first one has some
    known = affine_layers(block, lambda: run(block, first, inputs(first, True).value)) if first else []
    return agreed(known)
