"""A foundation model, and specialists fine-tuned from it to a crystal and to a molecule, whose corrections conflict."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from training_plan import TrainingPlan, model_path, say, trained, write_frames

from ase_gffmerge import ForceField
from ase_gffmerge.data.frames import spread, time_block_split
from ase_gffmerge.data.readers import read_frames
from ase_gffmerge.inference.predict import predict_frames
from ase_gffmerge.integrations.load import from_vendor
from ase_gffmerge.training.config import TrainConfig

CRYSTAL, MOLECULE, JOINT = "beta-Li3PS4", "ethanol", "joint"
SYSTEMS = (CRYSTAL, MOLECULE)
ZERO_FRAMES = 20
"""Frames that tell how far the zero of a system's labels is from the model's."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much of everything, for minutes on one core.

    Attributes
    ----------
    vendor, weights
        Whose model it is.
    train, test, calibration
        Frames per system, crystal and molecule: to fine-tune on, to measure errors on, to merge with.
    epochs, batch_size
        Of the fine-tuning, crystal and molecule.
    learning_rate
        Peak of its schedule.
    base_frames
        Structures of different compounds that the base joins a merge with.
    steps
        Of dynamics, for the crystal and for the molecule.
    """

    vendor: str
    weights: str
    train: tuple[int, int]
    test: tuple[int, int]
    calibration: tuple[int, int]
    epochs: tuple[int, int]
    batch_size: tuple[int, int]
    learning_rate: float
    base_frames: int
    steps: tuple[int, int]


SIZES = {
    "chgnet": Size(
        vendor="chgnet",
        weights="0.3.0",
        train=(40, 120),
        test=(20, 100),
        calibration=(4, 12),
        epochs=(6, 12),
        batch_size=(2, 5),
        learning_rate=5e-4,
        base_frames=60,
        steps=(20, 100),
    ),
    "7net-0": Size(
        vendor="sevenn",
        weights="7net-0",
        train=(12, 60),
        test=(8, 40),
        calibration=(2, 10),
        epochs=(4, 8),
        batch_size=(1, 5),
        learning_rate=5e-4,
        base_frames=60,
        steps=(8, 50),
    ),
}


def frame_file(out: Path, system: str, part: str) -> Path:
    """File of labelled frames."""
    return out / "frames" / f"{system}-{part}.extxyz"


def base_model(out: Path, size: Size) -> ForceField:
    """The foundation model, as a file in ``out``."""
    path = model_path(out, "base")
    if not path.exists():
        from_vendor(size.vendor, size.weights, name="base").save(path)
    return ForceField.load(path)


def make_frames(rmd17: Path, lips20: Path, out: Path, size: Size) -> None:
    """Frames of both systems to train and to test on; their energies count from the foundation model's zero.

    Labels of one composition say nothing about reference energies but their sum, so that one shift per system does.
    """
    for i, system in enumerate(SYSTEMS):
        files = [frame_file(out, system, part) for part in ("train", "test")]
        if all(file.exists() for file in files):
            continue
        say(f"frames of {system}")
        if system == CRYSTAL:
            frames = read_frames(lips20 / f"{system}.npz")
            split = time_block_split(len(frames), n_blocks=10, gap=50, fractions=(0.7, 0.0, 0.3))
            parts = [[frames[k] for k in indices] for indices in (split.train, split.test)]
        else:
            parts = [read_frames(rmd17 / f"rmd17_{system}_{part}_01.npz") for part in ("train", "test")]
        chosen = [spread(frames, n) for frames, n in zip(parts, (size.train[i], size.test[i]), strict=True)]
        zero = energy_shift(base_model(out, size), spread(chosen[0], ZERO_FRAMES))
        for file, frames in zip(files, chosen, strict=True):
            write_frames(file, [with_shift(atoms, zero) for atoms in frames])


def energy_shift(base: ForceField, frames: list[Atoms]) -> float:
    """Mean energy (eV) of the model's predictions less that of the labels."""
    labels = [atoms.get_potential_energy() for atoms in frames]
    return float(np.mean(predict_frames(base.potential, frames).energies - np.array(labels)))


def with_shift(atoms: Atoms, shift: float) -> Atoms:
    """A copy whose energy counts from another zero."""
    copy, labels = atoms.copy(), dict(atoms.calc.results)
    energy = labels.pop("energy") + shift
    kept = {key: labels[key] for key in ("forces", "stress") if key in labels}
    copy.calc = SinglePointCalculator(copy, energy=energy, **kept)
    return copy


def plan(name: str, out: Path, size: Size) -> TrainingPlan:
    """How a specialist, or the joint reference, is fine-tuned."""
    systems = SYSTEMS if name == JOINT else (name,)
    k = 0 if name == JOINT else SYSTEMS.index(name)
    return TrainingPlan(
        name=name,
        training=tuple(frame_file(out, system, "train") for system in systems),
        config=TrainConfig(
            epochs=max(size.epochs) if name == JOINT else size.epochs[k],
            batch_size=size.batch_size[k],
            learning_rate=size.learning_rate,
            ema_decay=0.98,
            stress_weight=20.0,
            validation=4,
        ),
        parent="base",
    )


def specialist(name: str, out: Path, size: Size) -> ForceField:
    """A specialist, or the joint reference, fine-tuned if it is not there."""
    base_model(out, size)
    found = trained(plan(name, out, size), out, device="cpu")
    n = size.calibration[0 if name == JOINT else SYSTEMS.index(name)]
    return found.with_calibration(spread(found.calibration, n))
