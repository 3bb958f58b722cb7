r"""The reference method (GffMerge, arXiv 2606.03232): every layer solved on the specialists' own activations.

Each specialist k runs on its own calibration frames; X_k are the rows that enter a linear layer and Y_k its outputs before
the activation. In float64 each layer is

.. math:: \Theta = [W; b] = \arg\min_\Theta\ \sum_k \bigl\| [X_k\ 1]\,\Theta - Y_k \bigr\|^2 + 10^{-6}\,\|\Theta\|^2 ,

and everything else (embeddings, norms, scales) is the mean of the specialists'; with ``conditioning: per-specialist`` each
keeps its own embedding table ("switched embeddings"). The paper fits the bias of layers that have none, too, and then drops
it. As :math:`Y_k = [X_k\ 1]\,\Theta_k` with the specialist's own coefficients, the Gram matrices
:math:`G_k = [X_k\ 1]^\top [X_k\ 1]` say all.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from ase_gffmerge.forcefield.force_field import ForceField
from ase_gffmerge.graphs.graph import edge_vectors
from ase_gffmerge.least_squares.gram import Gram, symmetric_product
from ase_gffmerge.least_squares.ridge import ridge_solve
from ase_gffmerge.merging.calibration import calibration_graphs, layer_inputs
from ase_gffmerge.merging.recipe import Recipe
from ase_gffmerge.merging.report import LayerReport
from ase_gffmerge.models import Potential
from ase_gffmerge.models.affine_maps import AffineMap, affine_maps, layer_maps, with_ones


@torch.no_grad()
def solve_paper(merged: Potential, specialists: Sequence[ForceField], recipe: Recipe) -> list[LayerReport]:
    """Solve every affine map of the merged potential, which comes as the mean and is written in place.

    Parameters
    ----------
    merged
        Mean of the specialists; layers that no frame reaches stay as they are.
    specialists
        With calibration frames, on one device.
    recipe
        ``ridge`` and ``weights``, a factor for each specialist's squared residuals.
    """
    weights = recipe.weights or (1.0,) * len(specialists)
    grams = [_own_statistics(specialist) for specialist in specialists]
    maps, reports = affine_maps(merged), []
    for name in grams[0]:
        first, *others = [
            own[name] * weight for own, weight in zip(grams, weights, strict=True) if name in own
        ]
        gram = sum(others, start=first)
        if gram.n_rows:
            reports.append(_solve(maps[name], gram, ridge=recipe.ridge))
    return reports


def _own_statistics(specialist: ForceField) -> dict[str, Gram]:
    """Statistics of every map of a specialist on its own frames, in execution order."""
    potential, total = specialist.potential, dict[str, Gram]()
    for graph in calibration_graphs(specialist):
        products: dict[object, Tensor] = {}  # layers that cut the same rows from the same tensor share them
        forward = partial(potential, edge_vectors(graph), graph)
        for layer, x in layer_inputs(potential, forward).items():
            for affine_map in layer_maps(layer, potential.get_submodule(layer)):
                rows, key = affine_map.rows(x), (id(x), affine_map.rows)
                if key not in products:
                    products[key] = symmetric_product(with_ones(rows).double())
                theta = affine_map.read().double()
                xx = products[key]
                xy = xx[:, : len(theta)] @ theta
                gram = Gram(xx, xy, float((theta * xy[: len(theta)]).sum()), float(len(rows)))
                total[affine_map.name] = total[affine_map.name] + gram if affine_map.name in total else gram
    return total


def _solve(affine_map: AffineMap, gram: Gram, *, ridge: float) -> LayerReport:
    mean = affine_map.read().double()
    size = len(mean)
    if not affine_map.has_bias:
        mean = torch.cat([mean, mean.new_zeros(1, mean.shape[1])])
    solution = ridge_solve(gram, torch.zeros_like(mean), ridge=ridge, relative=False)
    affine_map.write(solution.theta[:size].to(affine_map.read().dtype))
    return LayerReport.of(affine_map.name, "layer", solution, before=gram.residual(mean))
