"""The loop of every training: one-cycle Adam, moving average, checkpoints, early stop.

Processes that share the work (:mod:`ase_gffmerge.runtime.distributed`) all have the same batches, and each takes a part of
every one: the parts' gradients add up to that of the batch.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.optim.lr_scheduler import OneCycleLR

from ase_gffmerge.errors import TrainingError
from ase_gffmerge.graphs import batch_graphs
from ase_gffmerge.models import Potential
from ase_gffmerge.runtime.devices import chunks, memory_errors
from ase_gffmerge.runtime.distributed import add_up_gradients, by_first, dealt
from ase_gffmerge.runtime.memory import freed_memory_kept
from ase_gffmerge.runtime.progress import Progress, no_progress
from ase_gffmerge.training.checkpoint import History, TrainingState, can_resume, stale
from ase_gffmerge.training.config import TrainConfig
from ase_gffmerge.training.loss import LabeledGraph, loss_terms, validate

PROGRESS_EVERY = 10
"""Steps between reports of progress."""

Callback = Callable[[int, dict[str, float]], None]
Loss = Callable[[Potential, LabeledGraph, LabeledGraph], Tensor]
"""``loss(potential, part, whole)``: what a part of a batch adds to the loss of the whole batch."""


def _shuffled_batches(
    graphs: Sequence[LabeledGraph], config: TrainConfig, epoch: int
) -> Iterator[list[LabeledGraph]]:
    """Batches with every specialist's share of graphs, in an order that depends on seed and epoch alone."""
    rng = np.random.default_rng([config.seed, epoch])
    owner = np.array([int(graph.specialist[0]) for graph in graphs])
    place = np.empty(len(graphs))
    for k in np.unique(owner):
        (own,) = np.nonzero(owner == k)
        place[own[rng.permutation(len(own))]] = (np.arange(len(own)) + 0.5) / len(own)
    order = np.argsort(place, kind="stable")
    for start in range(0, len(order), config.batch_size):
        yield [graphs[i] for i in order[start : start + config.batch_size]]


def one_cycle(optimizer: torch.optim.Optimizer, peak: float, *, steps: int, done: int = 0) -> OneCycleLR:
    """One-cycle policy (arXiv 1708.07120): cosine from 4 % of the peak up to it, then down to 0.1 %.

    Parameters
    ----------
    optimizer
        A group's ``lr_scale`` multiplies its rate.
    peak
        Largest rate, reached after a tenth of the steps.
    steps
        Of the whole training.
    done
        Steps that a continued training has behind it.
    """
    schedule = OneCycleLR(
        optimizer,
        max_lr=[peak * group.get("lr_scale", 1.0) for group in optimizer.param_groups],
        total_steps=steps + 1,  # so that rises of less than a step are possible, too
        pct_start=(0.1 * steps + 1) / (steps + 1),
        cycle_momentum=False,
        div_factor=25,
        final_div_factor=40,
    )
    if done:
        schedule.load_state_dict({**schedule.state_dict(), "last_epoch": done - 1, "_step_count": done})
        schedule.step()
    return schedule


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
    run: Mapping[str, object] | None = None,
    callback: Callback | None = None,
    max_edges: int | None = None,
    progress: Progress = no_progress,
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
        Fresh optimizer of the parameters, see :func:`one_cycle`. Default: Adam.
    patience
        Return the average with the least validation error, the start included, and stop when that many epochs in a
        row did not lower it; default: all epochs, and the last average.
    checkpoint
        File rewritten after every epoch; an existing one of the same ``run`` is continued. Where processes share the work,
        the first writes it and all read it.
    run
        JSON-able identity of this training.
    callback
        Called after every epoch with its number (from 1) and a dictionary of losses; a resumed run
        begins with the epoch after its checkpoint.
    max_edges
        Edges that are evaluated at once: the gradient of a batch with more is added up over parts of whole structures, the
        same up to round-off. Default: every batch at once.
    progress
        Called now and then with the fraction (0 to 1) of all epochs that is done, and the last validation error.

    Raises
    ------
    TrainingError
        When loss or gradient become NaN or infinite; the last good checkpoint stays.
    DeviceMemoryError
        When a batch does not fit into the device's memory.
    """
    loss = loss or (lambda model, batch, whole: loss_terms(model, batch, config, whole=whole))
    optimizer = optimizer or torch.optim.Adam(potential.parameters(), lr=config.learning_rate)
    average = deepcopy(potential).requires_grad_(False)
    best = deepcopy(potential) if patience is not None else None
    state = TrainingState(potential, average, best, optimizer)
    history = state.history
    if checkpoint and by_first(partial(can_resume, checkpoint, run or {})):
        state.load(checkpoint)
    elif patience is not None:
        history.start.update(validate(potential, validation, config.batch_size))
    steps = -(-len(training) // config.batch_size)
    schedule = one_cycle(
        optimizer, config.learning_rate, steps=config.epochs * steps, done=len(history.rows) * steps
    )
    while len(history.rows) < config.epochs and not (patience and stale(history, config, patience)):
        with (
            freed_memory_kept(),
            memory_errors(
                f"a batch of {config.batch_size} frames",
                device=potential.device,
                remedy="use a smaller batch_size",
            ),
        ):
            row = _train_epoch(state, schedule, training, loss, config, max_edges, progress)
        if validation:
            row |= validate(state.average, validation, config.batch_size)
        state.add(row, config)
        if checkpoint:
            by_first(partial(state.save, checkpoint, run or {}))
        if callback:
            callback(len(history.rows), row)
    return state.result, history


def _train_epoch(
    state: TrainingState,
    schedule: OneCycleLR,
    graphs: Sequence[LabeledGraph],
    loss: Loss,
    config: TrainConfig,
    max_edges: int | None,
    progress: Progress,
) -> dict[str, float]:
    potential, optimizer, epoch = state.potential, state.optimizer, len(state.history.rows)
    losses, share = list[float](), config.batch_size / len(graphs)
    parameters, averages = tuple(potential.parameters()), tuple(state.average.parameters())
    before = epoch * -(-len(graphs) // config.batch_size)
    for batch in _shuffled_batches(graphs, config, epoch):
        if len(losses) % PROGRESS_EVERY == 0:
            done = (epoch + len(losses) * share) / config.epochs
            progress(done, _where(state.history, epoch + 1, config.epochs))
        optimizer.zero_grad()
        value = _gradient(potential, batch, loss, max_edges)
        norm = torch.nn.utils.clip_grad_norm_(parameters, config.gradient_clip)
        if not torch.isfinite(norm + value):
            raise _diverged(epoch + 1, value, config)
        optimizer.step()
        schedule.step()
        losses.append(value)
        n = before + len(losses)  # of short memory in the first steps
        with torch.no_grad():
            torch._foreach_lerp_(averages, parameters, 1 - min(config.ema_decay, n / (9 + n)))
    return {"loss": float(np.mean(losses))}


def _gradient(
    potential: Potential, graphs: Sequence[LabeledGraph], loss: Loss, max_edges: int | None
) -> float:
    """Give the parameters the gradient of the loss of a batch; the loss."""
    whole, value = batch_graphs(graphs), 0.0
    own = dealt(graphs, size=_n_edges)
    groups = [own] if own else []
    if max_edges is not None and sum(map(_n_edges, own)) > max_edges:
        groups = list(chunks(own, max_edges, size=_n_edges))
    for group in groups:
        part = whole if len(group) == len(graphs) else batch_graphs(group)
        term = loss(potential, part.to(potential.device), whole)
        term.backward()
        value += float(term.detach())
    return add_up_gradients(potential.parameters(), value)


def _n_edges(graph: LabeledGraph) -> int:
    return graph.n_edges


def _where(history: History, epoch: int, epochs: int) -> str:
    """The epoch, and the validation error before it where there is one."""
    last = (history.rows or [history.start])[-1].get("force_mae")
    return f"epoch {epoch} of {epochs}" + (f", {1000 * last:.0f} meV/Å" if last is not None else "")


def _diverged(epoch: int, loss: float, config: TrainConfig) -> TrainingError:
    """Explain a loss or gradient that is not finite."""
    return TrainingError(
        f"the training diverged in epoch {epoch} of {config.epochs} (the loss, {loss:g}, or its gradient is "
        f"not finite); lower learning_rate (now {config.learning_rate:g}) or gradient_clip (now "
        f"{config.gradient_clip:g}), and look for overlapping atoms and extreme forces in the frames"
    )
