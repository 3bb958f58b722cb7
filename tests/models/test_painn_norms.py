"""The norms of PaiNN's vectors, where symmetry makes the vectors vanish."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from ase.build import bulk

from ase_gffmerge import ForceField
from ase_gffmerge.errors import FileFormatError
from ase_gffmerge.graphs import build_graph, predict
from ase_gffmerge.models import build_potential
from ase_gffmerge.models.painn import PaiNN
from ase_gffmerge.training.config import TrainConfig
from ase_gffmerge.training.initialization import NEW_MODELS, random_potential

SMALL = {"cutoff": 4.0, "channels": 8, "n_blocks": 2, "n_radial": 6}


def painn(**hyper: float) -> PaiNN:
    torch.manual_seed(0)
    return build_potential("painn", SMALL | hyper, (29,)).double().eval().requires_grad_(False)


def force_constants(potential: PaiNN, displacements: np.ndarray) -> np.ndarray:
    """-F/d of one atom of fcc copper, every one of which is an inversion centre, for displacements d along x."""
    crystal, found = bulk("Cu", a=3.6, cubic=True), []
    for d in displacements:
        moved = crystal.copy()
        moved.positions[0, 0] += d
        found.append(-predict(potential, build_graph(moved, 4.0)).forces[0, 0].item() / d)
    return np.array(found)


def test_second_derivatives_on_an_inversion_centre() -> None:
    displacements = np.array([-0.01, 0.002, 0.005, 0.01])
    old, new = (
        force_constants(painn(norm_offset=offset), displacements)
        for offset in (PaiNN.Hyper().norm_offset, NEW_MODELS["painn"]["norm_offset"])
    )
    assert np.ptp(old) > 1.0 * abs(old.mean()), "a cusp: the force does not fall with the displacement"
    assert np.ptp(new) < 0.01 * abs(new.mean())
    assert new[0] == pytest.approx(new[-1], rel=1e-8)


def test_new_models_are_smooth_and_old_files_as_they_were() -> None:
    assert painn().hyper.norm_offset == 1e-8
    assert random_potential(TrainConfig(hyper=SMALL), (29,)).hyper.norm_offset == 1e-3
    own = random_potential(TrainConfig(hyper=SMALL | {"norm_offset": 1e-2}), (29,))
    assert own.hyper.norm_offset == 1e-2
    assert random_potential(TrainConfig(model="nequip"), (29,)).architecture == "nequip"


def test_files_remember_it(tmp_path) -> None:
    saved = ForceField(name="smooth", potential=painn(norm_offset=0.01))
    loaded = ForceField.load(saved.save(tmp_path / "smooth.safetensors"))
    assert loaded.potential.hyper.norm_offset == 0.01
    assert loaded.potential.stages[1].norm_offset == 0.01
    assert loaded.fingerprint == saved.fingerprint


def test_fingerprints_tell_it_apart() -> None:
    small, large = (ForceField(name="x", potential=painn(norm_offset=offset)) for offset in (1e-8, 1e-2))
    assert small.fingerprint != large.fingerprint
    assert replace(large.potential.hyper, norm_offset=1e-8) == small.potential.hyper


@pytest.mark.parametrize("offset", [0.0, -1.0, float("inf"), "none"])
def test_impossible_offsets(offset) -> None:
    with pytest.raises(FileFormatError, match="norm_offset must be a positive number"):
        painn(norm_offset=offset)
