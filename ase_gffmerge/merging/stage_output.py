r"""Outputs of a stage as a function of all its affine maps, linearised.

What the next stage sees of stage t in specialist k's frames is, on the merged model's own input state,
:math:`f_k(\Theta) \approx f_k(\Theta^0) + J_k\,\delta`, values and slopes along the probes alike. Both products with
:math:`J_k` are reverse passes through graphs that are built once: :math:`J_k^\top u` through the output, and :math:`J_k v`
through :math:`J_k^\top u`, which is linear in u.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.func import functional_call

from ase_gffmerge.least_squares.gauss_newton import Thetas, squared
from ase_gffmerge.merging.calibration import CalibrationBatch, CalibrationSet
from ase_gffmerge.merging.layerwise import advance, layer_inputs, run_stage, stage_inputs
from ase_gffmerge.merging.recipe import Recipe
from ase_gffmerge.merging.tangents import differentiable_pushforward
from ase_gffmerge.models.affine_maps import adjustable_maps, is_adjustable
from ase_gffmerge.models.base import Stage, State


class StageMismatch:
    r"""Weighted mismatch :math:`\sqrt{a_k / s_{kc}}\,(X^{(t)}_{kc} - f_{kc}(\Theta))` over all specialists.

    Every part c of a state (scalars, vectors) and its slopes count relative to their mean square :math:`s_{kc}`. One batch
    of frames per specialist is used.

    Parameters
    ----------
    stage
        The stage in the merged model.
    originals
        The stage in every specialist.
    territories
        Calibration scenes, in the order of ``originals``.
    recipe
        Weight of the slopes.
    batch
        Which of the territories' scenes.

    Attributes
    ----------
    target_norm
        Weighted sum of squares of the targets.
    """

    def __init__(
        self,
        stage: Stage,
        originals: Sequence[Stage],
        calibration_sets: Sequence[CalibrationSet],
        recipe: Recipe,
        *,
        batch: int = 0,
    ):
        self._stage, self._maps = stage, adjustable_maps(stage)
        names = {module: name for name, module in stage.named_modules()}
        self._layers = {name: names[problem.module] for name, problem in self._maps.items()}
        self._scenes = [calibration_set.scenes[batch] for calibration_set in calibration_sets]
        states = [
            advance(original, scene.target, scene)
            for original, scene in zip(originals, self._scenes, strict=True)
        ]
        self._factors = [
            _factors(dual.value, calibration_set.weight)
            + _factors(dual.tangent, calibration_set.weight * recipe.slope_weight)
            for dual, calibration_set in zip(states, calibration_sets, strict=True)
        ]
        self._targets = [
            _weighted(dual.value + dual.tangent, factors)
            for dual, factors in zip(states, self._factors, strict=True)
        ]
        self.target_norm = squared(self._targets)

    def _output(self, k: int, thetas: Thetas) -> Tensor:
        """f_k(Θ), weighted and flat."""
        scene = self._scenes[k]
        parameters = self._parameters(thetas)

        def stage_of(*x: Tensor) -> State:
            return tuple(functional_call(self._stage, parameters, scene.split(x)))

        return _weighted(differentiable_pushforward(stage_of, stage_inputs(scene, True)), self._factors[k])

    def _parameters(self, thetas: Thetas) -> dict[str, Tensor]:
        """The stage's parameters as differentiable functions of its maps; maps of one layer change their own entries."""
        found: dict[str, Tensor] = {}
        for name, problem in self._maps.items():
            for key, value in problem.parameters(thetas[name]).items():
                full = f"{self._layers[name]}.{key}"
                known = self._stage.get_parameter(full).detach()
                found[full] = found.get(full, known) + value - known
        return found

    @torch.no_grad()
    def mismatch(self, thetas: Thetas) -> float:
        """Squared mismatch of some maps."""
        return squared([y - self._output(k, thetas) for k, y in enumerate(self._targets)])


class LinearizedBlock(StageMismatch):
    """The mismatch on the first batch, linearised around the stage's present maps.

    Parameters
    ----------
    stage, originals, territories, recipe
        See :class:`StageMismatch`.

    Attributes
    ----------
    thetas, grams, residual
        See :class:`.Linearised`.
    """

    def __init__(
        self,
        stage: Stage,
        originals: Sequence[Stage],
        calibration_sets: Sequence[CalibrationSet],
        recipe: Recipe,
    ):
        super().__init__(stage, originals, calibration_sets, recipe)
        self.thetas = {name: problem.read().detach().clone() for name, problem in self._maps.items()}
        self.grams = {name: torch.zeros(()).to(theta) for name, theta in self.thetas.items()}
        self._outputs: list[Tensor] = []
        self._linear: list[tuple[Tensor, tuple[Tensor, ...]]] = []
        self._leaves = {name: theta.clone().requires_grad_() for name, theta in self.thetas.items()}
        for k in range(len(self._scenes)):
            self._linearise(k)
        self.residual = [y - f.detach() for y, f in zip(self._targets, self._outputs, strict=True)]

    def _linearise(self, k: int) -> None:
        for name, gram in self._grams(self._scenes[k]).items():
            self.grams[name] = self.grams[name] + gram
        with torch.enable_grad():
            nothing = sum(leaf.sum() for leaf in self._leaves.values()) * 0  # links maps that no row enters
            output = self._output(k, self._leaves) + nothing
            u = torch.zeros_like(output, requires_grad=True)
            pulled = torch.autograd.grad(output, list(self._leaves.values()), u, create_graph=True)
        self._outputs.append(output)
        self._linear.append((u, pulled))

    def _grams(self, scene: CalibrationBatch) -> Thetas:
        """Gram matrix of the rows that enter every map, of mean eigenvalue 1."""
        values = stage_inputs(scene, True).value
        with torch.no_grad():
            entering = layer_inputs(
                self._stage, lambda: run_stage(self._stage, scene, values), wanted=is_adjustable
            )
            rows = {
                name: problem.design(entering[self._layers[name]]) for name, problem in self._maps.items()
            }
        return {name: x.T @ x / x.square().sum().clamp(min=1e-30) * x.shape[1] for name, x in rows.items()}

    def forward(self, direction: Thetas) -> list[Tensor]:
        """J v."""
        along = [direction[name] for name in self._leaves]
        return [torch.autograd.grad(p, u, along, retain_graph=True)[0] for u, p in self._linear]

    def vjp(self, k: int, vector: Tensor) -> Thetas:
        """Specialist k's part of Jᵀ u."""
        gradients = torch.autograd.grad(
            self._outputs[k], list(self._leaves.values()), vector, retain_graph=True
        )
        return dict(zip(self._leaves, gradients, strict=True))

    def write(self, thetas: Thetas) -> None:
        """Set the stage's maps."""
        for name, problem in self._maps.items():
            problem.write(thetas[name])


def _factors(parts: State, weight: float) -> tuple[float, ...]:
    """Square roots of a_k / s_kc; parts that are zero do not count."""
    squares = [float(part.double().square().sum()) for part in parts]
    return tuple((weight / square) ** 0.5 if square > 0 else 0.0 for square in squares)


def _weighted(parts: State, factors: Sequence[float]) -> Tensor:
    return torch.cat([(part * factor).flatten() for part, factor in zip(parts, factors, strict=True)])
