"""Methods that train come closer to the specialists than what they start from."""

from dataclasses import replace

import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator

from ase_gffmerge.forcefield.force_field import ForceField
from ase_gffmerge.inference.predict import predict_frames
from ase_gffmerge.methods import METHODS, MergeInputs, MergeOutput, Requirement
from ase_gffmerge.methods import references as training
from ase_gffmerge.training.config import TrainConfig


def run(name: str, merge_inputs: MergeInputs) -> MergeOutput:
    steps: list[float] = []
    merge_output = METHODS[name].run(merge_inputs, lambda fraction, text: steps.append(fraction))
    assert steps == sorted(steps)
    assert all(0 <= step <= 1 for step in steps)
    return merge_output


def disagreement(merge_output: MergeOutput, merge_inputs: MergeInputs) -> float:
    """Mean absolute difference of forces, eV/Å, the mean over the specialists."""
    errors = []
    for k, s in enumerate(merge_inputs.specialists):
        ours, theirs = (predict_frames(p, s.calibration) for p in (merge_output.potential(k), s.potential))
        errors.append(np.abs(np.concatenate(ours.forces) - np.concatenate(theirs.forces)).mean())
    return float(np.mean(errors))


def labelled(specialist: ForceField) -> list[Atoms]:
    """Calibration frames with the specialist's predictions as labels."""
    frames = [atoms.copy() for atoms in specialist.calibration]
    predicted = predict_frames(specialist.potential, frames)
    for atoms, energy, forces in zip(frames, predicted.energies, predicted.forces, strict=True):
        atoms.calc = SinglePointCalculator(atoms, energy=float(energy), forces=forces)
    return frames


def test_needs() -> None:
    joint = METHODS["joint"]
    assert joint.trains
    assert joint.needs == {Requirement.BASE, Requirement.LABELS}


def test_joint(make_merge_inputs, architecture, monkeypatch) -> None:
    quick = TrainConfig(epochs=40, batch_size=2, learning_rate=2e-2, force_weight=1000.0)
    monkeypatch.setattr(training, "FINE_TUNING", quick)
    merge_inputs = make_merge_inputs(architecture, 2, frames=5)
    merge_inputs = replace(merge_inputs, labelled=tuple(labelled(s) for s in merge_inputs.specialists))
    base = MergeOutput(potentials=(merge_inputs.base.potential,))
    assert disagreement(run("joint", merge_inputs), merge_inputs) < 0.7 * disagreement(base, merge_inputs)
