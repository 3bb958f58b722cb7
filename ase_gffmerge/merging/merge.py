"""The story: specialists in, one merged potential and a report out.

specialists -> graphs of their calibration frames -> for every stage: inputs of the merged model as built so far, outputs
of each specialist, Gram statistics, ridge solves -> all maps of the stage corrected together on its output -> readout
matched to energies and forces.
"""

import warnings
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from ase_gffmerge.errors import MergeWarning, RecipeError
from ase_gffmerge.forcefield.force_field import ForceField
from ase_gffmerge.forcefield.leverage import fit_extrapolation_grade
from ase_gffmerge.forcefield.provenance import MergeRecord, Provenance
from ase_gffmerge.merging.average import averaged_parameters, mean_potential, on_all_elements
from ase_gffmerge.merging.blockwise import align_output
from ase_gffmerge.merging.calibration import CalibrationBatch, CalibrationSet, build_calibration
from ase_gffmerge.merging.compatibility import check_compatible
from ase_gffmerge.merging.diagnostics import diagnose
from ase_gffmerge.merging.force_matching import match_forces
from ase_gffmerge.merging.layerwise import advance, align_layers, run_stage, stage_inputs
from ase_gffmerge.merging.recipe import Recipe, load_recipe
from ase_gffmerge.merging.reference_energies import align_references
from ase_gffmerge.merging.report import LayerReport, MergeReport
from ase_gffmerge.merging.tangents import Dual, Tensors, pushforward
from ase_gffmerge.models import Potential
from ase_gffmerge.models.affine_maps import adjustable_maps
from ase_gffmerge.models.base import Stage
from ase_gffmerge.runtime.devices import memory_errors, resolve_device
from ase_gffmerge.runtime.progress import Clock, Progress, no_progress

MERGE_VERSION = 7
"""Raised whenever the numbers of a merge change, so that cached potentials are rebuilt."""


def merge(
    specialists: Sequence[ForceField],
    recipe: str | Recipe | dict[str, Any] = "gffmerge",
    *,
    device: str | torch.device = "auto",
    progress: Progress | None = None,
) -> tuple[ForceField, MergeReport]:
    """Merge specialists into one potential by solving least-squares problems.

    Parameters
    ----------
    specialists
        At least two, with calibration frames, fine-tuned from a common base. They are not changed.
    recipe
        ``gffmerge`` (default), ``paper``, ``mean``, a YAML file, a mapping or a :class:`Recipe`.
    device
        Where statistics and solves run.
    progress
        Called with a fraction (0 to 1) and a description.

    Returns
    -------
    merged : ForceField
        A force field with ``merged`` set; save it with :meth:`ForceField.save`.
    report : MergeReport

    Raises
    ------
    IncompatibleSpecialistsError, FramesError, RecipeError, DeviceError, DeviceMemoryError
        With the reason and the remedy.
    """
    recipe = load_recipe(recipe)
    if recipe.refine is not None or recipe.closed_loop is not None:
        raise RecipeError(
            "the recipe asks for more than a merge (refine, closed_loop), which merge() does not do; use merge_and_refine, "
            "the calculator or the command line"
        )
    check_compatible(specialists, recipe)
    tell = progress or no_progress
    clock = Clock()
    target = resolve_device(device)
    parents = working_copies(specialists, target)
    with memory_errors(f"merging {len(parents)} specialists", device=target, remedy="give fewer frames"):
        with torch.no_grad(), clock("mean"):
            shifts = align_references(parents)
            mean = mean_potential(parents, recipe)
        potential, layers, held_out = _solve(mean, parents, recipe, clock, tell)
        tell(0.95, "report")
        with clock("report"):
            disagreements, parity = diagnose(parents, mean, potential)
        with clock("extrapolation"):
            extrapolation_grade = fit_extrapolation_grade(potential, [s.calibration for s in parents])
    report = MergeReport(
        specialists=tuple(s.name for s in parents),
        layers=layers,
        disagreements=disagreements,
        held_out=held_out,
        energy_shifts=shifts,
        seconds=clock.seconds,
        parity=parity,
        averaged=averaged_parameters(mean, recipe),
    )
    tell(1.0, report.verdict)
    if recipe.method != "mean" and report.verdict != "good":
        warnings.warn(_verdict_message(report), MergeWarning, stacklevel=2)
    return replace(
        _as_specialist(specialists, potential, recipe, report), extrapolation_grade=extrapolation_grade
    ), report


def working_copies(specialists: Sequence[ForceField], device: torch.device) -> list[ForceField]:
    """Copies on one device, in the highest of their precisions, with distinct names."""
    dtype = max((s.potential.dtype for s in specialists), key=lambda kind: torch.finfo(kind).bits)
    return [
        replace(s, name=name, potential=deepcopy(s.potential).to(device=device, dtype=dtype))
        for s, name in zip(specialists, distinct([s.name for s in specialists]), strict=True)
    ]


def distinct(names: Sequence[str]) -> list[str]:
    """Names with ``-2``, ``-3``, ... after those that were there before."""
    taken: list[str] = []
    for name in names:
        numbered = (f"{name}-{n}" for n in count(2))
        taken.append(name if name not in taken else next(new for new in numbered if new not in taken))
    return taken


def _solve(
    mean: Potential, parents: Sequence[ForceField], recipe: Recipe, clock: Clock, tell: Progress
) -> tuple[Potential, tuple[LayerReport, ...], float | None]:
    """Build the merged potential from the mean: layers, plain readout, force-matched readout."""
    potential = deepcopy(mean)
    if recipe.method == "mean":
        return potential, (), None
    weights = recipe.weights or (1.0,) * len(parents)
    with torch.no_grad(), clock("layers"):
        tell(0.05, "graphs")
        parents = on_all_elements(parents)
        calibration_sets = build_calibration(parents, potential, weights, probes=recipe.probes)
        layers = _align_stages(potential, parents, calibration_sets, recipe, tell)
        layers += _align_readout(potential, parents, calibration_sets, recipe)
    if recipe.readout is None:
        return potential, tuple(layers), None
    with clock("readout"):
        potential, row, held_out = match_forces(
            potential, calibration_sets, recipe.readout, progress=lambda x: tell(0.6 + 0.35 * x, "readout")
        )
    return potential, (*layers, row), held_out


def _align_stages(
    merged: Potential,
    parents: Sequence[ForceField],
    calibration_sets: Sequence[CalibrationSet],
    recipe: Recipe,
    tell: Progress,
) -> list[LayerReport]:
    """Steps 1-4 for every stage, advancing the states of merged model (where they are read) and specialists together."""
    reports: list[LayerReport] = []
    follows = recipe.inputs == "merged" or recipe.messages or recipe.readout is not None
    for i, (name, stage) in enumerate(merged.named_stages()):
        tell(0.1 + 0.5 * i / len(merged.stages), name)
        originals: list[Stage] = [parent.potential.get_submodule(name) for parent in parents]  # type: ignore[misc]
        reports += align_layers(
            name, stage, originals, calibration_sets, recipe, run=run_stage, inputs=stage_inputs
        )
        if recipe.messages and adjustable_maps(stage):
            reports.append(align_output(name, stage, originals, calibration_sets, recipe))
        for original, calibration_set in zip(originals, calibration_sets, strict=True):
            for scene in calibration_set.scenes:
                scene.target = advance(original, scene.target, scene)
                if follows:
                    scene.merged = advance(stage, scene.merged, scene)
                if stage.emits_scalars:
                    scene.target_scalars.append(pushforward(lambda *x: merged.scalars(x), scene.target))
                    scene.merged_scalars.append(pushforward(lambda *x: merged.scalars(x), scene.merged))
    return reports


def _align_readout(
    merged: Potential,
    parents: Sequence[ForceField],
    calibration_sets: Sequence[CalibrationSet],
    recipe: Recipe,
) -> list[LayerReport]:
    """The plain readout, treated like any other layers."""

    def run(readout: nn.Module, scene: CalibrationBatch, scalars: Tensors) -> Tensor:
        return readout(scalars, merged.species_row[scene.graph.atomic_numbers])

    def inputs(scene: CalibrationBatch, of_merged: bool) -> Dual:
        return sum(scene.merged_scalars if of_merged else scene.target_scalars, start=Dual((), ()))

    originals = [parent.potential.readout for parent in parents]
    return align_layers(
        "readout", merged.readout, originals, calibration_sets, recipe, run=run, inputs=inputs
    )


def _verdict_message(report: MergeReport) -> str:
    worst = 100 * report.relative_disagreement
    advice = (
        "distil it on the specialists' own predictions before relying on it"
        if report.verdict != "failed"
        else "do not use it; do the specialists share a base, and do the calibration frames cover what they know?"
    )
    return f"the merged potential is {report.verdict}: it misses a specialist's forces by {worst:.0f} %; {advice}"


def _as_specialist(
    specialists: Sequence[ForceField], potential: Potential, recipe: Recipe, report: MergeReport
) -> ForceField:
    theories = dict.fromkeys(s.level_of_theory for s in specialists)
    record = MergeRecord(
        parents=report.specialists,
        fingerprints=tuple(s.fingerprint for s in specialists),
        recipe=recipe.model_dump(mode="json"),
        report=report.to_dict(),
    )
    return ForceField(
        name="+".join(record.parents),
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
