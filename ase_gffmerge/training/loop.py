"""The loop of every training: one-cycle Adam, moving average, checkpoints, early stop."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ase_gffmerge.errors import TrainingError
from ase_gffmerge.graphs import batch_graphs
from ase_gffmerge.models import Potential
from ase_gffmerge.runtime.devices import memory_errors
from ase_gffmerge.training.checkpoint import History, TrainingState, can_resume, stale
from ase_gffmerge.training.config import TrainConfig
from ase_gffmerge.training.loss import LabeledGraph, loss_terms, validate

Callback = Callable[[int, dict[str, float]], None]
Loss = Callable[[Potential, LabeledGraph], Tensor]


def shuffled_batches(
    graphs: Sequence[LabeledGraph], config: TrainConfig, epoch: int
) -> Iterator[LabeledGraph]:
    """Batches with every specialist's share of graphs, in an order that depends on seed and epoch alone."""
    rng = np.random.default_rng([config.seed, epoch])
    owner = np.array([int(graph.specialist[0]) for graph in graphs])
    place = np.empty(len(graphs))
    for k in np.unique(owner):
        (own,) = np.nonzero(owner == k)
        place[own[rng.permutation(len(own))]] = (np.arange(len(own)) + 0.5) / len(own)
    order = np.argsort(place, kind="stable")
    for start in range(0, len(order), config.batch_size):
        yield batch_graphs([graphs[i] for i in order[start : start + config.batch_size]])


@torch.no_grad()
def update_average(average: Potential, potential: Potential, decay: float) -> None:
    """Exponential moving average of all weights, in place."""
    for mean, value in zip(average.parameters(), potential.parameters(), strict=True):
        mean.lerp_(value, 1 - decay)


def fit(
    potential: Potential,
    training: Sequence[LabeledGraph],
    validation: Sequence[LabeledGraph],
    config: TrainConfig,
    *,
    loss: Loss | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    patience: int | None = None,
    checkpoint: Path | None = None,
    run: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
) -> tuple[Potential, History]:
    """Train ``potential`` and return the moving average of its weights.

    Parameters
    ----------
    potential
        Trained in place; on its own device.
    training, validation
        Graphs with targets (on the CPU).
    config
        Options.
    loss
        Scalar loss of a batch; default: :func:`~ase_gffmerge.training.loss.loss_terms`.
    optimizer
        Fresh optimiser of the parameters; a group's ``lr_scale`` multiplies the schedule's rate. Default: Adam.
    patience
        Return the average with the least validation error, the start included, and stop when that many epochs in a
        row did not lower it; default: all epochs, and the last average.
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
    DeviceMemoryError
        When a batch does not fit into the device's memory.
    """
    loss = loss or (lambda model, batch: loss_terms(model, batch, config))
    optimizer = optimizer or torch.optim.Adam(potential.parameters(), lr=config.learning_rate)
    state = TrainingState.begin(potential, optimizer, keep_best=patience is not None)
    history = state.history
    if checkpoint and can_resume(checkpoint, run or {}):
        state.load(checkpoint)
    elif patience is not None:
        history.start.update(validate(potential, validation, config.batch_size))
    while len(history.rows) < config.epochs and not (patience and stale(history, config, patience)):
        with memory_errors(
            f"a batch of {config.batch_size} frames",
            device=potential.device,
            remedy="use a smaller batch_size",
        ):
            row = _train_epoch(state, training, loss, config, epoch=len(history.rows))
        if validation:
            row |= validate(state.average, validation, config.batch_size)
        state.add(row, config)
        if checkpoint:
            state.save(checkpoint, run or {})
        if callback:
            callback(len(history.rows), row)
    return state.result, history


def _train_epoch(
    state: TrainingState, graphs: Sequence[LabeledGraph], loss: Loss, config: TrainConfig, *, epoch: int
) -> dict[str, float]:
    potential, optimizer = state.potential, state.optimizer
    steps, losses = -(-len(graphs) // config.batch_size), []
    for step, batch in enumerate(shuffled_batches(graphs, config, epoch)):
        done = epoch * steps + step
        rate = one_cycle(done / (config.epochs * steps), config.learning_rate)
        for group in optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)
        value = loss(potential, batch.to(potential.device))
        optimizer.zero_grad()
        value.backward()
        norm = torch.nn.utils.clip_grad_norm_(potential.parameters(), config.gradient_clip)
        if not torch.isfinite(value.detach() + norm):
            raise diverged(epoch + 1, float(value.detach()), config)
        optimizer.step()
        update_average(state.average, potential, min(config.ema_decay, (1 + done) / (10 + done)))
        losses.append(float(value.detach()))
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
