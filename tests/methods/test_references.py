"""The best single specialist, and the mean of all outputs."""

from dataclasses import replace

import numpy as np
import pytest
from ase.build import molecule

from ase_gffmerge.errors import FramesError, IncompatibleSpecialistsError
from ase_gffmerge.inference.predict import predict_frames
from ase_gffmerge.merging.disagreement import DisagreementMetric
from ase_gffmerge.methods import METHODS, MergeInputs
from ase_gffmerge.runtime.progress import no_progress


def run(name: str, merge_inputs: MergeInputs):
    return METHODS[name].run(merge_inputs, no_progress)


def test_the_best_single_specialist_is_the_one_closest_to_all(make_merge_inputs, architecture) -> None:
    merge_inputs = make_merge_inputs(architecture, 3, size=0.2)
    metric = DisagreementMetric.of(merge_inputs.specialists)
    disagreements = {s.name: metric.disagreement(s.potential) for s in merge_inputs.specialists}
    assert len({round(value, 6) for value in disagreements.values()}) == 3
    merge_output = run("best_single", merge_inputs)
    assert merge_output.settings == {"specialist": min(disagreements, key=disagreements.__getitem__)}
    assert metric.disagreement(merge_output.potential(0)) == pytest.approx(min(disagreements.values()))


def test_the_best_single_specialist_knows_all_elements(make_merge_inputs, narrowed) -> None:
    merge_inputs = make_merge_inputs("painn", 2)
    frames = tuple(molecule("CH4") for _ in range(2))
    few = narrowed(merge_inputs.specialists[0], (1, 6)).with_calibration(frames)
    merge_output = run("best_single", replace(merge_inputs, specialists=(few, merge_inputs.specialists[1])))
    assert merge_output.settings["specialist"] == merge_inputs.specialists[1].name
    other = narrowed(merge_inputs.specialists[1], (1, 8)).with_calibration((molecule("H2O"),))
    with pytest.raises(IncompatibleSpecialistsError, match="no specialist knows all elements"):
        run("best_single", replace(merge_inputs, specialists=(few, other)))


def test_the_ensemble_is_the_mean_of_outputs(make_merge_inputs, architecture) -> None:
    merge_inputs = make_merge_inputs(architecture, 3)
    frames = merge_inputs.specialists[0].calibration
    ensemble = predict_frames(run("ensemble", merge_inputs).potential(0), frames)
    members = [predict_frames(s.potential, frames) for s in merge_inputs.specialists]
    np.testing.assert_allclose(ensemble.energies, np.mean([m.energies for m in members], axis=0), atol=1e-10)
    for i, force in enumerate(ensemble.forces):
        np.testing.assert_allclose(force, np.mean([m.forces[i] for m in members], axis=0), atol=1e-10)


def test_only_members_that_know_a_structure_are_averaged(make_merge_inputs, narrowed) -> None:
    merge_inputs = make_merge_inputs("painn", 2)
    few = narrowed(merge_inputs.specialists[0], (1, 6)).with_calibration(())
    wide = merge_inputs.specialists[1]
    ensemble = run("ensemble", replace(merge_inputs, specialists=(few, wide))).potential(0)
    both, one = molecule("CH4"), molecule("CH3OH")
    together = predict_frames(ensemble, [both, one])
    alone = predict_frames(wide.potential, [both, one])
    assert together.energies[1] == pytest.approx(alone.energies[1], abs=1e-10)
    np.testing.assert_allclose(together.forces[1], alone.forces[1], atol=1e-10)
    mean = (alone.forces[0] + predict_frames(few.potential, [both]).forces[0]) / 2
    np.testing.assert_allclose(together.forces[0], mean, atol=1e-10)


def test_an_ensemble_of_which_nobody_knows_a_structure_says_so(make_merge_inputs, narrowed) -> None:
    merge_inputs = make_merge_inputs("painn", 2)
    halves = (narrowed(merge_inputs.specialists[0], (1, 6)), narrowed(merge_inputs.specialists[1], (1, 8)))
    halves = tuple(s.with_calibration(()) for s in halves)
    ensemble = run("ensemble", replace(merge_inputs, specialists=halves)).potential(0)
    with pytest.raises(FramesError, match="no specialist knows all elements"):
        predict_frames(ensemble, [molecule("CH3OH")])
