"""CHGNet fine-tuned to two crystals of LiPS20, apart and together, on one table of reference energies."""

from pathlib import Path

from ase.calculators.singlepoint import SinglePointCalculator
from lips20_models import BASE_SYSTEMS, SPECIES, STRESS_WEIGHT, SYSTEMS, THEORY, Size, evenly, frame_file
from training_plan import TrainingPlan, model_path, say, trained

from ase_gffmerge import ForceField
from ase_gffmerge.data.readers import read_frames
from ase_gffmerge.inference.predict import predict_frames
from ase_gffmerge.integrations.load import from_vendor
from ase_gffmerge.training.config import TrainConfig
from ase_gffmerge.training.initialization import fit_references

BASE, JOINT = "chgnet", "joint"
REFERENCE_FRAMES = 10
"""Frames per system that tell how the labels' energies differ from CHGNet's."""
FINE_TUNING = Size(hyper={}, frames=200, base_epochs=0, epochs=6, batch_size=2, n_calibration=30)
"""A fine-tuning for two processor cores; energies and forces are still falling at its end."""


def base_model(out: Path) -> ForceField:
    """CHGNet 0.3.0 with reference energies shifted to those of the labels, as a file in ``out``."""
    path = model_path(out, BASE)
    if not path.exists():
        say("shifting the reference energies of CHGNet")
        base = from_vendor("chgnet", "0.3.0", name=BASE, level_of_theory=THEORY)
        for z, shift in reference_shifts(base, out).items():
            base.potential.references[base.species.index(z)] += shift
        base.save(path)
    return ForceField.load(path)


def reference_shifts(base: ForceField, out: Path) -> dict[int, float]:
    """Least-squares energies per element (eV) of what the labels of all four systems have more than the base says."""
    residuals = []
    for system in (*BASE_SYSTEMS, *SYSTEMS):
        frames = read_frames(frame_file(out, system, "train"))
        frames = [frames[i] for i in evenly(range(len(frames)), REFERENCE_FRAMES)]
        predicted = predict_frames(base.potential, frames).energies
        for atoms, energy in zip(frames, predicted, strict=True):
            atoms.calc = SinglePointCalculator(atoms, energy=atoms.get_potential_energy() - energy)
            residuals.append(atoms)
    return fit_references(residuals, SPECIES)


def plan(name: str, out: Path, size: Size) -> TrainingPlan:
    """How a specialist, or the joint reference, is trained."""
    systems = SYSTEMS if name == JOINT else (name,)
    return TrainingPlan(
        name=name,
        training=tuple(frame_file(out, system, "train") for system in systems),
        test=tuple(frame_file(out, system, "test") for system in systems),
        config=TrainConfig(
            epochs=size.epochs,
            batch_size=size.batch_size,
            learning_rate=5e-4,
            ema_decay=0.98,
            stress_weight=STRESS_WEIGHT,
            validation=10,
        ),
        parent=BASE,
        n_calibration=size.n_calibration,
    )


def models(out: Path, size: Size, device: str) -> tuple[list[ForceField], ForceField]:
    """Specialists and the jointly trained model, fine-tuned if they are not there."""
    base_model(out)
    specialists = [trained(plan(name, out, size), out, device=device) for name in SYSTEMS]
    return specialists, trained(plan(JOINT, out, size), out, device=device)
