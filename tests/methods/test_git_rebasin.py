from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from ase.build import molecule
from hypothesis import given, settings
from hypothesis import strategies as st

from ase_gffmerge.errors import IncompatibleSpecialistsError
from ase_gffmerge.forcefield.force_field import ForceField
from ase_gffmerge.inference.predict import predict_frames
from ase_gffmerge.methods import METHODS, MergeInputs
from ase_gffmerge.methods.git_rebasin import matched_orders
from ase_gffmerge.models import build_potential
from ase_gffmerge.models.affine_maps import affine_maps
from ase_gffmerge.models.channel_groups import channel_groups, permuted
from helpers.structures import WITH_ESCAIP

NEQUIP = {
    "channels": 5,
    "tensor_channels": 3,
    "n_blocks": 2,
    "n_radial": 4,
    "cutoff": 4.0,
    "radial_hidden": 6,
}
PAINN = {"channels": 6, "n_blocks": 2, "n_radial": 4, "cutoff": 4.0}
HYPER = {
    "painn": PAINN,
    "nequip": NEQUIP,
    "escaip": {**PAINN, "atten_num_heads": 2, "frequency_list": (2, 1)},
}
FRAMES = (molecule("CH3OH"), molecule("HCOOH"))


def silent(fraction: float, text: str) -> None:
    assert 0 <= fraction <= 1
    assert text


@pytest.fixture(params=WITH_ESCAIP)
def architecture(request) -> str:
    return request.param


@cache
def random_potential(architecture: str):
    torch.manual_seed(0)
    potential = build_potential(architecture, HYPER[architecture], (1, 6, 8)).double().eval()
    for parameter in potential.requires_grad_(False).parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    return potential


def shuffled(potential, seed: int):
    generator = torch.Generator().manual_seed(seed)
    sizes = channel_groups(potential).sizes
    return permuted(potential, {g: torch.randperm(n, generator=generator) for g, n in sizes.items()})


def largest_difference(first, second) -> float:
    a, b = (predict_frames(potential, FRAMES) for potential in (first, second))
    forces = np.abs(np.concatenate(a.forces) - np.concatenate(b.forces)).max()
    return max(float(np.abs(a.energies - b.energies).max()), float(forces))


def weight_difference(first, second) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(first.parameters(), second.parameters()))


def test_every_affine_map_is_declared(architecture) -> None:
    potential = random_potential(architecture)
    maps = channel_groups(potential).maps
    for name, problem in affine_maps(potential).items():
        shape = [sum(channels.size for channels in side) for side in maps[name]]
        assert list(problem.read().shape) == [shape[0] + problem.has_bias, shape[1]]
    assert set(maps) == set(affine_maps(potential))


@pytest.mark.parametrize("kind", WITH_ESCAIP)
@settings(deadline=None, max_examples=5)
@given(seed=st.integers(0, 2**31), data=st.data())
def test_permuted_channels_give_the_same_energies_and_forces(kind, seed, data) -> None:
    """All groups at once, and a single one: a channel tied to another group would show."""
    potential = random_potential(kind)
    moved = shuffled(potential, seed)
    assert weight_difference(potential, moved) > 1e-3
    assert largest_difference(potential, moved) < 1e-12
    group, n = data.draw(st.sampled_from(sorted(channel_groups(potential).sizes.items())))
    order = torch.tensor(data.draw(st.permutations(range(n))))
    assert largest_difference(potential, permuted(potential, {group: order})) < 1e-12


def test_a_permutation_and_its_inverse_restore_the_weights(architecture) -> None:
    potential = random_potential(architecture)
    sizes = channel_groups(potential).sizes
    orders = {group: torch.randperm(n) for group, n in sizes.items()}
    back = permuted(permuted(potential, orders), {g: order.argsort() for g, order in orders.items()})
    assert weight_difference(potential, back) < 1e-15


@pytest.mark.parametrize("k", [2, 3])
def test_shuffled_copies_merge_to_the_original(make_merge_inputs, architecture, k) -> None:
    """What the method is for: the plain mean of the same specialists is useless."""
    merge_inputs = make_merge_inputs(architecture, k, copies=True)
    original = merge_inputs.specialists[0].potential
    copies = [
        replace(s, potential=shuffled(s.potential, seed) if seed else s.potential)
        for seed, s in enumerate(merge_inputs.specialists)
    ]
    merge_inputs = replace(merge_inputs, specialists=tuple(copies))
    merge_output = METHODS["git_rebasin"].run(merge_inputs, silent)
    scale = np.abs(np.concatenate(predict_frames(original, FRAMES).forces)).max()
    assert largest_difference(merge_output.potentials[0], original) < 1e-8
    mean = METHODS["mean"].run(merge_inputs, silent).potentials[0]
    assert largest_difference(mean, original) > 0.1 * scale
    assert merge_output.settings["moved"] > 0.3


def test_a_shuffled_copy_of_a_bundled_specialist_finds_its_way_back() -> None:
    original = ForceField.load("rmd17-ethanol", dtype=torch.float64)
    original = original.with_calibration(original.calibration[:10])
    copy = replace(original, name="copy", potential=shuffled(original.potential, 1))
    merge_inputs = MergeInputs(specialists=(original, copy))
    merged, mean = (METHODS[name].run(merge_inputs, silent).potentials[0] for name in ("git_rebasin", "mean"))
    own, found, averaged = (
        np.concatenate(predict_frames(potential, original.calibration).forces)
        for potential in (original.potential, merged, mean)
    )
    np.testing.assert_allclose(found, own, atol=1e-8)
    assert np.abs(averaged - own).mean() > 0.5


def test_a_shuffled_relative_merges_as_well_as_the_relative_itself(make_merge_inputs, architecture) -> None:
    merge_inputs = make_merge_inputs(architecture, 2, size=0.02)
    first, second = merge_inputs.specialists
    hidden = replace(second, potential=shuffled(second.potential, 3))
    straight, turned = (
        METHODS["git_rebasin"].run(replace(merge_inputs, specialists=(first, s)), silent).potentials[0]
        for s in (second, hidden)
    )
    assert largest_difference(straight, turned) < 1e-8


def test_elements_that_not_all_know_are_cut_out_of_the_frames(
    make_merge_inputs, narrowed, architecture
) -> None:
    merge_inputs = make_merge_inputs(architecture, 2, copies=True)
    first, second = merge_inputs.specialists
    second = narrowed(second, (1, 6))
    second = replace(second, potential=shuffled(second.potential, 1), calibration=(molecule("C2H6"),))
    merge_output = METHODS["git_rebasin"].run(replace(merge_inputs, specialists=(first, second)), silent)
    assert merge_output.potentials[0].species == (1, 6, 8)
    assert largest_difference(merge_output.potentials[0], first.potential) < 1e-8


def test_specialists_without_a_common_element_are_refused(make_merge_inputs, narrowed) -> None:
    merge_inputs = make_merge_inputs("painn", 2)
    first, second = merge_inputs.specialists
    first = replace(narrowed(first, (1,)), calibration=(molecule("H2"),))
    second = replace(narrowed(second, (8,)), calibration=(molecule("O2"),))
    with pytest.raises(IncompatibleSpecialistsError, match="share no element"):
        METHODS["git_rebasin"].run(replace(merge_inputs, specialists=(first, second)), silent)


def test_potentials_with_undeclared_channels_are_refused() -> None:
    widened = build_potential("painn", HYPER["painn"] | {"readout_width": 4}, (1, 6))
    with pytest.raises(IncompatibleSpecialistsError, match="may be permuted"):
        channel_groups(widened)


def test_the_reference_is_the_specialist_that_all_resemble() -> None:
    """Specialists 0 and 2 resemble 1, but not each other; the two channels of 2 are in another order."""
    eye, swap = torch.eye(2).double(), torch.eye(2).double().flip(0)
    similarity = torch.stack(
        [
            torch.stack([eye, 0.8 * eye, 0.1 * eye]),
            torch.stack([0.8 * eye, eye, 0.8 * swap]),
            torch.stack([0.1 * eye, 0.8 * swap, eye]),
        ]
    )
    reference, orders = matched_orders({"group": similarity})
    assert reference == 1
    assert [order["group"].tolist() for order in orders] == [[0, 1], [0, 1], [1, 0]]
