r"""Step 4: align the output of a stage with every specialist's by correcting all its affine maps together.

Layer by layer, each map matches the specialists' own map on what it is given; what the next stage sees is the sum over
neighbours, after nonlinearities and the residual connection. Hence, with :math:`f_k` run on the merged model's own input
state and :math:`X_k^{(t)}` the output of specialist k,

.. math::

   \min_\Theta \sum_k \frac{a_k}{N_k}\sum_c \frac{1}{s_{kc}} \bigl\| f_{kc}(\Theta) - X^{(t)}_{kc} \bigr\|^2 ,

linearised around the layer-wise solution (:mod:`.stage_output`) and solved iteratively (:mod:`.gauss_newton`). The paper's
message-level target is the case of a single map, in which f is affine.

One batch of frames per specialist is fitted. Where there are more, the second one is held out and tells after which
iteration to stop: specialists that are nearly the same leave a mismatch that is soon noise.
"""

from collections import deque
from collections.abc import Iterator, Sequence

from ase_gffmerge.least_squares.gauss_newton import Thetas, gauss_newton_steps, squared
from ase_gffmerge.merging.calibration import CalibrationSet
from ase_gffmerge.merging.recipe import Recipe
from ase_gffmerge.merging.report import LayerReport
from ase_gffmerge.merging.stage_output import LinearizedBlock, StageMismatch
from ase_gffmerge.models.base import Stage

ITERATIONS, DAMPING = 15, 1e-3
"""Conjugate-gradient iterations, and the damping μ of the step."""

PATIENCE = 2
"""Iterations in a row that may lose on held-out frames before they end."""


def align_output(
    name: str,
    merged: Stage,
    originals: Sequence[Stage],
    calibration_sets: Sequence[CalibrationSet],
    recipe: Recipe,
    *,
    iterations: int = ITERATIONS,
) -> LayerReport:
    """Take one Gauss-Newton step on all maps of a stage.

    Without frames to hold out, the step is halved, twice at most, until the mismatch falls.

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
    problem = LinearizedBlock(merged, originals, calibration_sets, recipe)
    steps = gauss_newton_steps(problem, iterations=iterations, damping=DAMPING)
    before = squared(problem.residual)
    if all(len(calibration_set.scenes) > 1 for calibration_set in calibration_sets):
        held_out = StageMismatch(merged, originals, calibration_sets, recipe, batch=1)
        found = _best(problem.thetas, steps, held_out)
        after = problem.mismatch(found)
    else:
        found, after = _downhill(problem, steps, before)
    if found is not problem.thetas:
        problem.write(found)
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


def _best(start: Thetas, steps: Iterator[Thetas], held_out: StageMismatch) -> Thetas:
    """Maps after the iteration that is best on held-out frames; ``start`` if none gains anything."""
    best, least, lost = start, held_out.mismatch(start), 0
    for step in steps:
        trial = _moved(start, step, 1.0)
        mismatch = held_out.mismatch(trial)
        if mismatch < least:
            best, least, lost = trial, mismatch, 0
        elif (lost := lost + 1) == PATIENCE:
            break
    return best


def _downhill(problem: LinearizedBlock, steps: Iterator[Thetas], before: float) -> tuple[Thetas, float]:
    """Maps after the last iteration, or a part of the way there, and their mismatch."""
    for step in deque(steps, maxlen=1):  # none where there is nothing to correct
        for factor in (1.0, 0.5, 0.25):
            trial = _moved(problem.thetas, step, factor)
            mismatch = problem.mismatch(trial)
            if mismatch < before:
                return trial, mismatch
    return problem.thetas, before


def _moved(thetas: Thetas, step: Thetas, factor: float) -> Thetas:
    return {name: theta + factor * step[name] for name, theta in thetas.items()}
