"""Training of one specialist on energies, forces and (where present) stresses."""

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms
from torch import Tensor
from torch_geometric.data import Batch, Data

from ase_gffmerge.graphs import batch_graphs, build_graph, predict
from ase_gffmerge.models import Potential
from ase_gffmerge.training.checkpoint import belongs_to, load_checkpoint, save_checkpoint
from ase_gffmerge.training.config import TrainConfig

Callback = Callable[[int, dict[str, float]], None]


@dataclass
class History:
    """Losses of every epoch: ``loss`` on training frames; ``force_mae``, ``energy_mae`` on validation frames."""

    rows: list[dict[str, float]] = field(default_factory=list)


def labelled_graph(atoms: Atoms, potential: Potential, references: np.ndarray) -> Data:
    """Graph with targets: ``energy`` (1,) relative to the references, ``forces`` (n_atoms, 3), ``stress`` (1, 3, 3)."""
    graph = build_graph(atoms, potential.hyper.cutoff, dtype=potential.dtype)
    rows = potential.species_row.cpu().numpy()[atoms.numbers]
    energy = atoms.get_potential_energy() - references[rows].sum()
    graph.energy = torch.tensor([energy], dtype=potential.dtype)
    graph.forces = torch.as_tensor(atoms.get_forces(), dtype=potential.dtype)
    has_stress = atoms.cell.rank == 3 and atoms.calc is not None and "stress" in atoms.calc.results
    stress = atoms.get_stress(voigt=False) if has_stress else np.full((3, 3), np.nan)
    graph.stress = torch.as_tensor(stress, dtype=potential.dtype)[None]
    return graph


def loss_terms(potential: Potential, batch: Batch, config: TrainConfig) -> Tensor:
    """Weighted mean absolute errors of energy per atom, force vectors (2-norm) and stress components."""
    prediction = predict(potential, batch, differentiable=True)
    n_atoms = torch.bincount(batch.batch, minlength=len(batch.energy))
    rows = potential.species_row[batch.atomic_numbers]
    shift = torch.zeros_like(prediction.energy).index_add(0, batch.batch, potential.references[rows])
    energy = ((prediction.energy - shift).to(batch.energy.dtype) - batch.energy).abs() / n_atoms
    forces = (prediction.forces - batch.forces).square().sum(dim=-1).add(1e-12).sqrt()
    loss = config.energy_weight * energy.mean() + config.force_weight * forces.mean()
    labelled = torch.isfinite(batch.stress).all(dim=(1, 2))
    if config.stress_weight and labelled.any():
        stress = prediction.strain_derivative[labelled] / torch.linalg.det(batch.cell[labelled]).abs()[:, None, None]
        loss = loss + config.stress_weight * (stress - batch.stress[labelled]).abs().mean()
    return loss


def validate(potential: Potential, graphs: Sequence[Data], batch_size: int) -> dict[str, float]:
    """Force MAE (eV/Å) and energy MAE (eV/atom) over labelled graphs."""
    forces, energies = [], []
    for start in range(0, len(graphs), batch_size):
        batch = batch_graphs(graphs[start : start + batch_size]).to(potential.device)
        prediction = predict(potential, batch)
        rows = potential.species_row[batch.atomic_numbers]
        shift = torch.zeros_like(prediction.energy).index_add(0, batch.batch, potential.references[rows])
        n_atoms = torch.bincount(batch.batch)
        forces.append((prediction.forces - batch.forces).abs().flatten())
        energies.append((prediction.energy - shift - batch.energy).abs() / n_atoms)
    return {"force_mae": float(torch.cat(forces).mean()), "energy_mae": float(torch.cat(energies).mean())}


def shuffled_batches(graphs: Sequence[Data], config: TrainConfig, epoch: int) -> Iterator[Batch]:
    """Batches in an order that depends on seed and epoch alone, so that a resumed run repeats it."""
    order = np.random.default_rng([config.seed, epoch]).permutation(len(graphs))
    for start in range(0, len(order), config.batch_size):
        yield batch_graphs([graphs[i] for i in order[start : start + config.batch_size]])


@torch.no_grad()
def update_average(average: Potential, potential: Potential, decay: float) -> None:
    """Exponential moving average of all weights, in place."""
    for mean, value in zip(average.parameters(), potential.parameters(), strict=True):
        mean.lerp_(value, 1 - decay)


def fit(
    potential: Potential,
    frames: Sequence[Atoms],
    validation: Sequence[Atoms],
    config: TrainConfig,
    *,
    checkpoint: Path | None = None,
    run: dict[str, Any] | None = None,
    callback: Callback | None = None,
) -> tuple[Potential, History]:
    """Train ``potential`` and return the moving average of its weights.

    Parameters
    ----------
    potential
        Trained in place; on its own device.
    frames, validation
        Labelled structures.
    config
        Options.
    checkpoint
        File rewritten after every epoch; an existing one of the same ``run`` is continued.
    run
        JSON-able identity of this training.
    callback
        Called after every epoch with its number (from 1) and a dictionary of losses.
    """
    references = potential.references.cpu().numpy()
    graphs = [labelled_graph(atoms, potential, references) for atoms in frames]
    held_out = [labelled_graph(atoms, potential, references) for atoms in validation]
    average = deepcopy(potential)
    optimizer = torch.optim.Adam(potential.parameters(), lr=config.learning_rate)
    steps = -(-len(graphs) // config.batch_size)
    history, start = History(), 0
    if checkpoint and belongs_to(checkpoint, run or {}):
        saved = load_checkpoint(checkpoint, model=potential, average=average, optimizer=optimizer)
        history, start = History(saved["history"]), saved["epoch"]
        for epoch, row in enumerate(history.rows if callback else (), start=1):
            callback(epoch, row)
    for epoch in range(start, config.epochs):
        row = _train_epoch(potential, average, optimizer, graphs, config, epoch, steps)
        if held_out:
            row |= validate(average, held_out, config.batch_size)
        history.rows.append(row)
        if checkpoint:
            metadata = {"run": run or {}, "history": history.rows, "epoch": epoch + 1}
            save_checkpoint(checkpoint, model=potential, average=average, optimizer=optimizer, metadata=metadata)
        if callback:
            callback(epoch + 1, row)
    return average.eval().requires_grad_(False), history


def _train_epoch(
    potential: Potential,
    average: Potential,
    optimizer: torch.optim.Optimizer,
    graphs: Sequence[Data],
    config: TrainConfig,
    epoch: int,
    steps: int,
) -> dict[str, float]:
    losses = []
    for step, batch in enumerate(shuffled_batches(graphs, config, epoch)):
        for group in optimizer.param_groups:
            group["lr"] = one_cycle((epoch * steps + step) / (config.epochs * steps), config.learning_rate)
        loss = loss_terms(potential, batch.to(potential.device), config)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(potential.parameters(), config.gradient_clip)
        optimizer.step()
        update_average(average, potential, min(config.ema_decay, (1 + epoch * steps + step) / (10 + epoch * steps + step)))
        losses.append(float(loss.detach()))
    return {"loss": float(np.mean(losses))}


def one_cycle(progress: float, peak: float, *, warm_up: float = 0.1, start: float = 0.04, end: float = 1e-3) -> float:
    """Learning rate of the one-cycle policy (arXiv 1708.07120): cosine up to ``peak``, cosine down to nearly zero.

    Parameters
    ----------
    progress
        Fraction of the training done, 0 to 1.
    peak
        Largest rate.
    warm_up
        Fraction of the training spent rising.
    start, end
        First and last rate as fractions of the peak.
    """
    if progress < warm_up:
        low, phase = start, 0.5 * (1 - np.cos(np.pi * progress / warm_up))
    else:
        low, phase = end, 0.5 * (1 + np.cos(np.pi * (progress - warm_up) / (1 - warm_up)))
    return float(peak * (low + (1 - low) * phase))
