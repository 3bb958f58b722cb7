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

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.func import functional_call

from ase_gffmerge.least_squares.gauss_newton import Thetas, gauss_newton_steps, squared
from ase_gffmerge.least_squares.gram import NOISE
from ase_gffmerge.merging.calibration import (
    CalibrationSet,
    advance,
    layer_inputs,
    run_stage,
    stage_inputs,
)
from ase_gffmerge.merging.recipe import Recipe
from ase_gffmerge.merging.report import LayerReport
from ase_gffmerge.merging.tangents import Dual, differentiable_pushforward
from ase_gffmerge.models.affine_maps import adjustable_maps, is_adjustable
from ase_gffmerge.models.base import Stage, State
from ase_gffmerge.runtime.distributed import add_up, total
from ase_gffmerge.runtime.progress import Progress, no_progress

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
    keep_graphs: bool = True,
    progress: Progress = no_progress,
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
    keep_graphs
        See :class:`LinearizedBlock`.
    progress
        Called with a fraction (0 to 1) and a description.
    """
    linear = LinearizedBlock(merged, originals, calibration_sets, recipe, keep_graphs=keep_graphs)
    steps = _told(
        name, gauss_newton_steps(linear, iterations=iterations, damping=DAMPING), iterations, progress
    )
    before = total(squared(linear.residual))
    if all(calibration_set.n_batches > 1 for calibration_set in calibration_sets):
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
        rows=round(total(sum(len(part) for part in linear.residual))),
        size=sum(theta.numel() for theta in linear.thetas.values()),
        residual_before=before / linear.target_norm,
        residual_after=after / linear.target_norm,
        effective_rank=None,
        ridge=DAMPING,
    )


def _told(name: str, steps: Iterator[Thetas], n: int, progress: Progress) -> Iterator[Thetas]:
    """The same steps, of ``n`` at most; progress is told of each."""
    progress(0.0, f"{name}, correction")
    for i, step in enumerate(steps, start=1):
        progress(i / n, f"{name}, correction {i} of {n}")
        yield step


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
        found = [
            (original, one.weight, [part for part in one.batches if part.number == batch])
            for original, one in zip(originals, calibration_sets, strict=True)
        ]
        own = [one for one in found if one[2]]  # where processes share the work, what is for this one
        weights, self._parts = [weight for _, weight, _ in own], [parts for _, _, parts in own]
        parts = [[advance(original, part.target, part) for part in parts] for original, _, parts in own]
        self._shapes = [[_shapes(state) for state in own] for own in parts]
        states = [_joined(own) for own in parts]
        self._factors = [
            _factors(state.value, weight) + _factors(state.tangent, weight * recipe.derivative_weight)
            for state, weight in zip(states, weights, strict=True)
        ]
        self._targets = [
            _weighted(state.value + state.tangent, factors)
            for state, factors in zip(states, self._factors, strict=True)
        ]
        self.target_norm = total(squared(self._targets))

    def output(self, k: int, thetas: Thetas) -> Tensor:
        """f_k(Θ), weighted and flat."""
        return self._together(k, [self._output(k, p, thetas) for p in range(len(self._parts[k]))])

    def _output(self, k: int, p: int, thetas: Thetas) -> Tensor:
        """Weighted and flat output of one part of the frames."""
        frames, parameters = self._parts[k][p], self._parameters(thetas)

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

    def _together(self, k: int, vectors: Sequence[Tensor]) -> Tensor:
        """One vector of all parts, in the order of a batch that is not split, from those of the parts."""
        if len(vectors) == 1:
            return vectors[0]
        parts = [_unflattened(v, shapes) for v, shapes in zip(vectors, self._shapes[k], strict=True)]
        tensors = [torch.cat(own, dim=axis) for own, axis in zip(zip(*parts), self._axes(k), strict=True)]
        return torch.cat([tensor.flatten() for tensor in tensors])

    def _apart(self, k: int, vector: Tensor) -> list[Tensor]:
        """Inverse of :meth:`_together`."""
        shapes, axes = self._shapes[k], self._axes(k)
        if len(shapes) == 1:
            return [vector]
        sizes = [[own[j][axis] for own in shapes] for j, axis in enumerate(axes)]
        whole = [
            (*shape[:axis], sum(n), *shape[axis + 1 :])
            for shape, axis, n in zip(shapes[0], axes, sizes, strict=True)
        ]
        split = [
            tensor.split(n, dim=axis)
            for tensor, n, axis in zip(_unflattened(vector, whole), sizes, axes, strict=True)
        ]
        return [torch.cat([tensor.flatten() for tensor in own]) for own in zip(*split)]

    def _axes(self, k: int) -> list[int]:
        """Axis of the atoms of every tensor of a state: the first of values, the second of derivatives."""
        n = len(self._shapes[k][0])
        return [0] * n if self._parts[k][0].geometry.tangent == () else [0] * (n // 2) + [1] * (n // 2)

    @torch.no_grad()
    def mismatch(self, thetas: Thetas) -> float:
        """Squared mismatch of some maps."""
        return total(squared([y - self.output(k, thetas) for k, y in enumerate(self._targets)]))


class LinearizedBlock(BlockMismatch):
    """The mismatch on the first batch, linearised around the block's present maps.

    Parameters
    ----------
    block, originals, calibration_sets, recipe
        See :class:`BlockMismatch`.
    keep_graphs
        Keep what automatic differentiation needs for all products with J; otherwise the block is evaluated again for each
        of them, part by part: the same result in a longer time and less memory.

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
        *,
        keep_graphs: bool = True,
    ):
        super().__init__(block, originals, calibration_sets, recipe)
        self.thetas = {name: affine_map.read().detach().clone() for name, affine_map in self._maps.items()}
        self._leaves = {name: theta.clone().requires_grad_() for name, theta in self.thetas.items()}
        self._kept: dict[tuple[int, int], _Graphs] | None = {} if keep_graphs else None
        own = [self._grams(k) for k in range(len(self._parts))]
        nothing = {name: theta.new_zeros(len(theta), len(theta)) for name, theta in self.thetas.items()}
        self.grams = self.summed(
            {name: sum((one[name] for one in own), start=nothing[name]) for name in nothing}
        )
        self.residual = [y - self._value(k) for k, y in enumerate(self._targets)]

    def _value(self, k: int) -> Tensor:
        """f_k at the present maps."""
        if self._kept is None:
            with torch.no_grad():
                return self.output(k, self.thetas)
        return self._together(k, [self._graphs(k, p).output.detach() for p in range(len(self._parts[k]))])

    def _graphs(self, k: int, p: int) -> "_Graphs":
        if self._kept is not None and (k, p) in self._kept:
            return self._kept[k, p]
        with torch.enable_grad():
            output = self._linked_output(k, p)
            u = torch.zeros_like(output, requires_grad=True)
            pulled = torch.autograd.grad(output, list(self._leaves.values()), u, create_graph=True)
        graphs = _Graphs(output, u, pulled)
        if self._kept is not None:
            self._kept[k, p] = graphs
        return graphs

    def _linked_output(self, k: int, p: int) -> Tensor:
        with torch.enable_grad():
            nothing = sum(leaf.sum() for leaf in self._leaves.values()) * 0  # links maps that no row enters
            return self._output(k, p, self._leaves) + nothing

    @torch.no_grad()
    def _grams(self, k: int) -> Thetas:
        """Gram matrix of the rows that enter every map on specialist k's frames, of mean eigenvalue 1."""
        products: Thetas = {}
        for part in self._parts[k]:
            run = partial(run_stage, self._block, part, stage_inputs(part, True).value)
            entering = layer_inputs(self._block, run, wanted=is_adjustable)
            for name, one in self._maps.items():
                x = one.design(entering[self._layers[name]])
                products[name] = products[name] + x.T @ x if name in products else x.T @ x
        return {name: g / g.trace().clamp(min=1e-30) * len(g) for name, g in products.items()}

    def forward(self, direction: Thetas) -> list[Tensor]:
        """J v."""
        along = [direction[name] for name in self._leaves]
        return [
            self._together(k, [self._graphs(k, p).along(along) for p in range(len(parts))])
            for k, parts in enumerate(self._parts)
        ]

    def vjp(self, k: int, vector: Tensor) -> Thetas:
        """Specialist k's part of Jᵀ u."""
        leaves, found = list(self._leaves.values()), list[Tensor]()
        for p, part in enumerate(self._apart(k, vector)):
            output = self._linked_output(k, p) if self._kept is None else self._graphs(k, p).output
            gradients = torch.autograd.grad(output, leaves, part, retain_graph=self._kept is not None)
            found = [a + b for a, b in zip(found, gradients, strict=True)] if found else list(gradients)
        return dict(zip(self._leaves, found, strict=True))

    def summed(self, parts: Thetas) -> Thetas:
        """Sums over the batches of all processes, from those over the batches of this one, in their memory."""
        add_up(*parts.values())
        return parts

    def write(self, thetas: Thetas) -> None:
        """Set the block's maps."""
        for name, affine_map in self._maps.items():
            affine_map.write(thetas[name])


@dataclass(frozen=True)
class _Graphs:
    """Output f of one part of the frames, and Jᵀ u as a function of u, ready to be differentiated."""

    output: Tensor
    u: Tensor
    pulled: tuple[Tensor, ...]

    def along(self, direction: Sequence[Tensor]) -> Tensor:
        """J v."""
        return torch.autograd.grad(self.pulled, self.u, direction, retain_graph=True)[0]


def _shapes(state: Dual) -> list[tuple[int, ...]]:
    return [tuple(tensor.shape) for tensor in state.value + state.tangent]


def _unflattened(vector: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    sizes = [math.prod(shape) for shape in shapes]
    return [part.view(shape) for part, shape in zip(vector.split(sizes), shapes, strict=True)]


def _joined(states: Sequence[Dual]) -> Dual:
    """State of all atoms from those of the parts."""
    return Dual(
        tuple(torch.cat(own) for own in zip(*(state.value for state in states))),
        tuple(torch.cat(own, dim=1) for own in zip(*(state.tangent for state in states))),
    )


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
