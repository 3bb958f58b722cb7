"""Mixtures of small specialists: a base, and fine-tuned relatives made by perturbing its weights."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule

from ase_gffmerge.forcefield.force_field import ForceField
from ase_gffmerge.forcefield.provenance import Provenance
from ase_gffmerge.merging.recipe import PRESETS, load_recipe
from ase_gffmerge.methods import MergeInputs, dare, fisher, task_arithmetic, ties
from ase_gffmerge.models import build_potential

SMALL = {
    "painn": {"channels": 6, "n_blocks": 2, "n_radial": 5, "cutoff": 4.0},
    "nequip": {"channels": 4, "n_blocks": 2, "n_radial": 5, "cutoff": 4.0, "l_max": 1, "tensor_channels": 4}
    | {"radial_hidden": 6},
}
MOLECULES = ("CH3OH", "H2CO", "HCOOH")


def rattled(name: str, n: int, seed: int) -> tuple[Atoms, ...]:
    rng = np.random.default_rng(seed)
    frames = [molecule(name) for _ in range(n)]
    for atoms in frames:
        atoms.positions += 0.08 * rng.standard_normal(atoms.positions.shape)
    return tuple(frames)


def with_species(specialist: ForceField, species: Sequence[int], *, seed: int = 0) -> ForceField:
    """The specialist for other elements: rows it has not are random, rows not asked for are left out."""
    old = specialist.potential
    torch.manual_seed(seed)
    new = build_potential(old.architecture, old.hyper.to_dict(), tuple(species)).to(old.dtype)
    shared = [z for z in new.species if z in old.species]
    to, fro = (model.species_row[shared] for model in (new, old))
    skipped = ("embedding", "references")
    new.load_state_dict(new.state_dict() | {k: v for k, v in old.state_dict().items() if k not in skipped})
    with torch.no_grad():
        new.embedding[:, to] = old.embedding[:, fro]
        new.references[to] = old.references[fro]
    return replace(specialist, potential=new.eval().requires_grad_(False))


def relative(base: ForceField, *, seed: int, size: float, frames: tuple[Atoms, ...]) -> ForceField:
    """A 'fine-tuned' copy: every weight moved by a random fraction of its tensor's size."""
    potential = deepcopy(base.potential)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in potential.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(size * parameter.abs().mean() * noise)
    lineage = Provenance(lineage=(base.fingerprint,))
    return replace(base, name=f"s{seed}", potential=potential, calibration=frames, provenance=lineage)


@pytest.fixture(autouse=True)
def _coarse_grids(monkeypatch) -> None:
    """Few trials and a small readout, in place of those that real specialists deserve."""
    monkeypatch.setattr(ties, "DENSITIES", (0.5, 1.0))
    monkeypatch.setattr(ties, "SCALES", (1.0,))
    monkeypatch.setattr(dare, "RATES", (0.3,))
    monkeypatch.setattr(dare, "SHARES", (0.5, 1.0))
    monkeypatch.setattr(task_arithmetic, "SHARES", (0.5, 1.0, 1.5))
    monkeypatch.setattr(fisher, "FLOORS", (1e-2, 1.0))
    small = load_recipe({"readout": {"width": 16, "blocks": 2, "copies": 1}, "probes": 1})
    monkeypatch.setitem(PRESETS, "gffmerge", small)


MakeMixture = Callable[..., MergeInputs]


@pytest.fixture(scope="session")
def make_merge_inputs() -> MakeMixture:
    """``make_mixture(architecture, k)``: a base and k relatives; ``copies`` makes all of them the same."""

    def make(
        architecture: str, k: int = 2, *, size: float = 0.1, frames: int = 3, copies: bool = False
    ) -> MergeInputs:
        torch.manual_seed(0)
        potential = build_potential(architecture, SMALL[architecture], (1, 6, 8)).double().eval()
        base = ForceField(name="base", potential=potential.requires_grad_(False), level_of_theory="toy")
        seeds = [1] * k if copies else range(1, k + 1)
        specialists = [
            relative(base, seed=seed, size=size, frames=rattled(MOLECULES[i % 3], frames, seed=i))
            for i, seed in enumerate(seeds)
        ]
        return MergeInputs(specialists=tuple(specialists), base=base)

    return make


@pytest.fixture
def narrowed() -> Callable[[ForceField, Sequence[int]], ForceField]:
    """``narrowed(specialist, species)``: the same specialist for other elements."""
    return with_species
