"""Steps 1-4 of the merge from its public pieces, with a hook for what happens at every stage."""

import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ase_gffmerge.forcefield.force_field import ForceField
from ase_gffmerge.merging.average import align_references, mean_potential, working_copies
from ase_gffmerge.merging.calibration import (
    CalibrationBatch,
    CalibrationSet,
    advance,
    build_calibration,
    run_stage,
    stage_inputs,
)
from ase_gffmerge.merging.layerwise import align_layers
from ase_gffmerge.merging.recipe import Recipe
from ase_gffmerge.merging.selection import known_ancestor, starting_points
from ase_gffmerge.merging.tangents import Dual, Tensors, pushforward
from ase_gffmerge.models import Potential
from ase_gffmerge.models.base import Stage
from research.closing_maps import align_messages

SolveStage = Callable[[str, Stage, Sequence[Stage], Sequence[CalibrationSet], Recipe], Stage]
"""Aligns one stage of the merged model with the specialists' and returns it, or the stage that shall take its place."""


@dataclass(frozen=True)
class Trunk:
    """A merged potential whose stages are done, with the scenes that its readout will be fitted on."""

    potential: Potential
    calibration_sets: list[CalibrationSet]
    seconds: float


def standard_stage(
    name: str,
    stage: Stage,
    originals: Sequence[Stage],
    calibration_sets: Sequence[CalibrationSet],
    recipe: Recipe,
) -> Stage:
    """Every layer in turn, then the closing maps on the stage's output."""
    align_layers(name, stage, originals, calibration_sets, recipe, run=run_stage, inputs=stage_inputs)
    if recipe.messages:
        align_messages(name, stage, originals, calibration_sets, recipe)
    return stage


@torch.no_grad()
def build_trunk(
    specialists: Sequence[ForceField],
    recipe: Recipe,
    *,
    solve_stage: SolveStage = standard_stage,
    sweeps: int = 1,
    anchor: str = "mean",
) -> Trunk:
    """Walk the stages, ``sweeps`` times; every sweep is anchored at the weights that the one before left.

    Parameters
    ----------
    specialists, recipe
        What is merged, and the options of steps 1-4.
    solve_stage
        What happens at every stage.
    sweeps
        How often all stages are walked.
    anchor
        Starting point of the first sweep, to which the ridge pulls: the first whose name begins so
        (:func:`~ase_gffmerge.merging.selection.starting_points`).
    """
    start = time.process_time()
    parents = working_copies(specialists, torch.device("cpu"))
    align_references(parents)
    mean = mean_potential(parents, recipe)
    points = starting_points(mean, parents, None if anchor == "mean" else known_ancestor(specialists))
    potential = deepcopy(next(point for name, point in points if name.startswith(anchor)))
    weights = recipe.weights or (1.0,) * len(parents)
    for _ in range(sweeps):
        calibration_sets = build_calibration(parents, potential, weights, directions=recipe.directions)
        for i, (name, _) in enumerate(potential.named_stages()):
            originals: list[Stage] = [p.potential.get_submodule(name) for p in parents]  # type: ignore[misc]
            stage = solve_stage(name, potential.stages[i], originals, calibration_sets, recipe)
            potential.stages[i] = stage
            go_on(potential, stage, originals, calibration_sets)
    align_plain_readout(potential, [p.potential.readout for p in parents], calibration_sets, recipe)
    return Trunk(potential, calibration_sets, time.process_time() - start)


def go_on(
    merged: Potential, stage: Stage, originals: Sequence[Stage], calibration_sets: Sequence[CalibrationSet]
) -> None:
    """Advance all scenes by one finished stage."""
    for original, calibration_set in zip(originals, calibration_sets, strict=True):
        for scene in calibration_set.batches:
            scene.target = advance(original, scene.target, scene)
            scene.merged = advance(stage, scene.merged, scene)
            if stage.emits_scalars:
                scene.target_scalars.append(pushforward(lambda *x: merged.scalars(x), scene.target))
                scene.merged_scalars.append(pushforward(lambda *x: merged.scalars(x), scene.merged))


def align_plain_readout(
    merged: Potential,
    originals: Sequence[nn.Module],
    calibration_sets: Sequence[CalibrationSet],
    recipe: Recipe,
) -> None:
    """Treat the two-layer readout like any other layers."""

    def run(readout: nn.Module, scene: CalibrationBatch, scalars: Tensors) -> Tensor:
        return readout(scalars, merged.species_row[scene.graph.atomic_numbers])

    def inputs(scene: CalibrationBatch, of_merged: bool) -> Dual:
        return sum(scene.merged_scalars if of_merged else scene.target_scalars, start=Dual((), ()))

    align_layers("readout", merged.readout, originals, calibration_sets, recipe, run=run, inputs=inputs)
