"""Two related specialists of every architecture, with few frames."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from ase.build import molecule

from ase_gffmerge.forcefield.force_field import ForceField
from ase_gffmerge.forcefield.provenance import Provenance
from ase_gffmerge.models import build_potential

SMALL = {
    "painn": {"channels": 8, "n_blocks": 1, "n_radial": 5, "cutoff": 4.0},
    "nequip": {"channels": 4, "n_blocks": 1, "n_radial": 5, "cutoff": 4.0, "l_max": 1, "radial_hidden": 8},
}


@pytest.fixture
def pair(architecture) -> list[ForceField]:
    torch.manual_seed(0)
    potential = (
        build_potential(architecture, SMALL[architecture], (1, 6, 8)).double().eval().requires_grad_(False)
    )
    for parameter in potential.readout.parameters():
        parameter *= 0.05  # forces that are gentle enough for dynamics
    base = ForceField(name="base", potential=potential, level_of_theory="toy")
    lineage, related = Provenance(lineage=(base.fingerprint,)), []
    for name, formula in (("methanol", "CH3OH"), ("water", "H2O")):
        own = deepcopy(potential)
        for parameter in own.parameters():
            parameter += 0.05 * parameter.abs().mean() * torch.randn_like(parameter)
        frames = [molecule(formula) for _ in range(6)]
        for k, atoms in enumerate(frames):
            atoms.rattle(0.05, seed=k)
        related.append(replace(base, name=name, potential=own, calibration=tuple(frames), provenance=lineage))
    return related
