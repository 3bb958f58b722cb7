"""What every method that needs no training promises, for both architectures."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from ase.build import molecule

from ase_gffmerge.errors import RecipeError
from ase_gffmerge.inference.predict import predict_frames
from ase_gffmerge.methods import METHODS, MergeInputs, MergeOutput, Requirement, method

PRESETS = ("paper", "closed-form", "gffmerge")
"""Recipes of ``merge``, whose own tests pin down the same properties."""
NAMES = [name for name, method in METHODS.items() if not method.trains and name not in PRESETS]


def run(name: str, merge_inputs: MergeInputs) -> MergeOutput:
    steps: list[float] = []
    merge_output = METHODS[name].run(merge_inputs, lambda fraction, text: steps.append(fraction))
    assert steps == sorted(steps)
    assert all(0 <= step <= 1 for step in steps)
    return merge_output


def forces(potential, frames) -> np.ndarray:
    return np.concatenate(predict_frames(potential, frames).forces)


@pytest.fixture(scope="module")
def shared_mixture(make_merge_inputs) -> Callable[..., MergeInputs]:
    """The same mixture for all methods: they must not change it."""
    return cache(make_merge_inputs)


@pytest.fixture(scope="module")
def outcomes() -> dict[tuple[str, str], MergeOutput]:
    """What the methods made of three specialists; filled by the first test that needs it."""
    return {}


@pytest.mark.parametrize("name", [name for name in NAMES if name != "dare"])
def test_copies_of_one_specialist_return_it(shared_mixture, architecture, name) -> None:
    """DARE drops a random part of what they learned."""
    merge_inputs = shared_mixture(architecture, 2, frames=2, copies=True)
    merge_output = run(name, merge_inputs)
    for k, specialist in enumerate(merge_inputs.specialists):
        ours, theirs = (
            predict_frames(potential, specialist.calibration)
            for potential in (merge_output.potential(k), specialist.potential)
        )
        np.testing.assert_allclose(ours.energies, theirs.energies, atol=1e-10)
        np.testing.assert_allclose(np.concatenate(ours.forces), np.concatenate(theirs.forces), atol=1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_order_is_irrelevant_and_specialists_stay_as_they_are(
    shared_mixture, architecture, name, outcomes
) -> None:
    merge_inputs = shared_mixture(architecture, 3, frames=2)
    models = [s.potential for s in (*merge_inputs.specialists, merge_inputs.base)]
    before = [deepcopy(model.state_dict()) for model in models]
    ahead = outcomes[name, architecture] = run(name, merge_inputs)
    for model, state in zip(models, before):
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    back = run(name, replace(merge_inputs, specialists=merge_inputs.specialists[::-1]))
    for k, specialist in enumerate(merge_inputs.specialists):
        first = forces(ahead.potential(k), specialist.calibration)
        second = forces(back.potential(2 - k), specialist.calibration)
        np.testing.assert_allclose(first, second, atol=1e-6 * np.abs(first).max())


@pytest.mark.parametrize("name", NAMES)
def test_equivariance_survives(shared_mixture, architecture, name, outcomes) -> None:
    if (name, architecture) not in outcomes:
        outcomes[name, architecture] = run(name, shared_mixture(architecture, 3, frames=2))
    atoms = molecule("CH3OH")
    atoms.rattle(0.1, seed=1)
    turned = atoms.copy()
    rotation = np.linalg.qr(np.random.default_rng(0).standard_normal((3, 3)))[0]
    turned.positions = atoms.positions @ rotation.T
    for potential in outcomes[name, architecture].potentials:
        straight, rotated = (predict_frames(potential, [a]) for a in (atoms, turned))
        assert rotated.energies[0] == pytest.approx(straight.energies[0], abs=1e-10)
        np.testing.assert_allclose(rotated.forces[0], straight.forces[0] @ rotation.T, atol=1e-10)


@pytest.mark.parametrize("name", METHODS)
def test_declared_needs_are_what_is_missing(make_merge_inputs, name) -> None:
    full = make_merge_inputs("painn", 2)
    poor = MergeInputs(specialists=tuple(s.with_calibration(()) for s in full.specialists))
    found = METHODS[name]
    assert found.missing(replace(full, labelled=((), ()))) == ()
    assert set(found.missing(poor)) == found.needs


def test_missing_needs_are_named_in_order(make_merge_inputs) -> None:
    merge_inputs = make_merge_inputs("painn", 2)

    @method("greedy", citation="test", needs=(Requirement.LABELS, Requirement.FRAMES, Requirement.BASE))
    def greedy(merge_inputs, progress):
        raise NotImplementedError

    assert greedy.missing(merge_inputs) == (Requirement.LABELS,)
    assert greedy.missing(replace(merge_inputs, base=None)) == (Requirement.BASE, Requirement.LABELS)
    one_without = (merge_inputs.specialists[0].with_calibration(()), merge_inputs.specialists[1])
    assert greedy.missing(replace(merge_inputs, specialists=one_without)) == (
        Requirement.FRAMES,
        Requirement.LABELS,
    )


def test_an_unknown_method_gets_a_suggestion() -> None:
    with pytest.raises(RecipeError, match=r"no method 'tie'; did you mean 'ties'\?"):
        METHODS["tie"]
