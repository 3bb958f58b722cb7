"""The closed-form merge: specialists in, one merged force field and a report out.

Read it with the paper (arXiv 2606.03232) in hand, in the order of the steps that :mod:`ase_gffmerge.merging` lists. Users
call :func:`ase_gffmerge.merge`, which may go on with closed-loop calibration and distillation.
"""

import warnings
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from ase.data import chemical_symbols
from torch import Tensor, nn

from ase_gffmerge.data.frames import spread
from ase_gffmerge.errors import MergeWarning, ReadoutWarning, first_line
from ase_gffmerge.forcefield.force_field import ForceField, repelling
from ase_gffmerge.forcefield.provenance import MergeRecord, Provenance
from ase_gffmerge.forcefield.uncertainty import fit_uncertainty
from ase_gffmerge.merging.average import (
    align_references,
    averaged_parameters,
    check_compatible,
    mean_potential,
    on_all_elements,
    working_copies,
)
from ase_gffmerge.merging.blockwise import align_block
from ase_gffmerge.merging.calibration import (
    CalibrationBatch,
    CalibrationSet,
    advance,
    build_calibration,
    run_stage,
    stage_inputs,
)
from ase_gffmerge.merging.disagreement import diagnose
from ase_gffmerge.merging.layerwise import align_layers
from ase_gffmerge.merging.paper import solve_paper
from ase_gffmerge.merging.readout_fit import match_forces
from ase_gffmerge.merging.recipe import Recipe
from ase_gffmerge.merging.report import LayerReport, MergeReport, Trial
from ase_gffmerge.merging.selection import Selection, known_ancestor, split_frames, starting_points
from ase_gffmerge.merging.tangents import Dual, Tensors, pushforward
from ase_gffmerge.models import Potential
from ase_gffmerge.models.affine_maps import adjustable_maps
from ase_gffmerge.models.base import Stage
from ase_gffmerge.runtime.devices import memory_errors, resolve_device
from ase_gffmerge.runtime.memory import Portions
from ase_gffmerge.runtime.progress import Clock, Progress, no_progress, part_of


@dataclass(frozen=True, kw_only=True)
class Solved:
    """What the solves of a method leave.

    Attributes
    ----------
    potential
        The merged potential.
    layers
        Least-squares problems in the order they were solved.
    held_out
        Relative force error on frames that were not fitted, where there were any.
    trials
        What was compared on such frames.
    """

    potential: Potential
    layers: Sequence[LayerReport] = ()
    held_out: float | None = None
    trials: Sequence[Trial] = ()


def closed_form_merge(
    specialists: Sequence[ForceField],
    recipe: Recipe,
    *,
    base: ForceField | None = None,
    device: str | torch.device = "auto",
    portions: Portions | None = None,
    progress: Progress = no_progress,
) -> tuple[ForceField, MergeReport]:
    """Merge specialists once, by the recipe's method, without its ``closed_loop`` and ``refine``.

    Parameters
    ----------
    specialists
        At least two, with calibration frames, fine-tuned from a common base. They are not changed.
    recipe
        What to do.
    base
        Their common ancestor; default: the bundled model that their lineages name, if there is one.
    device
        Where statistics and solves run.
    portions
        How much is computed at once; default: whole batches.
    progress
        Called with a fraction (0 to 1) and a description.

    Returns
    -------
    merged : ForceField
    report : MergeReport

    Raises
    ------
    IncompatibleSpecialistsError, FramesError, RecipeError, DeviceError, DeviceMemoryError
        With the reason and the remedy.
    """
    check_compatible(specialists, recipe)
    clock, target = Clock(), resolve_device(device)
    parents = working_copies(specialists, target)
    with memory_errors(f"merging {len(parents)} specialists", device=target, remedy="give fewer frames"):
        with torch.no_grad(), clock("mean"):
            shifts = align_references(parents)
            mean = mean_potential(parents, recipe)
        solved = METHODS[recipe.method](
            MergeTask(
                mean=mean,
                specialists=parents,
                recipe=recipe,
                base=base,
                portions=portions or Portions(),
                clock=clock,
                progress=progress,
            )
        )
        progress(0.95, "report")
        with clock("report"):
            disagreements, parity = diagnose(parents, mean, solved.potential)
        with clock("extrapolation"):
            networks = [s.potential for s in parents]
            grade = fit_uncertainty(solved.potential, [s.calibration for s in parents], networks)
            repels = recipe.core_repulsion == "auto"
            potential = repelling(solved.potential, parents) if repels else solved.potential
    report = MergeReport(
        specialists=tuple(s.name for s in parents),
        layers=tuple(solved.layers),
        disagreements=disagreements,
        held_out=solved.held_out,
        energy_shifts=shifts,
        seconds=clock.seconds,
        parity=parity,
        averaged=averaged_parameters(mean, recipe),
        elements=tuple(chemical_symbols[number] for number in mean.species),
        trials=tuple(solved.trials),
    )
    progress(1.0, report.verdict)
    if recipe.method != "mean" and report.verdict != "good":
        warnings.warn(report.warning, MergeWarning, stacklevel=3)
    merged = _merged_force_field(specialists, potential, recipe, report)
    return replace(merged, extrapolation_grade=grade), report


@dataclass(frozen=True, kw_only=True)
class MergeTask:
    """What a method is given; it changes neither the mean nor the specialists.

    Attributes
    ----------
    mean, specialists
        On one device, with one zero of energy.
    recipe
        What to do.
    base
        The common ancestor, if one was given.
    portions
        How much is computed at once.
    clock, progress
        Time of the phases, and how far it is.
    """

    mean: Potential
    specialists: Sequence[ForceField]
    recipe: Recipe
    base: ForceField | None
    portions: Portions
    clock: Clock
    progress: Progress


def _closed_form(task: MergeTask) -> Solved:
    """The method of this package: a starting point, steps 1 to 4 for block after block, then step 5."""
    recipe, portions, clock, progress = task.recipe, task.portions, task.clock, task.progress
    start, specialists, selection = _start(task)
    merged, weights = deepcopy(start), recipe.weights or (1.0,) * len(specialists)
    with torch.no_grad(), clock("layers"):
        progress(0.05, "graphs")
        specialists = on_all_elements(specialists)
        sets = build_calibration(
            specialists, merged, weights, directions=recipe.directions, max_edges=portions.edges
        )
        layers = _align_stages(
            merged,
            specialists,
            sets,
            recipe,
            keep_graphs=portions.keep_graphs,
            progress=part_of(progress, 0.1, 0.6),
        )
        layers += _align_readout(merged, specialists, sets, recipe)
        best = selection.better("closed form", merged, start) if selection else merged
    fitted: float | None = None
    if recipe.readout is not None:
        with clock("readout"):
            try:
                merged, row, fitted = match_forces(
                    merged,
                    sets,
                    recipe.readout,
                    at_once=portions.directions,
                    progress=part_of(progress, 0.6, 0.95),
                )
            except (RuntimeError, ValueError, MemoryError) as error:
                warnings.warn(_without_readout(error), ReadoutWarning, stacklevel=4)
            else:
                layers.append(row)
                best = selection.better("wide readout", merged, best) if selection else merged
    if selection is None:
        return Solved(potential=best, layers=layers, held_out=fitted)
    return Solved(potential=best, layers=layers, held_out=selection.held_out, trials=selection.trials)


def _without_readout(error: Exception) -> str:
    return (
        f"the wide readout could not be solved ({first_line(error)}); the merge keeps its layers with their plain "
        "readout: lower the width or the copies of the readout, or give other frames"
    )


@torch.no_grad()
def _start(task: MergeTask) -> tuple[Potential, list[ForceField], Selection | None]:
    """Where the solves begin, the specialists with the frames that are fitted, and what judges the steps, if anything."""
    recipe, mean, specialists = task.recipe, task.mean, list(task.specialists)
    limits: list[int | None] = [recipe.frames] * len(specialists)
    if recipe.keep_base:  # the base, whose frames are a compound each, keeps them all
        limits[-1] = None
    if not recipe.select:
        chosen = [spread(s.calibration, n) for s, n in zip(specialists, limits, strict=True)]
        return mean, [s.with_calibration(own) for s, own in zip(specialists, chosen, strict=True)], None
    with task.clock("starting points"):
        task.progress(0.02, "starting points")
        parts = [split_frames(s, n) for s, n in zip(specialists, limits, strict=True)]
        selection = Selection(specialists, [held_out for _, held_out in parts], recipe)
        base = task.base or known_ancestor(specialists)
        base = base.to(device=mean.device, dtype=mean.dtype) if base else None
        start = selection.best_start(starting_points(mean, specialists, base))
    fitted = [s.with_calibration(own) for s, (own, _) in zip(specialists, parts, strict=True)]
    return start, fitted, selection


def _as_the_paper(task: MergeTask) -> Solved:
    merged = deepcopy(task.mean)
    with task.clock("layers"):
        task.progress(0.1, "layers")
        layers = solve_paper(merged, on_all_elements(task.specialists), task.recipe)
    return Solved(potential=merged, layers=layers)


def _the_mean(task: MergeTask) -> Solved:
    return Solved(potential=deepcopy(task.mean))


Block = TypeVar("Block", bound=nn.Module)

METHODS: dict[str, Callable[[MergeTask], Solved]] = {
    "closed-form": _closed_form,
    "paper": _as_the_paper,
    "mean": _the_mean,
}
"""The methods by their name in a recipe."""


def _align_stages(
    merged: Potential,
    specialists: Sequence[ForceField],
    calibration_sets: Sequence[CalibrationSet],
    recipe: Recipe,
    *,
    keep_graphs: bool,
    progress: Progress,
) -> list[LayerReport]:
    """Align every stage, then advance the states of the merged model and of the specialists through it."""
    reports: list[LayerReport] = []
    for i, (name, stage) in enumerate(merged.named_stages()):
        own = part_of(progress, i / len(merged.stages), (i + 1) / len(merged.stages))
        originals: list[Stage] = [s.potential.get_submodule(name) for s in specialists]  # type: ignore[misc]
        reports += align_layers(
            name,
            stage,
            originals,
            calibration_sets,
            recipe,
            run=run_stage,
            inputs=stage_inputs,
            prior=_prior(originals, recipe),
            progress=part_of(own, 0.0, 0.3),
        )
        if recipe.messages and adjustable_maps(stage):
            reports.append(
                align_block(
                    name,
                    stage,
                    originals,
                    calibration_sets,
                    recipe,
                    keep_graphs=keep_graphs,
                    progress=part_of(own, 0.3, 1.0),
                )
            )
        for original, calibration_set in zip(originals, calibration_sets, strict=True):
            for batch in calibration_set.batches:
                batch.target = advance(original, batch.target, batch)
                batch.merged = advance(stage, batch.merged, batch)
                if stage.emits_scalars:
                    batch.target_scalars.append(pushforward(lambda *x: merged.scalars(x), batch.target))
                    batch.merged_scalars.append(pushforward(lambda *x: merged.scalars(x), batch.merged))
    return reports


def _align_readout(
    merged: Potential,
    specialists: Sequence[ForceField],
    calibration_sets: Sequence[CalibrationSet],
    recipe: Recipe,
) -> list[LayerReport]:
    """Align the plain readout, layer by layer."""

    def run(readout: nn.Module, batch: CalibrationBatch, scalars: Tensors) -> Tensor:
        energies: Tensor = readout(scalars, merged.species_row[batch.graph.atomic_numbers])
        return energies

    def inputs(batch: CalibrationBatch, of_merged: bool) -> Dual:
        return sum(batch.merged_scalars if of_merged else batch.target_scalars, start=Dual((), ()))

    originals = [specialist.potential.readout for specialist in specialists]
    return align_layers(
        "readout",
        merged.readout,
        originals,
        calibration_sets,
        recipe,
        run=run,
        inputs=inputs,
        prior=_prior(originals, recipe),
    )


def _prior(originals: Sequence[Block], recipe: Recipe) -> Block | None:
    """The base's block, if the base has joined as the last specialist; its weights stay where no frame says otherwise."""
    return originals[-1] if recipe.keep_base else None


def _merged_force_field(
    specialists: Sequence[ForceField], potential: Potential, recipe: Recipe, report: MergeReport
) -> ForceField:
    theories = dict.fromkeys(s.level_of_theory for s in specialists)
    record = MergeRecord(
        specialists=report.specialists,
        fingerprints=tuple(s.fingerprint for s in specialists),
        recipe=recipe.model_dump(mode="json"),
        report=report.to_dict(),
    )
    return ForceField(
        name="+".join(record.specialists),
        potential=potential.requires_grad_(False).eval(),
        level_of_theory=" + ".join(theories),
        provenance=Provenance(
            data_set="merged",
            lineage=record.fingerprints,
            origin=" + ".join(dict.fromkeys(s.provenance.origin for s in specialists if s.provenance.origin)),
            seen_frames=tuple(sorted({key for s in specialists for key in s.provenance.seen_frames})),
        ),
        merged=record,
    )
