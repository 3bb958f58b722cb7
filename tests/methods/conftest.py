"""Mixtures of small specialists: a base, and fine-tuned relatives made by perturbing its weights."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch

from ase_gffmerge.forcefield.force_field import ForceField
from ase_gffmerge.merging.recipe import PRESETS, load_recipe
from ase_gffmerge.methods import MergeInputs, fisher, task_vectors
from ase_gffmerge.models import build_potential
from helpers.structures import OWN_ARCHITECTURES
from helpers.toys import rattled, relative, toy

SMALL = {
    "painn": {"channels": 6, "n_blocks": 2, "n_radial": 5, "cutoff": 4.0},
    "nequip": {"channels": 4, "n_blocks": 2, "n_radial": 5, "cutoff": 4.0, "l_max": 1, "tensor_channels": 4}
    | {"radial_hidden": 6},
}
MOLECULES = ("CH3OH", "H2CO", "HCOOH")


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


@pytest.fixture(params=OWN_ARCHITECTURES)
def architecture(request) -> str:
    return request.param


@pytest.fixture(autouse=True)
def _coarse_grids(monkeypatch) -> None:
    """Few trials and a small readout, in place of those that real specialists deserve."""
    monkeypatch.setattr(task_vectors, "DENSITIES", (0.5, 1.0))
    monkeypatch.setattr(task_vectors, "SCALES", (1.0,))
    monkeypatch.setattr(task_vectors, "RATES", (0.3,))
    monkeypatch.setattr(task_vectors, "SHARES", (0.5, 1.0))
    monkeypatch.setattr(task_vectors, "MULTIPLES", (0.5, 1.0, 1.5))
    monkeypatch.setattr(fisher, "FLOORS", (1e-2, 1.0))
    small = load_recipe(
        {"preset": "closed-form", "readout": {"width": 16, "blocks": 2, "copies": 1}, "directions": 1}
    )
    for preset in ("gffmerge", "closed-form"):
        monkeypatch.setitem(PRESETS, preset, small)


MakeMixture = Callable[..., MergeInputs]


@pytest.fixture(scope="session")
def make_merge_inputs() -> MakeMixture:
    """``make_mixture(architecture, k)``: a base and k relatives; ``copies`` makes all of them the same."""

    def make(
        architecture: str, k: int = 2, *, size: float = 0.1, frames: int = 3, copies: bool = False
    ) -> MergeInputs:
        base = toy(architecture, SMALL[architecture])
        seeds = [1] * k if copies else range(1, k + 1)
        specialists = [
            relative(base, f"s{seed}", rattled(MOLECULES[i % 3], frames, seed=i), seed=seed, size=size)
            for i, seed in enumerate(seeds)
        ]
        return MergeInputs(specialists=tuple(specialists), base=base)

    return make


@pytest.fixture
def narrowed() -> Callable[[ForceField, Sequence[int]], ForceField]:
    """``narrowed(specialist, species)``: the same specialist for other elements."""
    return with_species
