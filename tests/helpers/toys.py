"""Small random force fields and the structures on which the contract is checked."""

from copy import deepcopy
from dataclasses import replace
from functools import cache

import numpy as np
import torch
from ase import Atoms
from ase.build import bulk, fcc111, molecule

from ase_gffmerge import ForceField
from ase_gffmerge.models import build_potential

SPECIES = (1, 6, 8, 13, 29)
SMALL = {
    "painn": {"channels": 8, "n_blocks": 2, "n_radial": 5},
    "nequip": {
        "channels": 6,
        "n_blocks": 2,
        "n_radial": 4,
        "l_max": 1,
        "tensor_channels": 4,
        "radial_hidden": 8,
    },
}


def random_force_field(architecture: str) -> ForceField:
    toy = _random_force_field(architecture)
    return replace(toy, potential=deepcopy(toy.potential))


@cache
def _random_force_field(architecture: str) -> ForceField:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        potential = build_potential(architecture, {"cutoff": 4.0, **SMALL.get(architecture, {})}, SPECIES)
    potential.double().eval().requires_grad_(False)
    potential.references.copy_(torch.linspace(-2.0, 2.0, len(SPECIES)))
    return ForceField(name="toy", potential=potential)


def relative(base: ForceField, name: str, system: str, *, seed: int) -> ForceField:
    """A specialist a small step away from ``base``, with calibration frames of one molecule."""
    potential = deepcopy(base.potential)
    generator = torch.Generator().manual_seed(seed)
    for parameter in potential.parameters():
        parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    frames = [molecule(system) for _ in range(4)]
    for i, frame in enumerate(frames):
        frame.rattle(0.1, seed=10 * seed + i)
    return replace(base, name=name, potential=potential, calibration=tuple(frames))


def crystal() -> Atoms:
    """Skewed, rattled, and smaller than the cutoff."""
    atoms = bulk("Cu", "fcc", a=3.7) * (2, 1, 1)
    atoms.numbers[1] = 13
    atoms.set_cell(
        atoms.cell @ np.add(np.eye(3), [[0.03, 0.05, 0], [0, -0.04, 0.06], [0.02, 0, 0.05]]), scale_atoms=True
    )
    atoms.rattle(0.1, seed=3)
    return atoms


def slab() -> Atoms:
    atoms = fcc111("Al", (2, 1, 2), vacuum=5.0)
    atoms.info.clear()  # ASE's notes on the surface do not fit into files
    atoms.rattle(0.1, seed=4)
    return atoms


def cluster() -> Atoms:
    atoms = molecule("CH3OH")
    atoms.rattle(0.05, seed=5)
    return atoms


STRUCTURES = {"crystal": crystal, "slab": slab, "cluster": cluster}


def everything(atoms, calc) -> dict:
    """All results of a copy of ``atoms``."""
    atoms = atoms.copy()
    atoms.calc = calc
    atoms.get_potential_energy()
    return calc.results
