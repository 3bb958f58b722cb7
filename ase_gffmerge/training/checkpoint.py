"""What changes during a training (weights, their average, optimizer moments, losses), in memory and on disk.

A checkpoint is one safetensors file, written atomically after every epoch; a training continued from it is bitwise the same.
"""

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ase_gffmerge.errors import CheckpointWarning, FileFormatError, first_line
from ase_gffmerge.models import Potential
from ase_gffmerge.storage.tensor_file import read_file, read_metadata, write_file
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
    history: History = field(default_factory=History)

    @property
    def modules(self) -> dict[str, nn.Module]:
        """Weights by name in a checkpoint."""
        kept = {"model": self.potential, "average": self.average, "best": self.best}
        return {name: module for name, module in kept.items() if module is not None}

    @property
    def result(self) -> Potential:
        """The weights to use."""
        return (self.average if self.best is None else self.best).eval().requires_grad_(False)

    def save(self, path: Path, run: Mapping[str, object]) -> None:
        """Write a checkpoint of the training identified by ``run``."""
        metadata = {
            "run": run,
            "epoch": len(self.history.rows),
            "history": self.history.rows,
            "start": self.history.start,
        }
        _save_checkpoint(path, modules=self.modules, optimizer=self.optimizer, metadata=metadata)

    def load(self, path: Path) -> None:
        """Continue from a checkpoint."""
        saved = _load_checkpoint(path, modules=self.modules, optimizer=self.optimizer)
        self.history.rows[:] = saved["history"]
        self.history.start.update(saved["start"])

    def add(self, row: dict[str, float], config: TrainConfig) -> None:
        """Enter the losses of an epoch, and keep its weights if they are the best."""
        self.history.rows.append(row)
        if self.best is not None and _improved(_validation_scores(self.history, config)):
            self.best.load_state_dict(self.average.state_dict())


def _validation_scores(history: History, config: TrainConfig) -> list[float]:
    """Weighted sum of energy and force MAE at the start and after every epoch."""
    return [
        config.force_weight * row["force_mae"] + config.energy_weight * row["energy_mae"]
        for row in (history.start, *history.rows)
        if "force_mae" in row
    ]


def _improved(scores: Sequence[float]) -> bool:
    """Whether the last score is lower than all before it."""
    return scores[-1] < min(scores[:-1])


def stale(history: History, config: TrainConfig, patience: int) -> bool:
    """Whether the last epochs brought nothing better than what was there before them.

    Parameters
    ----------
    history
        Validation errors, those of the start included.
    config
        Weights of energies and forces.
    patience
        How many epochs.
    """
    scores = _validation_scores(history, config)
    return len(scores) > patience and min(scores[-patience:]) >= min(scores[:-patience])


def checkpoint_path(out: Path) -> Path:
    """Where the checkpoint of the specialist file ``out`` lies: beside it."""
    return out.with_name(f"{out.name.removesuffix('.safetensors')}.checkpoint.safetensors")


def _save_checkpoint(
    path: Path,
    *,
    modules: Mapping[str, nn.Module],
    optimizer: torch.optim.Optimizer,
    metadata: dict[str, object],
) -> None:
    """Write the weights of several modules by name, the optimiser's moments and JSON-able ``metadata``."""
    tensors: dict[str, Tensor] = {
        f"{kind}.{name}": value.clone()
        for kind, module in modules.items()
        for name, value in module.state_dict().items()
    }
    state = optimizer.state_dict()["state"]
    tensors |= {f"optimizer.{i}.{key}": value for i, entry in state.items() for key, value in entry.items()}
    write_file(path, {"checkpoint": metadata}, tensors)


def _load_checkpoint(
    path: Path, *, modules: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Restore what :func:`save_checkpoint` wrote and return its metadata."""
    metadata, tensors = read_file(path)
    try:
        for kind, module in modules.items():
            prefix = f"{kind}."
            module.load_state_dict(
                {
                    name.removeprefix(prefix): value
                    for name, value in tensors.items()
                    if name.startswith(prefix)
                }
            )
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            if name.startswith("optimizer."):
                _, index, key = name.split(".")
                state.setdefault(int(index), {})[key] = value
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
        return metadata["checkpoint"]
    except (RuntimeError, KeyError, ValueError) as error:
        raise FileFormatError(
            f"{path} does not belong to this training ({first_line(error)}); delete it"
        ) from None


def saved_run(path: Path | None) -> dict[str, object]:
    """Identity of the run that a checkpoint belongs to; empty where there is none that can be read."""
    try:
        return dict(read_metadata(path)["checkpoint"]["run"]) if path and path.exists() else {}
    except (FileFormatError, KeyError, TypeError, ValueError):
        return {}


def can_resume(path: Path, run: Mapping[str, object]) -> bool:
    """Whether ``path`` is an intact checkpoint of a run with exactly these options and frames.

    A checkpoint of another run, or a damaged one, is renamed to ``*.old.safetensors`` with a
    :class:`CheckpointWarning` that says what differs: it is neither continued nor lost.
    """
    if not path.exists():
        return False
    try:
        saved = read_file(path)[0]["checkpoint"]["run"]
        difference = differences(saved, run)
    except (FileFormatError, KeyError, TypeError) as error:
        difference = f"it cannot be read ({error})"
    if not difference:
        return True
    old = path.with_name(f"{path.name.removesuffix('.safetensors')}.old.safetensors")
    path.replace(old)
    warnings.warn(
        f"{path} is not continued: {difference}. Training starts afresh; it is kept as {old.name}",
        CheckpointWarning,
        stacklevel=2,
    )
    return False


def differences(saved: Mapping[str, object], run: Mapping[str, object]) -> str:
    """Which options of two run identities differ, as text; empty when none does."""
    before, now = _flat(saved), _flat(run)
    changed = [
        f"{key} was {before.get(key, 'not set')}, is {now.get(key, 'not set')}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key, ...) != now.get(key, ...)
    ]
    return "; ".join(text if len(text) < 120 else f"{text.split(' was ')[0]} differs" for text in changed)


def _flat(tree: Mapping[str, object], prefix: str = "") -> dict[str, str]:
    """Nested mappings as one level of dotted keys with JSON values."""
    flat: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = json.dumps(value, sort_keys=True)
    return flat
