"""The merge report of a distilled potential."""

from collections.abc import Mapping, Sequence

import torch
from torch_geometric.data import Data

from ase_gffmerge.forcefield.force_field import ForceField, MergeRecord
from ase_gffmerge.graphs import batch_graphs, predict
from ase_gffmerge.merging.average import mean_potential
from ase_gffmerge.merging.diagnostics import diagnose
from ase_gffmerge.merging.recipe import Recipe
from ase_gffmerge.merging.report import MergeReport
from ase_gffmerge.models import Potential

BATCH = 50
"""Graphs per batch."""


def distilled_report(
    record: MergeRecord | None,
    potential: Potential,
    teachers: Sequence[ForceField],
    held_out: Sequence[Sequence[Data]],
    *,
    seconds: float,
    energy_shifts: Mapping[str, Mapping[str, float]],
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
    """
    before = MergeReport.from_dict(record.report) if record else None
    recipe = Recipe(conditioning="per-specialist" if potential.hyper.n_embeddings > 1 else "shared")
    disagreements, parity = diagnose(teachers, mean_potential(teachers, recipe), potential)
    return MergeReport(
        specialists=tuple(teacher.name for teacher in teachers),
        layers=before.layers if before else (),
        disagreements=disagreements,
        held_out=max(relative_error(potential, graphs) for graphs in held_out),
        energy_shifts=energy_shifts,
        seconds={**(before.seconds if before else {}), "distillation": seconds},
        parity=parity,
    )


def relative_error(potential: Potential, graphs: Sequence[Data]) -> float:
    """Root mean square force error over the root mean square force."""
    squares = torch.zeros(2, dtype=torch.float64)
    for start in range(0, len(graphs), BATCH):
        batch = batch_graphs(graphs[start : start + BATCH]).to(potential.device)
        error = predict(potential, batch).forces - batch.forces
        squares += torch.stack([error.double().square().sum(), batch.forces.double().square().sum()]).cpu()
    return float((squares[0] / squares[1].clamp(min=1e-12)).sqrt())
