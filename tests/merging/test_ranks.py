"""A merge that several processes share equals that of one."""

import numpy as np
import pytest
import torch
from ase import Atoms

from ase_gffmerge.forcefield.force_field import ForceField
from ase_gffmerge.inference.predict import predict_frames
from helpers import ranks


def differences(one: ForceField, other: ForceField, frames: list[Atoms]) -> tuple[float, float]:
    """Largest relative difference of a tensor that the layers' solves wrote, and relative one of the forces."""
    theirs = other.potential.state_dict()
    layers = [
        (a.double() - theirs[name].double()).norm() / a.double().norm().clamp(min=1e-300)
        for name, a in one.potential.state_dict().items()
        if name.startswith(("stages.", "readout.mlp."))
    ]
    ours, found = (np.concatenate(predict_frames(f.potential.double(), frames).forces) for f in (one, other))
    return float(max(layers)), float(np.linalg.norm(found - ours) / np.linalg.norm(ours))


@pytest.mark.slow
def test_two_ranks_equal_one(family, tmp_path, monkeypatch):
    specialists = family("painn", 2)
    for k, specialist in enumerate(specialists):
        specialist.save(tmp_path / f"specialist-{k}.safetensors")
    done = ranks.torchrun("merge", tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("force") > 0
    assert done.stderr.count("written: ") == 1, "the first process alone talks"
    ranks.small_batches(monkeypatch.setattr)
    frames = [atoms for specialist in specialists for atoms in specialist.calibration]
    for dtype, most in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        shared = ForceField.load(tmp_path / f"ranks-{str(dtype).removeprefix('torch.')}.safetensors")
        found = differences(ranks.merged(tmp_path, dtype), shared, frames)
        assert max(found) < most, (dtype, found)
    assert ForceField.load(tmp_path / "command.safetensors").merged is not None
