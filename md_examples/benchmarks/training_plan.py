"""How a model of a benchmark is trained, and the one place where it is: trained once, loaded ever after."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ase import Atoms
from ase.io import write

from ase_gffmerge import ForceField
from ase_gffmerge.training.config import TrainConfig
from ase_gffmerge.training.train import train


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """A base, or a specialist that descends from one.

    Attributes
    ----------
    name
        Name of the model, and of its file.
    training, test
        Files of labelled frames to train on, and for the errors recorded in the model's file.
    config
        Options of the training.
    parent
        Name of the model to start from: one in the same folder, or a bundled one.
    references
        Energy per element in eV; default: those of the parent, else a least-squares fit.
    n_calibration
        Training frames kept, unlabelled, for merging.
    """

    name: str
    training: tuple[Path, ...]
    config: TrainConfig
    test: tuple[Path, ...] = ()
    parent: str | None = None
    references: Mapping[int, float] | None = None
    n_calibration: int = 100


def say(text: str) -> None:
    """Write a line of progress."""
    print(text, file=sys.stderr, flush=True)


def model_path(folder: Path, name: str) -> Path:
    """File of a model."""
    return folder / f"{name}.safetensors"


def write_frames(path: Path, frames: Sequence[Atoms]) -> None:
    """Write an extxyz file that is complete as soon as it exists."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    write(unfinished, frames, format="extxyz")
    unfinished.replace(path)


def parent_model(name: str | None, folder: Path) -> ForceField | None:
    """The model of that name in ``folder``, else the bundled one."""
    if name is None:
        return None
    own = model_path(folder, name)
    return ForceField.load(own if own.exists() else name)


def trained(plan: TrainingPlan, folder: Path, *, device: str = "auto") -> ForceField:
    """Train a model unless ``folder`` holds it; a killed training continues from its last epoch."""
    path = model_path(folder, plan.name)
    if not path.exists():
        say(f"training {path}")
        train(
            plan.training,
            path,
            plan.config,
            init=parent_model(plan.parent, folder),
            references=plan.references,
            n_calibration=plan.n_calibration,
            test=plan.test,
            device=device,
            callback=lambda epoch, losses: say(f"{plan.name} {epoch}/{plan.config.epochs} {_brief(losses)}"),
        )
    return ForceField.load(path)


def _brief(losses: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.4f}" for name, value in losses.items())
