"""Fixtures of the calculator's tests."""

import pytest
from ase import Atoms

from ase_gffmerge import ForceField, GFFMergeCalculator
from ase_gffmerge.workflows.merge import merge
from helpers.structures import STRUCTURES
from helpers.toys import random_force_field, stranger


@pytest.fixture
def force_field(architecture) -> ForceField:
    return random_force_field(architecture)


@pytest.fixture
def calc(force_field) -> GFFMergeCalculator:
    return GFFMergeCalculator(force_field, dtype="float64", device="cpu")


@pytest.fixture
def painn_calc() -> GFFMergeCalculator:
    return GFFMergeCalculator(random_force_field("painn"), dtype="float64", device="cpu")


@pytest.fixture
def relatives() -> list[ForceField]:
    base = random_force_field("painn")
    return [stranger(base, "ethanol", "CH3CH2OH", seed=1), stranger(base, "methanol", "CH3OH", seed=2)]


@pytest.fixture
def conditioned(relatives) -> ForceField:
    """A merged force field with one embedding table per specialist."""
    return merge(relatives, {"preset": "mean", "conditioning": "per-specialist"}, device="cpu")[0]


@pytest.fixture(params=STRUCTURES)
def atoms(request) -> Atoms:
    return STRUCTURES[request.param]()
