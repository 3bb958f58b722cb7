"""Families of small specialists: a base, and fine-tuned relatives made by perturbing its weights."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule

from ase_gffmerge.forcefield.force_field import ForceField
from ase_gffmerge.forcefield.provenance import Provenance
from ase_gffmerge.models import build_potential
from helpers.structures import OWN_ARCHITECTURES

SMALL = {
    "painn": {"channels": 8, "n_blocks": 2, "n_radial": 6, "cutoff": 4.0},
    "nequip": {"channels": 4, "n_blocks": 2, "n_radial": 6, "cutoff": 4.0, "l_max": 1, "radial_hidden": 8},
    "chgnet": {
        "channels": 6,
        "n_blocks": 2,
        "n_radial": 5,
        "cutoff": 4.0,
        "n_angular": 5,
        "readout_layers": 1,
    },
}


def rattled(name: str, n: int, seed: int) -> tuple[Atoms, ...]:
    rng = np.random.default_rng(seed)
    frames = []
    for _ in range(n):
        atoms = molecule(name)
        atoms.positions += 0.08 * rng.standard_normal(atoms.positions.shape)
        frames.append(atoms)
    return tuple(frames)


def perturbed(
    specialist: ForceField, *, seed: int, size: float, name: str, frames: tuple[Atoms, ...]
) -> ForceField:
    """A 'fine-tuned' copy: every weight moved by a random fraction of its tensor's size."""
    potential = deepcopy(specialist.potential)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in potential.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype)
            parameter.add_(size * parameter.abs().mean() * noise)
    lineage = Provenance(lineage=(specialist.fingerprint,))
    return replace(specialist, name=name, potential=potential, calibration=frames, provenance=lineage)


Family = Callable[..., list[ForceField]]


@pytest.fixture(params=OWN_ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def family() -> Family:
    """``family(architecture, k, size=...)`` gives k related specialists with frames of different molecules."""

    def make(
        architecture: str,
        k: int = 2,
        *,
        size: float = 0.05,
        frames: int = 6,
        species: tuple[int, ...] = (1, 6, 8),
    ) -> list[ForceField]:
        torch.manual_seed(0)
        potential = (
            build_potential(architecture, SMALL[architecture], species).double().eval().requires_grad_(False)
        )
        base = ForceField(name="base", potential=potential, level_of_theory="toy")
        molecules = ("CH3CH2OH", "CH3CHO", "CH3OCH3", "HCOOH")
        return [
            perturbed(
                base, seed=i + 1, size=size, name=f"s{i}", frames=rattled(molecules[i % 4], frames, seed=i)
            )
            for i in range(k)
        ]

    return make
