"""Base and specialists of the LiPS20 benchmark, on frames split by blocks of time."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from training_plan import TrainingPlan, trained, write_frames

from ase_gffmerge import ForceField
from ase_gffmerge.data.frames import time_block_split
from ase_gffmerge.data.readers import read_frames
from ase_gffmerge.training.config import TrainConfig
from ase_gffmerge.training.initialization import fit_references

BASE = "lips20-base"
BASE_SYSTEMS = ("Li7P3S11", "Li4P2S6")
SYSTEMS = ("beta-Li3PS4", "gamma-Li3PS4")
SPECIES = (3, 15, 16)
THEORY = "LiPS20 (DFT)"
STRESS_WEIGHT = 20.0
"""Of a stress component (eV/Å^3) against a force (eV/Å): a melt's stress of 0.01 eV/Å^3 weighs like a force of 0.2."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much of everything.

    Attributes
    ----------
    hyper
        Hyper-parameters of the base.
    frames
        Training frames per system, evenly spaced in the training blocks.
    base_epochs, epochs
        Epochs of the base and of the specialists.
    batch_size
        Frames per step.
    n_blocks, gap
        Blocks of time, and the frames dropped between training and test.
    n_test
        Test frames per system, evenly spaced in the test blocks.
    n_calibration
        Frames per specialist to merge with.
    steps
        Length of the runs of dynamics.
    """

    hyper: dict[str, float]
    frames: int
    base_epochs: int
    epochs: int
    batch_size: int
    n_blocks: int = 10
    gap: int = 50
    n_test: int = 100
    n_calibration: int = 50
    steps: int = 2000


FULL = Size(
    hyper={"channels": 64, "n_blocks": 3, "cutoff": 5.0},
    frames=550,
    base_epochs=100,
    epochs=100,
    batch_size=4,
)
SMALL = Size(
    hyper={"channels": 32, "n_blocks": 3, "cutoff": 4.5}, frames=200, base_epochs=16, epochs=20, batch_size=2
)


def frame_file(out: Path, system: str, part: str) -> Path:
    """File of labelled frames."""
    return out / "frames" / f"{system}-{part}.extxyz"


def make_frames(data: Path, out: Path, size: Size) -> None:
    """Split every system by blocks of time into frames to train on and frames to test on."""
    for system in (*BASE_SYSTEMS, *SYSTEMS):
        if all(frame_file(out, system, part).exists() for part in ("train", "test")):
            continue
        frames = read_frames(data / f"{system}.npz")
        split = time_block_split(len(frames), n_blocks=size.n_blocks, gap=size.gap, fractions=(0.7, 0.0, 0.3))
        for part, indices, n in (("train", split.train, size.frames), ("test", split.test, size.n_test)):
            write_frames(frame_file(out, system, part), [frames[i] for i in evenly(indices, n)])


def evenly(indices: Sequence[int] | np.ndarray, n: int) -> np.ndarray:
    """At most ``n`` of the indices, evenly spaced."""
    return np.asarray(indices)[
        np.unique(np.linspace(0, len(indices) - 1, min(n, len(indices))).round().astype(int))
    ]


def plan(name: str, out: Path, size: Size) -> TrainingPlan:
    """How the base or a specialist is trained; all of them on one table of reference energies."""
    systems = BASE_SYSTEMS if name == BASE else (name,)
    everything = [
        atoms for s in (*BASE_SYSTEMS, *SYSTEMS) for atoms in read_frames(frame_file(out, s, "train"))
    ]
    common = {"batch_size": size.batch_size, "validation": 10, "level_of_theory": THEORY}
    return TrainingPlan(
        name=name,
        training=tuple(frame_file(out, system, "train") for system in systems),
        test=tuple(frame_file(out, system, "test") for system in systems),
        config=TrainConfig(
            hyper=size.hyper, epochs=size.base_epochs, learning_rate=2e-3, stress_weight=0.0, **common
        )
        if name == BASE
        else TrainConfig(epochs=size.epochs, learning_rate=5e-4, stress_weight=STRESS_WEIGHT, **common),
        parent=None if name == BASE else BASE,
        references=fit_references(everything, SPECIES),
        n_calibration=size.n_calibration,
    )


def models(out: Path, size: Size, device: str) -> list[ForceField]:
    """The specialists, trained from their base if they are not there."""
    trained(plan(BASE, out, size), out, device=device)
    return [trained(plan(name, out, size), out, device=device) for name in SYSTEMS]
