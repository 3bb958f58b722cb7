"""Step 5 applied: widen the readout of a merged potential and fit it on every specialist's energies and forces.

Specialists label anything for free. Beside each calibration frame a few copies enter (:mod:`.copies`), which tell the
readout how energies and forces change around the frame; without them its many coefficients would overfit.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from ase import Atoms

from ase_gffmerge.graphs import batch_graphs, build_graph, predict
from ase_gffmerge.least_squares.gram import Gram
from ase_gffmerge.merging.augmentation import copies_per_frame, with_copies
from ase_gffmerge.merging.calibration import CalibrationSet
from ase_gffmerge.merging.directions import Probes
from ase_gffmerge.merging.readout_fit import draw_random_features, fit_readout, readout_rows, widened
from ase_gffmerge.merging.recipe import ReadoutOptions
from ase_gffmerge.merging.report import LayerReport
from ase_gffmerge.models import Potential, build_potential
from ase_gffmerge.runtime.batching import chunks

HELD_OUT = 5
"""Every fifth frame (with its copies) chooses the ridge."""

MAX_ATOMS = 180
"""Atoms per batch; much larger batches leave the processor's cache and are slower."""

MAX_ROWS = 4096
"""Rows that are collected before their Gram matrix is taken; each one costs a pass over the whole matrix."""


MAX_UNKNOWNS = 8192
"""Coefficients of all elements together; their Gram matrix takes 0.5 GB."""


def with_random_feature_readout(
    potential: Potential, options: ReadoutOptions, *, n_elements: int = 1
) -> Potential:
    """Copy of ``potential`` with a widened readout at θ = c = 0: the same energies and forces.

    With many elements to solve for, the readout is narrower than ``options.width``.
    """
    width = min(options.width, max(MAX_UNKNOWNS // n_elements, 1))
    width -= width % options.groups if width > options.groups else 0
    blocks = min(options.blocks, potential.hyper.n_blocks)
    sparse = options.inputs < blocks * potential.hyper.channels
    hyper = replace(
        potential.hyper,
        readout_width=width,
        readout_blocks=blocks,
        readout_groups=math.gcd(options.groups, width) if sparse else 0,
        readout_inputs=options.inputs if sparse else 0,
    )
    wide = build_potential(potential.architecture, hyper.to_dict(), potential.species)
    wide.to(dtype=potential.dtype, device=potential.device)
    state = {
        (f"readout.mlp.{name.removeprefix('readout.')}" if name.startswith("readout.") else name): value
        for name, value in potential.state_dict().items()
    }
    wide.load_state_dict(wide.state_dict() | state)
    return wide.eval().requires_grad_(False)


@torch.no_grad()
def match_forces(
    potential: Potential,
    calibration_sets: Sequence[CalibrationSet],
    options: ReadoutOptions,
    *,
    progress: Callable[[float], None],
) -> tuple[Potential, LayerReport, float]:
    """Widen the readout and solve it on energies and forces of all specialists.

    Returns
    -------
    potential
        The merged potential with its new readout.
    report
        Diagnosis of the solve.
    held_out
        Root mean square force error (with the weighted energy error) on held-out frames, relative to the specialists'
        root mean square force.
    """
    frames = [
        atoms for calibration_set in calibration_sets for atoms in calibration_set.specialist.calibration
    ]
    numbers = np.unique(np.concatenate([atoms.numbers for atoms in frames]))
    merged = with_random_feature_readout(potential, options, n_elements=len(numbers))
    readout = widened(merged)
    scenes = [scene for calibration_set in calibration_sets for scene in calibration_set.scenes]
    rows = torch.cat(
        [readout.random_features([scalars.value[0] for scalars in scene.merged_scalars]) for scene in scenes]
    )
    draw_random_features(readout, rows, seed=options.seed)
    elements = merged.species_row[torch.as_tensor(numbers, device=merged.device)]
    width = readout.lift.out_features
    size = len(elements) * (width + 1)
    grams = [Gram.zero(size, 1, device=merged.device) for _ in range(2)]
    for k, calibration_set in enumerate(calibration_sets):
        n_copies = copies_per_frame(
            calibration_set.specialist, calibration_set.specialist.calibration, options
        )
        for held_out, group in enumerate(_split(calibration_set.specialist.calibration)):
            labelled = with_copies(calibration_set.specialist, group, options, n_copies=n_copies)
            share = len(group) / len(calibration_set.specialist.calibration)
            grams[held_out] += _calibration_gram(
                merged, calibration_set, labelled, options, elements, share=share
            )
            progress((2 * k + held_out + 1) / (2 * len(calibration_sets)))
    fit = fit_readout(*grams)
    theta, constants = fit.solution.theta[:, 0].split([len(elements) * width, len(elements)])
    readout.theta[elements] = theta.view(len(elements), -1).to(merged.dtype)
    readout.constants[elements] = constants.to(merged.dtype)
    share = sum(
        calibration_set.weight * _held_out_share(calibration_set) for calibration_set in calibration_sets
    )
    relative_square = fit.held_out * grams[1].yy / (3 * share) if share else fit.held_out
    return merged, LayerReport.of("readout.theta", "readout", fit.solution), relative_square**0.5


def _held_out_share(calibration_set: CalibrationSet) -> float:
    frames = calibration_set.specialist.calibration
    return len(_split(frames)[1]) / len(frames)


def _split(frames: Sequence[Atoms]) -> tuple[list[Atoms], list[Atoms]]:
    """Frames to fit, and frames to choose the ridge."""
    held_out = [atoms for i, atoms in enumerate(frames) if i % HELD_OUT == HELD_OUT - 1]
    return [atoms for i, atoms in enumerate(frames) if i % HELD_OUT != HELD_OUT - 1], held_out


def _calibration_gram(
    merged: Potential,
    calibration_set: CalibrationSet,
    frames: Sequence[Atoms],
    options: ReadoutOptions,
    elements: torch.Tensor,
    *,
    share: float,
) -> Gram:
    """Statistics of frames that make up ``share`` of a specialist's; it weighs a_k / (N_k s_k) per force component."""
    size = len(elements) * (widened(merged).lift.out_features + 1)
    total = Gram.zero(size, 1, device=merged.device)
    rows: list[torch.Tensor] = []
    targets: list[torch.Tensor] = []
    batches = list(chunks(frames, MAX_ATOMS))
    for i, chunk in enumerate(batches):
        row, target = _batch_rows(
            merged,
            calibration_set,
            chunk,
            options,
            elements,
            weight=share / len(frames),
            seed=options.seed + i,
        )
        rows.append(row)
        targets.append(target)
        if sum(map(len, rows)) >= MAX_ROWS or i == len(batches) - 1:
            total += Gram.of(torch.cat(rows), torch.cat(targets))
            rows, targets = [], []
    return total


def _batch_rows(
    merged: Potential,
    calibration_set: CalibrationSet,
    frames: Sequence[Atoms],
    options: ReadoutOptions,
    elements: torch.Tensor,
    *,
    weight: float,
    seed: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and targets of one batch, labelled by the specialist; every frame has the given weight."""
    specialist = calibration_set.specialist
    graphs = [build_graph(atoms, specialist.cutoff, dtype=merged.dtype) for atoms in frames]
    for graph in graphs:
        graph.specialist.fill_(calibration_set.index)
    batch = batch_graphs(graphs).to(merged.device)
    target = predict(specialist.potential.for_inference(), batch)
    n_atoms = torch.bincount(batch.structure_index).to(merged.dtype)
    return readout_rows(
        merged,
        batch,
        target,
        Probes.draw(batch, options.probes, stress_weight=options.stress_weight, seed=seed),
        elements=elements,
        frame_weights=calibration_set.weight * weight / (n_atoms * calibration_set.mean_square_force),
        energy_weight=options.energy_weight,
    )
