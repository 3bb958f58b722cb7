"""Training of one specialist on energies, forces and (where present) stresses."""

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms
from torch_geometric.data import Batch, Data

from ase_gffmerge.errors import GFFMergeError
from ase_gffmerge.graphs import batch_graphs
from ase_gffmerge.models import Potential
from ase_gffmerge.training.checkpoint import can_resume, load_checkpoint, save_checkpoint
from ase_gffmerge.training.config import TrainConfig
from ase_gffmerge.training.losses import labelled_graph, loss_terms, validate

Callback = Callable[[int, dict[str, float]], None]


class TrainingError(GFFMergeError):
    """A training cannot go on: its loss or gradient is not finite."""


@dataclass
class History:
    """Losses of every epoch: ``loss`` (training), ``force_mae`` and ``energy_mae`` (validation)."""

    rows: list[dict[str, float]] = field(default_factory=list)


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
        Called after every epoch with its number (from 1) and a dictionary of losses; a resumed run
        begins with the epoch after its checkpoint.

    Raises
    ------
    TrainingError
        When loss or gradient become NaN or infinite; the last good checkpoint stays.
    """
    references = potential.references.cpu().numpy()
    graphs = [labelled_graph(atoms, potential, references) for atoms in frames]
    held_out = [labelled_graph(atoms, potential, references) for atoms in validation]
    average = deepcopy(potential)
    optimizer = torch.optim.Adam(potential.parameters(), lr=config.learning_rate)
    steps = -(-len(graphs) // config.batch_size)
    history, start = History(), 0
    if checkpoint and can_resume(checkpoint, run or {}):
        saved = load_checkpoint(checkpoint, model=potential, average=average, optimizer=optimizer)
        history, start = History(saved["history"]), saved["epoch"]
    for epoch in range(start, config.epochs):
        row = _train_epoch(potential, average, optimizer, graphs, config, epoch, steps)
        if held_out:
            row |= validate(average, held_out, config.batch_size)
        history.rows.append(row)
        if checkpoint:
            metadata = {"run": run or {}, "history": history.rows, "epoch": epoch + 1}
            save_checkpoint(
                checkpoint, model=potential, average=average, optimizer=optimizer, metadata=metadata
            )
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
        norm = torch.nn.utils.clip_grad_norm_(potential.parameters(), config.gradient_clip)
        if not torch.isfinite(loss.detach() + norm):
            raise diverged(epoch + 1, float(loss.detach()), config)
        optimizer.step()
        done = epoch * steps + step
        update_average(average, potential, min(config.ema_decay, (1 + done) / (10 + done)))
        losses.append(float(loss.detach()))
    return {"loss": float(np.mean(losses))}


def diverged(epoch: int, loss: float, config: TrainConfig) -> TrainingError:
    """Explain a loss or gradient that is not finite."""
    return TrainingError(
        f"the training diverged in epoch {epoch} of {config.epochs} (the loss, {loss:g}, or its gradient is "
        f"not finite); lower learning_rate (now {config.learning_rate:g}) or gradient_clip (now "
        f"{config.gradient_clip:g}), and look for overlapping atoms and extreme forces in the frames"
    )


def one_cycle(
    progress: float, peak: float, *, warm_up: float = 0.1, start: float = 0.04, end: float = 1e-3
) -> float:
    """Learning rate of the one-cycle policy (arXiv 1708.07120): cosine up to ``peak``, cosine down to zero.

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
