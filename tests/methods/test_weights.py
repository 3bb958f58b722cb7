"""Specialists in one space of weights."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from ase.build import molecule

from ase_gffmerge.errors import IncompatibleSpecialistsError, RecipeError
from ase_gffmerge.inference.predict import predict_frames
from ase_gffmerge.merging.weight_space import weighted_mean
from ase_gffmerge.methods import METHODS, MergeInputs
from ase_gffmerge.methods.weight_space import weight_space
from ase_gffmerge.runtime.progress import no_progress

ELEMENTWISE = ("task_arithmetic", "ties", "dare", "fisher", "emr")


def run(name: str, merge_inputs: MergeInputs):
    return METHODS[name].run(merge_inputs, no_progress)


def test_weights_make_the_round_trip(make_merge_inputs, architecture) -> None:
    merge_inputs = make_merge_inputs(architecture, 2)
    space = weight_space(merge_inputs)
    for specialist, vector in zip(merge_inputs.specialists, space.vectors):
        rebuilt = dict(space.potential(vector).named_parameters())
        for name, parameter in specialist.potential.named_parameters():
            assert torch.equal(rebuilt[name], parameter)
    torch.testing.assert_close(space.origin + space.task_vectors, space.vectors)


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_elements_that_not_all_know(make_merge_inputs, narrowed, architecture, name) -> None:
    """Nitrogen, which only the second knows, keeps its row; the first has no say about oxygen."""
    merge_inputs = make_merge_inputs(architecture, 2)
    first = narrowed(merge_inputs.specialists[0], (1, 6)).with_calibration(
        (molecule("CH4"), molecule("C2H6"))
    )
    second = narrowed(merge_inputs.specialists[1], (1, 7, 8)).with_calibration(
        (molecule("H2O"), molecule("NH3"))
    )
    merge_output = run(name, replace(merge_inputs, specialists=(first, second)))
    for potential in merge_output.potentials:
        assert potential.species == (1, 6, 7, 8)
        torch.testing.assert_close(potential.embedding[0, 2], second.potential.embedding[0, 1])
        assert np.isfinite(predict_frames(potential, [molecule("CH3NO2")]).energies).all()
    if name == "fisher":
        torch.testing.assert_close(
            merge_output.potentials[0].embedding[0, [1, 3]],
            torch.stack([first.potential.embedding[0, 1], second.potential.embedding[0, 2]]),
        )


def test_unknown_rows_are_no_part_of_a_task_vector(make_merge_inputs, narrowed) -> None:
    merge_inputs = make_merge_inputs("painn", 2)
    first = narrowed(merge_inputs.specialists[0], (1, 6))
    space = weight_space(replace(merge_inputs, specialists=(first, merge_inputs.specialists[1])))
    channels = first.potential.hyper.channels
    assert (~space.known).sum(1).tolist() == [channels, 0]
    assert not space.task_vectors[~space.known].any()


@pytest.mark.parametrize("name", ["task_arithmetic", "fisher", "emr", "ensemble", "mean"])
def test_a_specialist_that_counts_from_another_zero_is_aligned(make_merge_inputs, name) -> None:
    merge_inputs = make_merge_inputs("painn", 2)
    merge_inputs.specialists[1].potential.references.copy_(torch.tensor([-13.0, -1000.0, -2000.0]))
    same = make_merge_inputs("painn", 2)
    for k, specialist in enumerate(merge_inputs.specialists):
        frames = specialist.calibration
        shifted, plain = (predict_frames(run(name, m).potential(k), frames) for m in (merge_inputs, same))
        np.testing.assert_allclose(shifted.energies, plain.energies, atol=1e-8)


def test_methods_that_start_from_the_base_say_so(make_merge_inputs) -> None:
    merge_inputs = replace(make_merge_inputs("painn", 2), base=None)
    with pytest.raises(RecipeError, match="common ancestor"):
        run("ties", merge_inputs)


def test_a_base_of_another_shape_is_refused(make_merge_inputs) -> None:
    painn, nequip = (make_merge_inputs(architecture, 2) for architecture in ("painn", "nequip"))
    with pytest.raises(IncompatibleSpecialistsError, match="the base 'base' is a nequip model"):
        run("emr", replace(painn, base=nequip.base))


def test_weighted_mean_of_nothing_is_zero() -> None:
    vectors = torch.tensor([[1.0, 2.0, 3.0], [3.0, 6.0, 9.0]])
    weights = torch.tensor([[1.0, 0.0, 0.0], [1.0, 2.0, 0.0]])
    assert weighted_mean(vectors, weights).tolist() == [2.0, 6.0, 0.0]
