"""Family ``trunk``: all affine maps of a stage at once, linearised around the layer-wise solution.

The stage's output and its slopes, weighted as in the message-level solves, are matched by one Gauss-Newton step on all of
the stage's parameters.
"""

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.func import functional_call

from ase_gffmerge.merging.align_output import advance
from ase_gffmerge.merging.duals import differentiable_push
from ase_gffmerge.merging.force_matching import match_forces
from ase_gffmerge.merging.recipe import ReadoutOptions, Recipe
from ase_gffmerge.merging.territory import Scene, Territory
from ase_gffmerge.models.potential import Stage, State
from research.bench import Bench, Outcome, Trial, shared
from research.copies import Dynamics
from research.least_squares import Parameters, gauss_newton_step
from research.stages import walked
from research.trunk import SolveStage, build_trunk, standard_stage


class StageProblem:
    """Output of a stage on the merged model's states as a function of the stage's parameters."""

    def __init__(
        self, stage: Stage, originals: Sequence[Stage], territories: Sequence[Territory], recipe: Recipe
    ):
        self.stage = stage
        self.parameters = {name: p.detach().clone() for name, p in stage.named_parameters()}
        self.scenes = [territory.scenes[0] for territory in territories]
        self.targets, self.scales = [], []
        for original, territory, scene in zip(originals, territories, self.scenes, strict=True):
            state = advance(original, scene.target, scene)
            parts = state.value + state.tangent
            weights = [1.0] * len(state.value) + [recipe.slope_weight] * len(state.tangent)
            squares = [max(float(part.square().sum()), 1e-12) for part in parts]
            self.targets.append(parts)
            self.scales.append(
                [(territory.weight * w / s) ** 0.5 for w, s in zip(weights, squares, strict=True)]
            )

    def _output(self, index: int, parameters: Parameters) -> Tensor:
        """Weighted output and slopes in one scene, flat."""
        scene: Scene = self.scenes[index]

        def stage_of(*x: Tensor) -> State:
            geometry = scene.edge_geometry(x[-3:])
            return tuple(functional_call(self.stage, parameters, (x[:-3], geometry)))

        parts = differentiable_push(stage_of, scene.merged + scene.geometry)
        return torch.cat([(p * s).flatten() for p, s in zip(parts, self.scales[index], strict=True)])

    def residual(self) -> list[Tensor]:
        """Weighted target minus output."""
        return [
            torch.cat([(p * s).flatten() for p, s in zip(target, self.scales[i], strict=True)])
            - self._output(i, self.parameters)
            for i, target in enumerate(self.targets)
        ]

    def forward(self, direction: Parameters) -> list[Tensor]:
        """J v, as the derivative of Jᵀ u with respect to u (slopes already occupy the forward mode)."""
        found = []
        for i in range(len(self.scenes)):
            leaves = {name: p.clone().requires_grad_() for name, p in self.parameters.items()}
            with torch.enable_grad():
                output = self._output(i, leaves)
                dummy = torch.zeros_like(output, requires_grad=True)
                pulled = torch.autograd.grad(output, list(leaves.values()), dummy, create_graph=True)
                along = sum((g * direction[name]).sum() for name, g in zip(leaves, pulled, strict=True))
                found.append(torch.autograd.grad(along, dummy)[0])
        return found

    def transpose(self, vectors: list[Tensor]) -> Parameters:
        """Jᵀ r."""
        total = {name: torch.zeros_like(value) for name, value in self.parameters.items()}
        for i, vector in enumerate(vectors):
            leaves = {name: p.clone().requires_grad_() for name, p in self.parameters.items()}
            with torch.enable_grad():
                gradients = torch.autograd.grad(self._output(i, leaves), list(leaves.values()), vector)
            total = {name: total[name] + g for name, g in zip(leaves, gradients, strict=True)}
        return total


def jointly(*, iterations: int, damping: float) -> SolveStage:
    """The usual solves of a stage, then one step on all its maps at once; kept only where it lowers the mismatch."""

    def solve(
        name: str, stage: Stage, originals: Sequence[Stage], territories: Sequence[Territory], recipe: Recipe
    ) -> Stage:
        standard_stage(name, stage, originals, territories, recipe)
        problem = StageProblem(stage, originals, territories, recipe)
        before = sum(float(r.square().sum()) for r in problem.residual())
        step = gauss_newton_step(problem, iterations=iterations, damping=damping)
        old = problem.parameters
        problem.parameters = {key: old[key] + step[key] for key in old}
        after = sum(float(r.square().sum()) for r in problem.residual())
        if after < before:
            for key, value in problem.parameters.items():
                stage.get_parameter(key).copy_(value)
        return stage

    return solve


def with_visited_copies(iterations: int) -> Callable[[Bench], Outcome]:
    """Joint solves, then the readout on copies that the specialists' dynamics visit."""
    dynamics = Dynamics(copies=8, steps=10, timestep=2.0, equal_masses=True)
    solve = jointly(iterations=iterations, damping=1e-3)
    return lambda bench: dynamics.on(build_trunk(bench.specialists, Recipe(), solve_stage=solve))


def with_product_readout(iterations: int) -> Callable[[Bench], Outcome]:
    """Joint solves, then the product's readout with its defaults."""

    def run(bench: Bench) -> Outcome:
        solve = jointly(iterations=iterations, damping=1e-3)
        trunk = build_trunk(bench.specialists, Recipe(), solve_stage=solve)
        start = time.process_time()
        potential, _, _ = match_forces(
            trunk.potential, trunk.territories, ReadoutOptions(), progress=lambda fraction: None
        )
        spent = time.process_time() - start
        return Outcome(
            potentials=shared(potential, bench.specialists),
            seconds=trunk.seconds + spent,
            note=f"readout {spent:.0f} s",
        )

    return run


def trials() -> list[Trial]:
    """All trials of this module."""
    what = "Gauss-Newton iterations on all maps of a stage, after the usual solves"
    rows: list[tuple[str, str, Callable[[Bench], Outcome], int]] = [
        ("joint block", f"15 {what}", walked(jointly(iterations=15, damping=1e-3)), 25),
        ("joint block 5", f"5 {what}", walked(jointly(iterations=5, damping=1e-3)), 25),
        ("joint block 40", f"40 {what}", walked(jointly(iterations=40, damping=1e-3)), 25),
        ("joint block + MD 8 x 20 fs", f"15 {what}; visited copies", with_visited_copies(15), 25),
        ("joint block + product", f"15 {what}; the product's readout", with_product_readout(15), 25),
    ]
    return [Trial(name=n, family="trunk", changes=c, run=run, order=order) for n, c, run, order in rows]
