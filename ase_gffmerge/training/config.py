"""Training options, validated."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, Field, ValidationError

from ase_gffmerge.errors import RecipeError
from ase_gffmerge.storage.documents import STRICT, Seed, explain, read_options


class TrainConfig(BaseModel):
    """Everything that decides the outcome of a training, besides the frames.

    Attributes
    ----------
    model, hyper
        Architecture and its hyper-parameters; default: those of the parent, else PaiNN's.
    epochs, batch_size, learning_rate
        Length, frames per step, and the peak of the one-cycle schedule.
    energy_weight, force_weight, stress_weight
        Weights of the mean absolute errors: eV/atom, eV/Å (norm of the force error), and eV/Å^3.
    gradient_clip
        Largest norm of the gradient.
    ema_decay
        Decay of the exponential moving average of the weights, the average being what is saved.
    validation
        Frames held out of training for the loss curve.
    seed
        Seed of initial weights, split and shuffling.
    core_repulsion
        ``auto``: store a core repulsion that begins below the shortest distances of the training frames, on which it has no
        effect; ``none``: only what the parent has.
    level_of_theory
        Recorded in the file; ``None`` takes the parent's.
    """

    model_config = STRICT

    model: str | None = None
    hyper: dict[str, object] = {}
    epochs: int = Field(default=100, ge=1)
    batch_size: int = Field(default=10, ge=1)
    learning_rate: float = Field(default=2e-3, gt=0)
    energy_weight: float = Field(default=1.0, ge=0)
    force_weight: float = Field(default=1.0, ge=0)
    stress_weight: float = Field(default=1.0, ge=0)
    ema_decay: float = Field(default=0.995, ge=0, lt=1)
    gradient_clip: float = Field(default=10.0, gt=0)
    validation: int = Field(default=50, ge=0)
    seed: Seed = 0
    core_repulsion: Literal["auto", "none"] = "none"
    level_of_theory: str | None = None


def load_config(path: Path | None, **overrides: object) -> TrainConfig:
    """Read a YAML file (or nothing) and apply the overrides that are not ``None``.

    Raises
    ------
    RecipeError
        For unknown keys or impossible values, with a suggestion.
    """
    data = read_options(path, what="the configuration") if path else {}
    merged = data | {key: value for key, value in overrides.items() if value is not None}
    try:
        return TrainConfig(**merged)
    except ValidationError as error:
        raise RecipeError(explain(error, TrainConfig, source=str(path or "training options"))) from None
