"""How specialists teach: their lessons on the student's device, the loss against them, and rates that suit its layers."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from ase import Atoms
from torch_geometric.data import Batch, Data

from ase_gffmerge.forcefield.force_field import ForceField
from ase_gffmerge.merging.distill_options import DistillOptions
from ase_gffmerge.merging.merge import working_copies
from ase_gffmerge.merging.reference_energies import align_references
from ase_gffmerge.models import Potential
from ase_gffmerge.training.config import TrainConfig
from ase_gffmerge.training.distill_targets import DistillationSet, prepare_distillation_set, taught_graphs
from ase_gffmerge.training.loop import Loss
from ase_gffmerge.training.loss import loss_terms, weigh


@dataclass(frozen=True)
class Teachers:
    """Teachers on the student's device, and their lessons as graphs with targets, one sequence per teacher."""

    teachers: list[ForceField]
    distillation_sets: list[DistillationSet]
    training: list[list[Data]]
    held_out: list[list[Data]]
    energy_shifts: dict[str, dict[str, float]]


def enrol(
    student: Potential,
    specialists: Sequence[ForceField],
    options: DistillOptions,
    *,
    frames: Sequence[Sequence[Atoms]],
    weights: Sequence[float],
) -> Teachers:
    """Let every specialist label its frames, and give all specialists a say by their weights."""
    teachers = [
        replace(copy, potential=copy.potential.to(dtype=student.dtype))
        for copy in working_copies(specialists, student.device)
    ]
    shifts = align_references(teachers)
    distillation_sets = [
        prepare_distillation_set(s, options, extra=extra) for s, extra in zip(teachers, frames, strict=True)
    ]
    training, held_out = (
        [
            taught_graphs(teacher, student, chosen, index=k, features=options.feature_weight > 0)
            for k, (teacher, chosen) in enumerate(zip(teachers, parts, strict=True))
        ]
        for parts in (
            [distillation_set.training for distillation_set in distillation_sets],
            [distillation_set.held_out for distillation_set in distillation_sets],
        )
    )
    scales = [
        max(mean_force(graphs), 1e-6) / weight for graphs, weight in zip(training, weights, strict=True)
    ]
    for groups in (training, held_out):
        weigh(groups, scales)
    return Teachers(teachers, distillation_sets, training, held_out, shifts)


def weights_of(merged: ForceField, n: int) -> Sequence[float]:
    """How much each of ``n`` specialists counted in the merge."""
    weights = merged.merged.recipe.get("weights") if merged.merged else None
    return weights or (1.0,) * n


def mean_force(graphs: Sequence[Data]) -> float:
    """Mean absolute force component, eV/Å."""
    return float(torch.cat([graph.forces for graph in graphs]).abs().mean())


def distillation_loss(config: TrainConfig, feature_weight: float) -> Loss:
    """Errors of energies, forces and stresses, and of node features relative to their size."""

    def loss(potential: Potential, batch: Batch) -> torch.Tensor:
        if not feature_weight:
            return loss_terms(potential, batch, config)
        seen: list[torch.Tensor] = []
        hook = potential.readout.register_forward_pre_hook(
            lambda _, inputs: seen.append(torch.cat(list(inputs[0]), dim=-1))
        )
        with hook:
            terms = loss_terms(potential, batch, config)
        weight = batch.weight[batch.batch, None]
        mismatch = (weight * (seen[0] - batch.features).abs()).mean() / batch.features.abs().mean()
        return terms + feature_weight * mismatch

    return loss


def parameter_groups(potential: Potential) -> list[dict[str, Any]]:
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
    scale = min(1.0, potential.hyper.channels // 2 / potential.hyper.readout_width)
    return [{"params": plain}, {"params": wide, "lr_scale": scale}]
