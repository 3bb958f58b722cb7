r"""Step 4: align the output of a block with every specialist's by correcting all its affine maps together.

Layer by layer, each map matches the specialists' own map on what it is given; what the next block sees is the sum over
neighbours, after nonlinearities and the residual connection. Hence, with :math:`f_k` run on the merged model's own input
state and :math:`X_k^{(t)}` the output of specialist k, the parts c of a state (scalars, vectors) and their directional
derivatives, each relative to its mean square :math:`s_{kc}`,

.. math::

   \min_\Theta \sum_k \frac{a_k}{N_k}\sum_c \frac{1}{s_{kc}} \bigl\| f_{kc}(\Theta) - X^{(t)}_{kc} \bigr\|^2 ,

linearised around the layer-wise solution, :math:`f_k(\Theta) \approx f_k(\Theta^0) + J_k\,\delta`, and solved iteratively
(:mod:`~ase_gffmerge.least_squares.gauss_newton`). The paper's message-level target is the case of a single map, in which f
is affine. Both products with :math:`J_k` are reverse passes through graphs that are built once: :math:`J_k^\top u` through
the output, and :math:`J_k v` through :math:`J_k^\top u`, which is linear in u.

One batch of frames per specialist is fitted. Where there are more, the second one is held out and tells after which
iteration to stop: specialists that are nearly the same leave a mismatch that is soon noise.
"""

from collections import deque
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.func import functional_call

from ase_gffmerge.least_squares.gauss_newton import Thetas, gauss_newton_steps, squared
from ase_gffmerge.least_squares.gram import NOISE
from ase_gffmerge.merging.calibration import (
    CalibrationBatch,
    CalibrationSet,
    advance,
    layer_inputs,
    run_stage,
    stage_inputs,
)
from ase_gffmerge.merging.recipe import Recipe
from ase_gffmerge.merging.report import LayerReport
from ase_gffmerge.merging.tangents import differentiable_pushforward
from ase_gffmerge.models.affine_maps import adjustable_maps, is_adjustable
from ase_gffmerge.models.base import Stage, State

ITERATIONS, DAMPING = 15, 1e-3
"""Conjugate-gradient iterations, and the damping μ of the step."""

PATIENCE = 2
"""Iterations in a row that may lose on held-out frames before they end."""


def align_block(
    name: str,
    merged: Stage,
    originals: Sequence[Stage],
    calibration_sets: Sequence[CalibrationSet],
    recipe: Recipe,
    *,
    iterations: int = ITERATIONS,
) -> LayerReport:
    """Take one Gauss-Newton step on all maps of a block.

    Without frames to hold out, the step is halved, twice at most, until the mismatch falls.

    Parameters
    ----------
    name
        Qualified name of the block, for the report.
    merged, originals
        The block in the merged model (written in place) and in every specialist.
    calibration_sets
        Calibration frames, in the order of ``originals``.
    recipe
        Weight of derivatives.
    iterations
        Of conjugate gradients.
    """
    linear = LinearizedBlock(merged, originals, calibration_sets, recipe)
    steps = gauss_newton_steps(linear, iterations=iterations, damping=DAMPING)
    before = squared(linear.residual)
    if all(len(calibration_set.batches) > 1 for calibration_set in calibration_sets):
        held_out = BlockMismatch(merged, originals, calibration_sets, recipe, batch=1)
        found = _best(linear.thetas, steps, held_out)
        after = linear.mismatch(found)
    else:
        found, after = _downhill(linear, steps, before)
    if found is not linear.thetas:
        linear.write(found)
    return LayerReport(
        name=name,
        kind="message",
        rows=sum(len(part) for part in linear.residual),
        size=sum(theta.numel() for theta in linear.thetas.values()),
        residual_before=before / linear.target_norm,
        residual_after=after / linear.target_norm,
        effective_rank=None,
        ridge=DAMPING,
    )


def _best(start: Thetas, steps: Iterator[Thetas], held_out: "BlockMismatch") -> Thetas:
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


def _downhill(linear: "LinearizedBlock", steps: Iterator[Thetas], before: float) -> tuple[Thetas, float]:
    """Maps after the last iteration, or a part of the way there, and their mismatch."""
    for step in deque(steps, maxlen=1):  # none where there is nothing to correct
        for factor in (1.0, 0.5, 0.25):
            trial = _moved(linear.thetas, step, factor)
            mismatch = linear.mismatch(trial)
            if mismatch < before:
                return trial, mismatch
    return linear.thetas, before


def _moved(thetas: Thetas, step: Thetas, factor: float) -> Thetas:
    return {name: theta + factor * step[name] for name, theta in thetas.items()}


class BlockMismatch:
    r"""Weighted mismatch :math:`\sqrt{a_k / s_{kc}}\,(X^{(t)}_{kc} - f_{kc}(\Theta))` of one batch of every specialist.

    Parameters
    ----------
    block, originals
        The block in the merged model and in every specialist.
    calibration_sets
        Calibration frames, in the order of ``originals``.
    recipe
        Weight of derivatives.
    batch
        Which batch of every specialist.

    Attributes
    ----------
    target_norm
        Weighted sum of squares of the targets.
    """

    def __init__(
        self,
        block: Stage,
        originals: Sequence[Stage],
        calibration_sets: Sequence[CalibrationSet],
        recipe: Recipe,
        *,
        batch: int = 0,
    ):
        self._block, self._maps = block, adjustable_maps(block)
        names = {module: name for name, module in block.named_modules()}
        self._layers = {name: names[affine_map.module] for name, affine_map in self._maps.items()}
        self._batches = [calibration_set.batches[batch] for calibration_set in calibration_sets]
        weights = [calibration_set.weight for calibration_set in calibration_sets]
        states = [
            advance(original, frames.target, frames)
            for original, frames in zip(originals, self._batches, strict=True)
        ]
        self._factors = [
            _factors(state.value, weight) + _factors(state.tangent, weight * recipe.derivative_weight)
            for state, weight in zip(states, weights, strict=True)
        ]
        self._targets = [
            _weighted(state.value + state.tangent, factors)
            for state, factors in zip(states, self._factors, strict=True)
        ]
        self.target_norm = squared(self._targets)

    def output(self, k: int, thetas: Thetas) -> Tensor:
        """f_k(Θ), weighted and flat."""
        frames, parameters = self._batches[k], self._parameters(thetas)

        def block(*x: Tensor) -> State:
            return tuple(functional_call(self._block, parameters, frames.split(x)))

        return _weighted(differentiable_pushforward(block, stage_inputs(frames, True)), self._factors[k])

    def _parameters(self, thetas: Thetas) -> dict[str, Tensor]:
        """The block's parameters as differentiable functions of its maps; maps of one layer change their own entries."""
        found: dict[str, Tensor] = {}
        for name, affine_map in self._maps.items():
            for key, value in affine_map.parameters(thetas[name]).items():
                full = f"{self._layers[name]}.{key}"
                known = self._block.get_parameter(full).detach()
                found[full] = found.get(full, known) + value - known
        return found

    @torch.no_grad()
    def mismatch(self, thetas: Thetas) -> float:
        """Squared mismatch of some maps."""
        return squared([y - self.output(k, thetas) for k, y in enumerate(self._targets)])


class LinearizedBlock(BlockMismatch):
    """The mismatch on the first batch, linearised around the block's present maps.

    Parameters
    ----------
    block, originals, calibration_sets, recipe
        See :class:`BlockMismatch`.

    Attributes
    ----------
    thetas, grams, residual
        See :class:`~ase_gffmerge.least_squares.gauss_newton.LinearizedResiduals`.
    """

    def __init__(
        self,
        block: Stage,
        originals: Sequence[Stage],
        calibration_sets: Sequence[CalibrationSet],
        recipe: Recipe,
    ):
        super().__init__(block, originals, calibration_sets, recipe)
        self.thetas = {name: affine_map.read().detach().clone() for name, affine_map in self._maps.items()}
        self.grams = {name: torch.zeros(()).to(theta) for name, theta in self.thetas.items()}
        self._outputs: list[Tensor] = []
        self._linear: list[tuple[Tensor, tuple[Tensor, ...]]] = []
        self._leaves = {name: theta.clone().requires_grad_() for name, theta in self.thetas.items()}
        for k in range(len(self._batches)):
            self._linearize(k)
        self.residual = [y - f.detach() for y, f in zip(self._targets, self._outputs, strict=True)]

    def _linearize(self, k: int) -> None:
        for name, gram in self._grams(self._batches[k]).items():
            self.grams[name] = self.grams[name] + gram
        with torch.enable_grad():
            nothing = sum(leaf.sum() for leaf in self._leaves.values()) * 0  # links maps that no row enters
            output = self.output(k, self._leaves) + nothing
            u = torch.zeros_like(output, requires_grad=True)
            pulled = torch.autograd.grad(output, list(self._leaves.values()), u, create_graph=True)
        self._outputs.append(output)
        self._linear.append((u, pulled))

    def _grams(self, batch: CalibrationBatch) -> Thetas:
        """Gram matrix of the rows that enter every map, of mean eigenvalue 1."""
        values = stage_inputs(batch, True).value
        with torch.no_grad():
            entering = layer_inputs(
                self._block, lambda: run_stage(self._block, batch, values), wanted=is_adjustable
            )
            rows = {name: one.design(entering[self._layers[name]]) for name, one in self._maps.items()}
        return {name: x.T @ x / x.square().sum().clamp(min=1e-30) * x.shape[1] for name, x in rows.items()}

    def forward(self, direction: Thetas) -> list[Tensor]:
        """J v."""
        along = [direction[name] for name in self._leaves]
        return [torch.autograd.grad(p, u, along, retain_graph=True)[0] for u, p in self._linear]

    def vjp(self, k: int, vector: Tensor) -> Thetas:
        """Specialist k's part of Jᵀ u."""
        leaves = list(self._leaves.values())
        gradients = torch.autograd.grad(self._outputs[k], leaves, vector, retain_graph=True)
        return dict(zip(self._leaves, gradients, strict=True))

    def write(self, thetas: Thetas) -> None:
        """Set the block's maps."""
        for name, affine_map in self._maps.items():
            affine_map.write(thetas[name])


def _factors(parts: State, weight: float) -> tuple[float, ...]:
    """Square roots of a_k / s_kc; parts that are zero, or but round-off of zero beside the largest, do not count."""
    squares = [float(part.double().square().sum()) for part in parts]
    means = [square / max(part.numel(), 1) for square, part in zip(squares, parts, strict=True)]
    least = NOISE * max(means, default=0.0)
    return tuple(
        (weight / square) ** 0.5 if mean > least else 0.0 for square, mean in zip(squares, means, strict=True)
    )


def _weighted(parts: State, factors: Sequence[float]) -> Tensor:
    return torch.cat([(part * factor).flatten() for part, factor in zip(parts, factors, strict=True)])
