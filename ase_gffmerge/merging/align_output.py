r"""Step 4: align the output of a stage with every specialist's by correcting all its affine maps together.

Layer by layer, each map matches the specialists' own map on what it is given; what the next stage sees is the sum over
neighbours, after nonlinearities and the residual connection. Hence, with :math:`f_k` run on the merged model's own input
state and :math:`X_k^{(t)}` the output of specialist k,

.. math::

   \min_\Theta \sum_k \frac{a_k}{N_k}\sum_c \frac{1}{s_{kc}} \bigl\| f_{kc}(\Theta) - X^{(t)}_{kc} \bigr\|^2 ,

linearised around the layer-wise solution (:mod:`.stage_output`) and solved iteratively (:mod:`.gauss_newton`). The paper's
message-level target is the case of a single map, in which f is affine.
"""

from collections.abc import Sequence

from ase_gffmerge.merging.gauss_newton import gauss_newton_step
from ase_gffmerge.merging.recipe import Recipe
from ase_gffmerge.merging.report import LayerReport
from ase_gffmerge.merging.stage_output import StageOutput, squared
from ase_gffmerge.merging.territory import Territory
from ase_gffmerge.models.potential import Stage

ITERATIONS, DAMPING = 15, 1e-3
"""Conjugate-gradient iterations, and the damping μ of the step."""


def align_output(
    name: str,
    merged: Stage,
    originals: Sequence[Stage],
    territories: Sequence[Territory],
    recipe: Recipe,
    *,
    iterations: int = ITERATIONS,
) -> LayerReport:
    """Take one Gauss-Newton step on all maps of a stage; it is halved, twice at most, until the mismatch falls.

    Parameters
    ----------
    name
        Qualified name of the stage, for the report.
    merged, originals
        The stage in the merged model (written in place) and in every specialist.
    territories
        Calibration scenes, in the order of ``originals``.
    recipe
        Options.
    iterations
        Of conjugate gradients.
    """
    problem = StageOutput(merged, originals, territories, recipe)
    step = gauss_newton_step(problem, iterations=iterations, damping=DAMPING)
    before = after = squared(problem.residual)
    for factor in (1.0, 0.5, 0.25):
        trial = {key: theta + factor * step[key] for key, theta in problem.thetas.items()}
        mismatch = problem.mismatch(trial)
        if mismatch < before:
            problem.write(trial)
            after = mismatch
            break
    return LayerReport(
        name=name,
        kind="message",
        rows=sum(len(part) for part in problem.residual),
        size=sum(theta.numel() for theta in problem.thetas.values()),
        residual_before=before / problem.target_norm,
        residual_after=after / problem.target_norm,
        effective_rank=None,
        ridge=DAMPING,
    )
