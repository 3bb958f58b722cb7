"""Force fields of different elements whose layers have weights per element."""

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule

from ase_gffmerge import ForceField
from ase_gffmerge.inference.predict import predict_frames
from ase_gffmerge.merging.average import on_all_elements
from ase_gffmerge.models import build_potential
from ase_gffmerge.models.painn import PaiNN

HYPER = {"cutoff": 4.0, "channels": 8, "n_blocks": 2, "n_radial": 6, "readout_width": 4}
WEIGHTS = ("readout.theta", "readout.constants")


def specialist(name: str, species: tuple[int, ...]) -> ForceField:
    torch.manual_seed(len(name))
    potential = build_potential("painn", HYPER, species).double().eval().requires_grad_(False)
    for weight in WEIGHTS:
        potential.get_parameter(weight).normal_()
    potential.references += torch.arange(len(species)) + 1.0
    return ForceField(name=name, potential=potential)


@pytest.fixture
def pair() -> list[ForceField]:
    return [specialist("water", (1, 8)), specialist("methane", (1, 6))]


@pytest.fixture
def per_element(monkeypatch) -> None:
    monkeypatch.setattr(PaiNN, "element_parameters", lambda self: WEIGHTS)


def results(specialist: ForceField, atoms: Atoms) -> tuple[float, np.ndarray]:
    found = predict_frames(specialist.potential, [atoms])
    return found.energies[0], found.forces[0]


@pytest.mark.usefixtures("per_element")
def test_weights_of_other_elements_change_nothing(pair):
    for before, after, formula in zip(pair, on_all_elements(pair), ("H2O", "CH4"), strict=True):
        assert after.species == (1, 6, 8)
        for ours, theirs in zip(
            results(after, molecule(formula)), results(before, molecule(formula)), strict=True
        ):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.usefixtures("per_element")
def test_who_knows_all_elements_stays(pair):
    everything = specialist("all", (1, 6, 8))
    first, second = on_all_elements([everything, pair[0]])
    assert first is everything
    assert second.species == (1, 6, 8)


def test_layers_without_weights_per_element_stay(pair):
    assert on_all_elements(pair) == pair
