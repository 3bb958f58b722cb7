"""Methods that train come closer to the specialists than what they start from."""

from dataclasses import replace

import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator

from ase_gffmerge.forcefield.force_field import Specialist
from ase_gffmerge.inference.metrics import predict_frames
from ase_gffmerge.merging.distil_options import DistilOptions
from ase_gffmerge.methods import METHODS, Mixture, Need, Outcome
from ase_gffmerge.methods import trained as training
from ase_gffmerge.training.config import TrainConfig


def run(name: str, mixture: Mixture) -> Outcome:
    steps: list[float] = []
    outcome = METHODS[name].run(mixture, lambda fraction, text: steps.append(fraction))
    assert steps == sorted(steps)
    assert all(0 <= step <= 1 for step in steps)
    return outcome


def disagreement(outcome: Outcome, mixture: Mixture) -> float:
    """Mean absolute difference of forces, eV/Å, the mean over the specialists."""
    errors = []
    for k, s in enumerate(mixture.specialists):
        ours, theirs = (predict_frames(p, s.calibration) for p in (outcome.potential(k), s.potential))
        errors.append(np.abs(np.concatenate(ours.forces) - np.concatenate(theirs.forces)).mean())
    return float(np.mean(errors))


def labelled(specialist: Specialist) -> list[Atoms]:
    """Calibration frames with the specialist's predictions as labels."""
    frames = [atoms.copy() for atoms in specialist.calibration]
    predicted = predict_frames(specialist.potential, frames)
    for atoms, energy, forces in zip(frames, predicted.energies, predicted.forces, strict=True):
        atoms.calc = SinglePointCalculator(atoms, energy=float(energy), forces=forces)
    return frames


def test_needs() -> None:
    distill, joint = METHODS["distill"], METHODS["joint"]
    assert distill.trains
    assert joint.trains
    assert distill.needs == {Need.FRAMES}
    assert joint.needs == {Need.BASE, Need.LABELS}


def test_distill(make_mixture, architecture, monkeypatch) -> None:
    training_options = {"epochs": 10, "batch_size": 3, "learning_rate": 2e-2, "patience": 10}
    quick = DistilOptions(**training_options, copies=3, temperature=0.0, force_weight=1000.0)
    monkeypatch.setattr(training, "DistilOptions", lambda: quick)
    mixture = make_mixture(architecture, 2, frames=5)
    outcome = run("distill", mixture)
    assert outcome.settings == {"epochs": 10, "learning rate": 2e-2}
    assert outcome.potentials[0].hyper.readout_width == 0
    assert disagreement(outcome, mixture) < 0.8 * disagreement(run("mean", mixture), mixture)


def test_joint(make_mixture, architecture, monkeypatch) -> None:
    quick = TrainConfig(epochs=40, batch_size=2, learning_rate=2e-2, force_weight=1000.0)
    monkeypatch.setattr(training, "FINE_TUNING", quick)
    mixture = make_mixture(architecture, 2, frames=5)
    mixture = replace(mixture, labelled=tuple(labelled(s) for s in mixture.specialists))
    base = Outcome(potentials=(mixture.base.potential,))
    assert disagreement(run("joint", mixture), mixture) < 0.7 * disagreement(base, mixture)
