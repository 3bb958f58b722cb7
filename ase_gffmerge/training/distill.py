"""Label-free distillation: a merged potential learns from its specialists' own energies, forces and stresses.

Specialists label anything for free, so no data set is needed. Beside energies and forces, the node features of the
specialists are targets (knowledge distillation of molecular graph networks: Ekström Kelvinius et al., arXiv 2306.14818).
"""

import time
import warnings
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from ase import Atoms

from ase_gffmerge.data.hashing import geometry_keys, hash_frames
from ase_gffmerge.errors import IncompatibleSpecialistsError, MergeWarning
from ase_gffmerge.forcefield.force_field import ForceField, MergeRecord, Provenance
from ase_gffmerge.forcefield.leverage_fit import fit_extrapolation_grade
from ase_gffmerge.merging.distill_options import DistillOptions
from ase_gffmerge.models import Potential
from ase_gffmerge.runtime.devices import resolve_device
from ase_gffmerge.training.config import TrainConfig
from ase_gffmerge.training.distill_report import distilled_report
from ase_gffmerge.training.distill_targets import DistillationSet
from ase_gffmerge.training.loop import Callback, fit
from ase_gffmerge.training.soap import SOAP
from ase_gffmerge.training.state import History
from ase_gffmerge.training.teachers import Teachers, distillation_loss, enrol, parameter_groups, weights_of


def distill(
    merged: ForceField,
    specialists: Sequence[ForceField],
    options: DistillOptions | None = None,
    *,
    frames: Sequence[Sequence[Atoms]] | None = None,
    checkpoint: Path | None = None,
    device: str | torch.device = "auto",
    callback: Callback | None = None,
) -> tuple[ForceField, History]:
    """Fine-tune a merged potential on its specialists' predictions; no labels are read.

    Parameters
    ----------
    merged
        Where to start; not changed. Any force field that knows the specialists' elements will do.
    specialists
        The teachers, in the order in which ``merged`` was made of them.
    options
        Length, frames, weights.
    frames
        Further frames of every specialist's territory, beside its calibration frames.
    checkpoint
        File rewritten after every epoch; the same call continues from it.
    device
        Where to compute.
    callback
        Called after every epoch with its number and losses.

    Returns
    -------
    distilled : ForceField
        Never worse than ``merged`` on held-out frames; its report is that of the distilled potential.
    history : History

    Raises
    ------
    FramesError, IncompatibleSpecialistsError, DeviceError
        With the reason and the remedy.
    TrainingError
        When the loss is no longer finite.
    """
    options, started = options or DistillOptions(), time.perf_counter()
    check_student(merged, specialists, options, frames)
    student = deepcopy(merged.potential).to(device=resolve_device(device)).train().requires_grad_(True)
    given = frames if frames is not None else [()] * len(specialists)
    teachers = enrol(
        student, specialists, options, frames=given, weights=weights_of(merged, len(specialists))
    )
    config = TrainConfig(**options.model_dump(include=set(TrainConfig.model_fields)))
    potential, history = fit(
        student,
        [graph for group in teachers.training for graph in group],
        [graph for group in teachers.held_out for graph in group],
        config,
        loss=distillation_loss(config, options.feature_weight),
        optimizer=SOAP(parameter_groups(student), lr=config.learning_rate),
        patience=options.patience,
        checkpoint=checkpoint,
        run=run_identity(merged, specialists, options, teachers.distillation_sets),
        callback=callback,
    )
    seconds = time.perf_counter() - started
    distilled = graduate(merged, specialists, options, teachers, potential, seconds=seconds)
    provenance = Provenance(
        data_set="merged and distilled",
        lineage=tuple(s.fingerprint for s in specialists),
        n_train=sum(map(len, teachers.training)),
        epochs=len(history.rows),
        seed=options.seed,
        seen_frames=seen_frames((merged, *specialists), given),
        origin=merged.provenance.origin,
    )
    return replace(distilled, provenance=provenance), history


def graduate(
    merged: ForceField,
    specialists: Sequence[ForceField],
    options: DistillOptions,
    teachers: Teachers,
    potential: Potential,
    *,
    seconds: float,
) -> ForceField:
    """The student with its final weights, and the report on them; warns when its verdict is not good."""
    report = distilled_report(
        merged.merged,
        potential,
        teachers.teachers,
        teachers.held_out,
        seconds=seconds,
        energy_shifts=teachers.energy_shifts,
    )
    if report.verdict != "good":
        warnings.warn(
            f"the distilled potential is {report.verdict}: it misses a specialist's forces by "
            f"{100 * report.relative_disagreement:.0f} %; distil it longer or on more frames",
            MergeWarning,
            stacklevel=3,
        )
    recipe = merged.merged.recipe if merged.merged else {}
    record = MergeRecord(
        parents=report.specialists,
        fingerprints=tuple(s.fingerprint for s in specialists),
        recipe={**recipe, "refine": options.model_dump(mode="json")},
        report=report.to_dict(),
    )
    extrapolation_grade = fit_extrapolation_grade(potential, teachers.teachers)
    return replace(merged, potential=potential, merged=record, extrapolation_grade=extrapolation_grade)


def check_student(
    merged: ForceField,
    specialists: Sequence[ForceField],
    options: DistillOptions,
    frames: Sequence[Sequence[Atoms]] | None,
) -> None:
    """Raise :class:`IncompatibleSpecialistsError` when ``merged`` cannot learn from ``specialists``."""
    known = ", ".join(s.name for s in specialists)
    if merged.merged and merged.merged.fingerprints != tuple(s.fingerprint for s in specialists):
        raise IncompatibleSpecialistsError(
            f"{merged.name!r} was merged from {', '.join(merged.merged.parents)}, not from {known} with these weights in "
            "this order; give the specialists it was made of, in their order"
        )
    if frames is not None and len(frames) != len(specialists):
        raise IncompatibleSpecialistsError(
            f"frames were given for {len(frames)} specialists, but there are {len(specialists)}; give one set each"
        )
    for specialist in specialists:
        if not set(specialist.species) <= set(merged.species) or specialist.cutoff != merged.cutoff:
            raise IncompatibleSpecialistsError(
                f"{merged.name!r} cannot learn from {specialist.name!r}, which knows other elements or has another "
                "cutoff; start from a merge of the specialists"
            )
        if options.feature_weight and _feature_size(specialist.potential) != _feature_size(merged.potential):
            raise IncompatibleSpecialistsError(
                f"the node features of {merged.name!r} and {specialist.name!r} differ in size; set feature_weight to 0"
            )


def _feature_size(potential: Potential) -> tuple[str, int, int]:
    return potential.architecture, potential.hyper.n_blocks, potential.hyper.channels


def run_identity(
    merged: ForceField,
    specialists: Sequence[ForceField],
    options: DistillOptions,
    distillation_sets: Sequence[DistillationSet],
) -> dict[str, Any]:
    """Everything that decides the outcome, JSON-able: only a checkpoint of the same identity is continued."""
    return {
        "options": options.model_dump(mode="json"),
        "merged": merged.fingerprint,
        "specialists": [specialist.fingerprint for specialist in specialists],
        "frames": [
            hash_frames((*distillation_set.training, *distillation_set.held_out))
            for distillation_set in distillation_sets
        ],
    }


def seen_frames(models: Sequence[ForceField], frames: Sequence[Sequence[Atoms]]) -> tuple[str, ...]:
    """Keys of the frames that the models have seen and of further ones, ascending."""
    inherited = {key for model in models for key in model.provenance.seen_frames}
    return tuple(sorted({*inherited, *geometry_keys([atoms for group in frames for atoms in group])}))
