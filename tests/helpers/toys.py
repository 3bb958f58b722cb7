"""Toy force fields: small random networks, relatives that are copies with moved weights, and frames to calibrate them."""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import cache
from typing import TypeVar

import numpy as np
import torch
from ase import Atoms
from ase.build import molecule
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator

from ase_gffmerge.forcefield.force_field import ForceField
from ase_gffmerge.forcefield.provenance import Provenance
from ase_gffmerge.models import build_potential

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
    "escaip": {
        "channels": 8,
        "n_blocks": 2,
        "n_radial": 6,
        "cutoff": 4.0,
        "atten_num_heads": 2,
        "frequency_list": (2, 2, 1),
    },
    "m3gnet": {
        "channels": 8,
        "n_blocks": 2,
        "cutoff": 4.0,
        "three_body_cutoff": 3.0,
        "edge_channels": 8,
        "width": 8,
    },
    "tensornet": {"channels": 8, "n_blocks": 2, "n_radial": 6, "cutoff": 4.0},
    "mattersim": {
        "channels": 8,
        "n_blocks": 2,
        "cutoff": 4.0,
        "three_body_cutoff": 3.0,
        "n_radial": 3,
        "l_max": 1,
    },
}
"""Hyperparameters of networks that are evaluated in milliseconds and merged in a second."""
SHALLOW = {name: {**hyper, "n_blocks": 1} for name, hyper in SMALL.items()}
MOLECULES = ("CH3CH2OH", "CH3CHO", "CH3OCH3", "HCOOH")

Model = TypeVar("Model", bound=torch.nn.Module)
Family = Callable[..., list[ForceField]]


def toy(
    architecture: str = "painn",
    hyper: Mapping[str, object] | None = None,
    species: Sequence[int] = (1, 6, 8),
    *,
    name: str = "base",
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    level_of_theory: str = "toy",
) -> ForceField:
    """A force field with random weights, those of ``SMALL`` in size where nothing else is said."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        potential = build_potential(architecture, dict(hyper or SMALL[architecture]), tuple(species))
    potential = potential.to(dtype=dtype).eval().requires_grad_(False)
    return ForceField(name=name, potential=potential, level_of_theory=level_of_theory)


def moved(model: Model, *, seed: int, size: float, absolute: bool = False) -> Model:
    """The model itself, every weight moved at random by about ``size`` times its tensor's mean size, or by ``size``."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
            p.add_(size * (1.0 if absolute else p.abs().mean()) * noise)
    return model


def relative(
    base: ForceField,
    name: str,
    frames: Sequence[Atoms] = (),
    *,
    seed: int,
    size: float = 0.05,
    absolute: bool = False,
    provenance: Provenance | None = None,
) -> ForceField:
    """A 'fine-tuned' copy of ``base`` with calibration frames; its provenance is that it descends from ``base``."""
    potential = moved(deepcopy(base.potential), seed=seed, size=size, absolute=absolute)
    provenance = provenance or Provenance(lineage=(base.fingerprint,))
    return replace(base, name=name, potential=potential, calibration=tuple(frames), provenance=provenance)


def rattled(start: str | Atoms, n: int, *, seed: int = 0, size: float = 0.08) -> tuple[Atoms, ...]:
    """Copies of a molecule or structure with positions moved at random."""
    rng = np.random.default_rng(seed)
    frames = []
    for _ in range(n):
        atoms = molecule(start) if isinstance(start, str) else start.copy()
        atoms.positions += size * rng.standard_normal(atoms.positions.shape)
        frames.append(atoms)
    return tuple(frames)


def labelled(atoms: Atoms, *, stress: bool = False) -> Atoms:
    """The structure with EMT's energy and forces, and stress if wanted."""
    atoms.calc = EMT()
    results = {"energy": atoms.get_potential_energy(), "forces": atoms.get_forces()}
    if stress:
        results["stress"] = atoms.get_stress()
    atoms.calc = SinglePointCalculator(atoms, **results)
    return atoms


def family(
    architecture: str,
    k: int = 2,
    *,
    size: float = 0.05,
    frames: int = 6,
    species: tuple[int, ...] = (1, 6, 8),
    hyper: Mapping[str, object] | None = None,
) -> list[ForceField]:
    """``k`` relatives of one base with frames of different molecules."""
    base = toy(architecture, hyper, species)
    return [
        relative(base, f"s{i}", rattled(MOLECULES[i % 4], frames, seed=i), seed=i + 1, size=size)
        for i in range(k)
    ]


# -- force fields of the calculator's contract --

SPECIES = (1, 6, 8, 13, 29)
CONTRACT = {
    "painn": {"channels": 8, "n_blocks": 2, "n_radial": 5},
    "nequip": {
        "channels": 6,
        "n_blocks": 2,
        "n_radial": 4,
        "l_max": 1,
        "tensor_channels": 4,
        "radial_hidden": 8,
    },
    "escaip": {
        "channels": 8,
        "n_blocks": 2,
        "n_radial": 4,
        "atten_num_heads": 2,
        "frequency_list": (2, 2, 1),
    },
}


def random_force_field(architecture: str) -> ForceField:
    """A toy for molecules, aluminium and copper, with reference energies."""
    made = _random_force_field(architecture)
    return replace(made, potential=deepcopy(made.potential))


@cache
def _random_force_field(architecture: str) -> ForceField:
    hyper = {"cutoff": 4.0, **CONTRACT.get(architecture, {})}
    made = toy(architecture, hyper, SPECIES, name="toy", seed=7, level_of_theory="unknown")
    made.potential.references.copy_(torch.linspace(-2.0, 2.0, len(SPECIES)))
    return made


def stranger(base: ForceField, name: str, formula: str, *, seed: int) -> ForceField:
    """A copy a small step away that does not say where it comes from, with four frames of a molecule."""
    frames = [molecule(formula) for _ in range(4)]
    for i, frame in enumerate(frames):
        frame.rattle(0.1, seed=10 * seed + i)
    return relative(base, name, frames, seed=seed, size=0.01, absolute=True, provenance=Provenance())
