r"""Label-free distillation: a merged potential is trained on its specialists' own energies, forces and stresses.

Specialists label anything for free, so no data set is needed. On frames s of specialist k, with predictions marked by a
star and :math:`n_s` atoms per frame, the loss is

.. math::

   L = w_E \Big\langle \omega_k\, \frac{|E_s - E^*_s|}{n_s} \Big\rangle_s
     + w_F \big\langle \omega_k\, \lVert \mathbf F_i - \mathbf F^*_i \rVert \big\rangle_i
     + w_\sigma \big\langle \omega_k\, |\sigma_{ab} - \sigma^*_{ab}| \big\rangle_{s,ab}
     + w_h \frac{\langle \omega_k\, |h_{ic} - h^*_{ic}| \rangle_{i,c}}{\langle |h^*_{ic}| \rangle_{i,c}}
     + w_H \frac{\langle \omega_k\, |(Hu - H^*u)_{ia}| \rangle_{i,a}}{\langle |(H^*u)_{ia}| \rangle_{i,a}} ,
   \qquad \omega_k \propto \frac{a_k}{\langle |F^*| \rangle_k\, N_k} ,

with the mean over frames s, atoms i, Cartesian components and node features c; :math:`N_k` atoms of specialist k, its weight
:math:`a_k` in the merge and its mean absolute force component, so that specialists with large forces or many atoms do
not outweigh the others (:func:`~ase_gffmerge.training.loss.weigh`). Features h may be targets too (knowledge distillation
of molecular graph networks: Ekström Kelvinius et al., arXiv 2306.14818): scalars of atoms, vectors of atoms, features of
edges, or the teacher's edges summed over each atom with the student's scalars; those of a student of another kind or size
are first mapped by a linear layer that is trained with it and not kept. So may products of the Hessian H with a random
direction u per frame (Amin et al., arXiv 2501.09009, match rows of it).
"""

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import torch
from ase import Atoms
from ase.data import chemical_symbols

from ase_gffmerge.data.frames import geometry_keys, hash_frames, spread
from ase_gffmerge.errors import IncompatibleSpecialistsError, MergeWarning
from ase_gffmerge.forcefield.force_field import ForceField, repelling
from ase_gffmerge.forcefield.provenance import MergeRecord, Provenance
from ase_gffmerge.forcefield.uncertainty import fit_uncertainty
from ase_gffmerge.graphs import batch_graphs
from ase_gffmerge.merging.average import mean_potential
from ase_gffmerge.merging.disagreement import diagnose
from ase_gffmerge.merging.recipe import DistillOptions, Recipe
from ase_gffmerge.merging.report import MergeReport, Trial
from ase_gffmerge.models import Potential
from ase_gffmerge.runtime.devices import chunks, resolve_device
from ase_gffmerge.runtime.distributed import agreed, n_ranks
from ase_gffmerge.runtime.progress import Progress, no_progress, part_of
from ase_gffmerge.training.checkpoint import History, differences, saved_run
from ase_gffmerge.training.config import TrainConfig
from ase_gffmerge.training.loop import Callback, Loss, fit
from ase_gffmerge.training.loss import (
    PROJECTION,
    LabeledGraph,
    add_projection,
    distillation_loss,
    relative_error_on,
)
from ase_gffmerge.training.soap import SOAP
from ase_gffmerge.training.teachers import DistillationSet, Teachers, merge_weights, prepare_teachers


def distill(
    merged: ForceField,
    specialists: Sequence[ForceField],
    options: DistillOptions | None = None,
    *,
    frames: Sequence[Sequence[Atoms]] | None = None,
    checkpoint: Path | None = None,
    device: str | torch.device = "auto",
    callback: Callback | None = None,
    on_plan: Callable[[int], object] | None = None,
    max_edges: int | None = None,
    progress: Progress = no_progress,
) -> tuple[ForceField, History]:
    """Fine-tune a merged potential on its specialists' predictions; no labels are read.

    Parameters
    ----------
    merged
        Where to start; not changed. Any force field that knows the specialists' elements will do, a smaller one or one of
        another architecture too (:mod:`.student`).
    specialists
        The teachers, in the order in which ``merged`` was made of them.
    options
        Length, frames, weights.
    frames
        Further unlabelled frames, one sequence per specialist, beside the calibration frames.
    checkpoint
        File rewritten after every epoch; the same call continues from it.
    device
        Where to compute.
    callback
        Called after every epoch with its number and losses.
    on_plan
        Called once, before training, with the number of epochs at most, which the budget may have cut.
    max_edges, progress
        See :func:`~ase_gffmerge.training.loop.fit`; called with a fraction (0 to 1) and a description, which says beforehand
        about how long it will take.

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
    _check_student(merged, specialists, options, frames)
    student = deepcopy(merged.potential).with_core_repulsion(None).to(device=resolve_device(device))
    student.train().requires_grad_(True)
    given = frames if frames is not None else [()] * len(specialists)
    progress(0.0, "the specialists label their frames")
    teachers = prepare_teachers(
        student, specialists, options, frames=given, weights=merge_weights(merged, len(specialists))
    )
    config = teachers.suited_config(student, options)
    if options.feature_weight:
        networks = (student, *(t.potential for t in teachers.teachers))
        alike = {(p.architecture, p.hyper.n_blocks, p.hyper.channels) for p in networks}
        graphs = [graph for group in teachers.training for graph in group]
        add_projection(student, graphs, options.feature_match, alike=len(alike) == 1)
    loss = distillation_loss(config, options)
    per_frame = _seconds_per_frame(student, teachers.training, config, loss, max_edges)
    identity = _run_identity(merged, specialists, options, teachers.distillation_sets)
    epochs, share = agreed(
        _saved_plan(checkpoint, identity)
        or _within_budget(config, per_frame * sum(map(len, teachers.training)), options.budget)
    )
    config = config.model_copy(update={"epochs": epochs})
    if on_plan is not None:
        on_plan(epochs)
    training = [
        graph for group in teachers.training for graph in spread(group, max(round(share * len(group)), 1))
    ]
    seconds = per_frame * len(training) * config.epochs / n_ranks()
    progress(0.0, f"distilling {len(training)} frames, about {seconds:.0f} s")
    potential, history = fit(
        student,
        training,
        [graph for group in teachers.held_out for graph in group],
        config,
        loss=loss,
        optimizer=SOAP(parameter_groups(student), lr=config.learning_rate),
        patience=options.patience,
        checkpoint=checkpoint,
        run={**identity, "plan": [epochs, share]},
        callback=callback,
        max_edges=max_edges,
        progress=part_of(progress, 0.0, 1.0, prefix="distilling, "),
    )
    potential._modules.pop(PROJECTION, None)
    seconds = time.perf_counter() - started
    distilled = _distilled_force_field(merged, specialists, options, teachers, potential, seconds=seconds)
    progress(1.0, "distilled")
    provenance = Provenance(
        data_set="merged and distilled" if merged.merged else "distilled from teachers",
        lineage=tuple(s.fingerprint for s in specialists),
        n_train=len(training),
        epochs=len(history.rows),
        seed=options.seed,
        seen_frames=seen_frames((merged, *specialists), given),
        origin=merged.provenance.origin,
    )
    return replace(distilled, provenance=provenance), history


OPTIMIZER_SHARE = 0.4
"""Time of an optimizer's step over that of the loss and its gradient, for small networks."""


def _seconds_per_frame(
    student: Potential,
    groups: Sequence[Sequence[LabeledGraph]],
    config: TrainConfig,
    loss: Loss,
    max_edges: int | None,
) -> float:
    """Processor seconds (on other devices: seconds) that training takes for a frame, by a batch of everybody's frames.

    Parameters
    ----------
    student, groups, config, loss, max_edges
        As for :func:`~ase_gffmerge.training.loop.fit`; frames of every teacher.
    """
    clock = time.process_time if student.device.type == "cpu" else time.perf_counter
    frames = [graph for group in groups for graph in spread(group, max(config.batch_size // len(groups), 1))]
    parts = list(chunks(frames, max_edges, size=lambda graph: graph.n_edges)) if max_edges else [frames]
    batches, seconds = [batch_graphs(part).to(student.device) for part in parts], 0.0
    for _ in range(2):  # the first time things are allocated
        start = clock()
        for batch in batches:
            torch.autograd.grad(loss(student, batch, batch), list(student.parameters()), allow_unused=True)
        seconds = clock() - start
    return seconds * (1 + OPTIMIZER_SHARE) / len(frames)


def _within_budget(config: TrainConfig, epoch: float, budget: float | None) -> tuple[int, float]:
    """How many epochs, and what share of the frames, where a single one of ``epoch`` seconds is too long."""
    if budget is None or config.epochs * epoch <= budget:
        return config.epochs, 1.0
    return max(int(budget / epoch), 1), min(budget / epoch, 1.0)


def _saved_plan(checkpoint: Path | None, identity: Mapping[str, object]) -> tuple[int, float] | None:
    """Epochs and share of the frames that an interrupted run began with, which may have found the machine less busy."""
    saved = saved_run(checkpoint)
    match saved.pop("plan", None):
        case [int(epochs), float(share)] if not differences(saved, identity):
            return epochs, share
    return None


def _distilled_force_field(
    merged: ForceField,
    specialists: Sequence[ForceField],
    options: DistillOptions,
    teachers: Teachers,
    potential: Potential,
    *,
    seconds: float,
) -> ForceField:
    """Force field of the trained potential with a report on it; warns when its verdict is not good.

    Parameters
    ----------
    merged, specialists, options
        As for :func:`distill`.
    teachers
        Their working copies and held-out graphs.
    potential
        The student with its final weights.
    seconds
        Wall time so far.
    """
    report = _distilled_report(
        merged.merged,
        potential,
        teachers.teachers,
        teachers.held_out,
        seconds=seconds,
        energy_shifts=teachers.energy_shifts,
        improved=_differ(potential, merged.potential),
    )
    if report.verdict != "good":
        warnings.warn(
            f"verdict on the distilled potential: {report.verdict}; {report.missed}; distill it longer or on more frames",
            MergeWarning,
            stacklevel=3,
        )
    recipe = merged.merged.recipe if merged.merged else {}
    record = MergeRecord(
        specialists=report.specialists,
        fingerprints=tuple(s.fingerprint for s in specialists),
        recipe={**recipe, "refine": options.model_dump(mode="json")},
        report=report.to_dict(),
    )
    networks = [s.potential for s in teachers.teachers]
    extrapolation_grade = fit_uncertainty(potential, [s.calibration for s in teachers.teachers], networks)
    if merged.potential.core_repulsion is not None:
        potential = repelling(potential, teachers.teachers)
    return replace(merged, potential=potential, merged=record, extrapolation_grade=extrapolation_grade)


def parameter_groups(potential: Potential) -> list[dict[str, object]]:
    """All parameters, those of a widened readout with a rate as much lower as it has more features than the plain one.

    So one step moves the energy as much through either (the rule of maximal updates, Yang & Hu, arXiv 2011.14522).
    """
    wide: list[torch.nn.Parameter] = []
    plain: list[torch.nn.Parameter] = []
    for name, parameter in potential.named_parameters():
        is_wide = (
            potential.hyper.readout_width > 0
            and name.startswith("readout.")
            and not name.startswith("readout.mlp.")
        )
        (wide if is_wide else plain).append(parameter)
    if not wide:
        return [{"params": plain}]
    scale = min(1.0, max(potential.hyper.channels // 2, 1) / potential.hyper.readout_width)
    return [{"params": plain}, {"params": wide, "lr_scale": scale}]


def _check_student(
    merged: ForceField,
    specialists: Sequence[ForceField],
    options: DistillOptions,
    frames: Sequence[Sequence[Atoms]] | None,
) -> None:
    """Raise :class:`IncompatibleSpecialistsError` when ``merged`` cannot learn from ``specialists``."""
    known = ", ".join(s.name for s in specialists)
    if merged.merged and merged.merged.fingerprints != tuple(s.fingerprint for s in specialists):
        raise IncompatibleSpecialistsError(
            f"{merged.name!r} was merged from {', '.join(merged.merged.specialists)}, not from {known} with these weights "
            "in this order; give the specialists it was made of, in their order"
        )
    if frames is not None and len(frames) != len(specialists):
        raise IncompatibleSpecialistsError(
            f"frames were given for {len(frames)} specialists, but there are {len(specialists)}; give one set each"
        )
    for specialist in specialists:
        if not set(specialist.species) <= set(merged.species):
            raise IncompatibleSpecialistsError(
                f"{merged.name!r} cannot learn from {specialist.name!r}, which knows other elements; start from a merge of "
                "the specialists"
            )
    sizes = {s.potential.hyper.n_blocks * s.potential.hyper.channels for s in specialists}
    if options.feature_weight and options.feature_match == "nodes" and len(sizes) > 1:
        raise IncompatibleSpecialistsError(
            f"the node features of {known} differ in size; set feature_weight to 0"
        )
    cutoffs = {s.cutoff for s in (merged, *specialists)}
    if options.feature_weight and options.feature_match == "edges" and len(cutoffs) > 1:
        raise IncompatibleSpecialistsError(
            f"edges of {merged.name!r} and {known} differ, as their cutoffs do ({sorted(cutoffs)} Å); set feature_match to "
            "edges-to-nodes, or give the student the specialists' cutoff"
        )


def _run_identity(
    merged: ForceField,
    specialists: Sequence[ForceField],
    options: DistillOptions,
    distillation_sets: Sequence[DistillationSet],
) -> dict[str, object]:
    """Everything that decides the outcome, JSON-able: only a checkpoint of the same identity is continued."""
    return {
        "options": options.model_dump(mode="json"),
        "merged": merged.fingerprint,
        "specialists": [specialist.fingerprint for specialist in specialists],
        "frames": [hash_frames((*own.training, *own.held_out)) for own in distillation_sets],
    }


def seen_frames(models: Sequence[ForceField], frames: Sequence[Sequence[Atoms]]) -> tuple[str, ...]:
    """Keys of the frames that the models have seen and of further ones, ascending."""
    inherited = {key for model in models for key in model.provenance.seen_frames}
    return tuple(sorted({*inherited, *geometry_keys([atoms for group in frames for atoms in group])}))


def _differ(one: Potential, other: Potential) -> bool:
    """Whether two potentials of one architecture have different weights."""
    return any(not a.cpu().equal(b.cpu()) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def _distilled_report(
    record: MergeRecord | None,
    potential: Potential,
    teachers: Sequence[ForceField],
    held_out: Sequence[Sequence[LabeledGraph]],
    *,
    seconds: float,
    energy_shifts: Mapping[str, Mapping[str, float]],
    improved: bool,
) -> MergeReport:
    """Report of ``potential``; layers and seconds of the merge that it started from are kept.

    Parameters
    ----------
    record
        How the start was made, if it was a merge.
    potential
        The distilled potential.
    teachers
        Specialists on its device, with one zero of energy.
    held_out
        Graphs with the teachers' predictions that it was not trained on.
    seconds
        Wall time of the distillation.
    energy_shifts
        See :class:`~ase_gffmerge.merging.report.MergeReport`.
    improved
        Whether an epoch was better on held-out frames than the start.
    """
    before = MergeReport.from_dict(record.report) if record else None
    errors = tuple(relative_error_on(potential, graphs) for graphs in held_out)
    trials = before.trials if before else ()
    recipe = Recipe(conditioning="per-specialist" if potential.hyper.n_embeddings > 1 else "shared")
    kinds = {(teacher.potential.architecture, teacher.potential.hyper) for teacher in teachers}
    mean = mean_potential(teachers, recipe) if len(teachers) > 1 == len(kinds) else None
    disagreements, parity = diagnose(teachers, mean, potential)
    return MergeReport(
        specialists=tuple(teacher.name for teacher in teachers),
        layers=before.layers if before else (),
        disagreements=disagreements,
        held_out=max(errors),
        energy_shifts=energy_shifts,
        seconds={**(before.seconds if before else {}), "distillation": seconds},
        parity=parity,
        elements=tuple(chemical_symbols[number] for number in potential.species),
        trials=(*trials, Trial(name="distillation", disagreements=errors, kept=improved)),
    )
