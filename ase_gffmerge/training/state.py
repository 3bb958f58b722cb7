"""What changes during a training: weights, their average, the best ones, moments and losses."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch

from ase_gffmerge.models import Potential
from ase_gffmerge.training.checkpoint import load_checkpoint, save_checkpoint
from ase_gffmerge.training.config import TrainConfig


@dataclass
class History:
    """Losses of every epoch: ``loss`` (training), ``force_mae`` and ``energy_mae`` (validation).

    ``start`` holds the validation errors before the first epoch where the best weights are kept, else nothing.
    """

    rows: list[dict[str, float]] = field(default_factory=list)
    start: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainingState:
    """All that changes during a training, and so all that a checkpoint holds.

    Attributes
    ----------
    potential, average
        Weights in training, and their moving average.
    best
        The average with the least validation error so far; ``None`` where the last one counts.
    optimizer, history
        Moments of the optimiser, losses so far.
    """

    potential: Potential
    average: Potential
    best: Potential | None
    optimizer: torch.optim.Optimizer
    history: History

    @classmethod
    def begin(cls, potential: Potential, optimizer: torch.optim.Optimizer, *, keep_best: bool) -> Self:
        """State before the first epoch."""
        best = deepcopy(potential) if keep_best else None
        return cls(potential, deepcopy(potential), best, optimizer, History())

    @property
    def modules(self) -> dict[str, Potential]:
        """Weights by name in a checkpoint."""
        kept = {"model": self.potential, "average": self.average, "best": self.best}
        return {name: module for name, module in kept.items() if module is not None}

    @property
    def result(self) -> Potential:
        """The weights to use."""
        return (self.average if self.best is None else self.best).eval().requires_grad_(False)

    def save(self, path: Path, run: Mapping[str, Any]) -> None:
        """Write a checkpoint of the training identified by ``run``."""
        metadata = {
            "run": run,
            "epoch": len(self.history.rows),
            "history": self.history.rows,
            "start": self.history.start,
        }
        save_checkpoint(path, modules=self.modules, optimizer=self.optimizer, metadata=metadata)

    def load(self, path: Path) -> None:
        """Continue from a checkpoint."""
        saved = load_checkpoint(path, modules=self.modules, optimizer=self.optimizer)
        self.history.rows[:] = saved["history"]
        self.history.start.update(saved["start"])

    def add(self, row: dict[str, float], config: TrainConfig) -> None:
        """Enter the losses of an epoch, and keep its weights if they are the best."""
        self.history.rows.append(row)
        if self.best is not None and improved(validation_scores(self.history, config)):
            self.best.load_state_dict(self.average.state_dict())


def validation_scores(history: History, config: TrainConfig) -> list[float]:
    """Weighted sum of energy and force MAE at the start and after every epoch."""
    return [
        config.force_weight * row["force_mae"] + config.energy_weight * row["energy_mae"]
        for row in (history.start, *history.rows)
        if "force_mae" in row
    ]


def improved(scores: Sequence[float]) -> bool:
    """Whether the last score is lower than all before it."""
    return scores[-1] < min(scores[:-1])


def stale(history: History, config: TrainConfig, patience: int) -> bool:
    """Whether the last ``patience`` epochs brought nothing better than what was there before them."""
    scores = validation_scores(history, config)
    return len(scores) > patience and min(scores[-patience:]) >= min(scores[:-patience])
