"""Two related specialists of every architecture, with few frames."""

import pytest

from ase_gffmerge.forcefield.force_field import ForceField
from helpers.toys import SHALLOW, rattled, relative, toy


@pytest.fixture
def pair(architecture) -> list[ForceField]:
    base = toy(architecture, SHALLOW[architecture])
    for parameter in base.potential.readout.parameters():
        parameter *= 0.05  # forces that are gentle enough for dynamics
    return [
        relative(base, name, rattled(formula, 6, size=0.05), seed=seed)
        for seed, (name, formula) in enumerate((("methanol", "CH3OH"), ("water", "H2O")))
    ]
