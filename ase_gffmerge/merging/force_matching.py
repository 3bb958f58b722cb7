"""Step 5 applied: widen the readout of a merged potential and fit it on every specialist's energies and forces."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch_geometric.data import Batch

from ase_gffmerge.graphs import predict
from ase_gffmerge.merging.readout import fit_readout, random_lift, readout_gram
from ase_gffmerge.merging.recipe import ReadoutOptions
from ase_gffmerge.merging.report import LayerReport
from ase_gffmerge.merging.statistics import Gram
from ase_gffmerge.merging.territory import Territory
from ase_gffmerge.models import Potential, build_potential
from ase_gffmerge.models.readout import MLPReadout, WidenedReadout

HELD_OUT = 5
"""Every fifth frame chooses the ridge."""


def widen(potential: Potential, options: ReadoutOptions) -> Potential:
    """Copy of ``potential`` with a widened readout at θ = c = 0: the same energies and forces."""
    blocks = min(options.blocks, potential.hyper.n_blocks)
    hyper = replace(potential.hyper, readout_width=options.width, readout_blocks=blocks)
    wide = build_potential(potential.architecture, hyper.to_dict(), potential.species)
    wide.to(dtype=potential.dtype, device=potential.device)
    state = {
        (f"readout.mlp.{name.removeprefix('readout.')}" if name.startswith("readout.") else name): value
        for name, value in potential.state_dict().items()
    }
    wide.load_state_dict(wide.state_dict() | state)
    return wide.eval().requires_grad_(False)


def match_forces(
    potential: Potential, territories: Sequence[Territory], options: ReadoutOptions
) -> tuple[Potential, list[LayerReport], float]:
    """Widen the readout and solve it on energies and forces of all specialists.

    Returns
    -------
    potential
        The merged potential with its new readout.
    reports
        Diagnosis of the solve.
    held_out
        Relative squared residual on held-out frames.
    """
    merged = widen(potential, options)
    readout: WidenedReadout = merged.readout  # type: ignore[assignment]
    scalars = [readout.lifted([scalars.value[0] for scalars in scene.merged_scalars]) for t in territories for scene in t.scenes]
    random_lift(readout, scalars, seed=options.seed)
    fitting, held_out = (_total_gram(merged, territories, options, held_out=flag) for flag in (False, True))
    prior = torch.zeros(len(fitting.xx), 1, dtype=torch.float64, device=fitting.xx.device)
    fit = fit_readout(fitting, held_out, prior)
    with torch.no_grad():
        readout.theta.copy_(fit.solution.theta[: options.width, 0])
        readout.constants.copy_(fit.solution.theta[options.width :, 0])
    row = LayerReport(
        name="readout.theta",
        kind="readout",
        rows=fit.solution.n_rows,
        size=len(prior),
        residual_before=fit.solution.residual_before,
        residual_after=fit.solution.residual_after,
        effective_rank=fit.solution.effective_rank,
        ridge=fit.solution.ridge,
    )
    return merged, [row], fit.held_out


def _total_gram(
    merged: Potential, territories: Sequence[Territory], options: ReadoutOptions, *, held_out: bool
) -> Gram:
    """Sum of all specialists' statistics over the fitting or the held-out frames."""
    total: Gram | None = None
    for territory in territories:
        for scene in territory.scenes:
            graphs = [g for i, g in enumerate(scene.graph.to_data_list()) if (i % HELD_OUT == HELD_OUT - 1) == held_out]
            if graphs:
                gram = _scene_gram(merged, territory, Batch.from_data_list(graphs), options)
                total = gram if total is None else total + gram
    if total is None:
        width = options.width + len(merged.species)
        return Gram.zero(width, 1, device=merged.device)
    return total


def _scene_gram(merged: Potential, territory: Territory, graph: Batch, options: ReadoutOptions) -> Gram:
    """Statistics of one batch; every specialist weighs a_k / (N_k s_k) per force component."""
    target = predict(territory.specialist.potential, graph)
    n_frames = sum(scene.graph.num_graphs for scene in territory.scenes)
    mean_square = float(target.forces.double().square().sum(dim=1).mean())
    n_atoms = torch.bincount(graph.batch).to(merged.dtype)
    weights: Tensor = territory.weight / (n_frames * n_atoms * mean_square)
    return readout_gram(merged, graph, target.energy, target.forces, options, weights)
