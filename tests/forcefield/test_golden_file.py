"""The schema of files: a file written once is read by today's code, which writes the same bytes."""

from pathlib import Path

import numpy as np
import torch
from ase import Atoms

from ase_gffmerge import ForceField
from ase_gffmerge.forcefield.leverage import ExtrapolationGrade
from ase_gffmerge.forcefield.provenance import MergeRecord, Provenance
from ase_gffmerge.models import build_potential
from ase_gffmerge.storage.tensor_file import read_digest

GOLDEN = Path(__file__).parent / "golden.safetensors"
"""A new schema needs a new file, ``make().save(GOLDEN)``, and a new ``SCHEMA`` in storage/tensor_file.py."""


def make() -> ForceField:
    """A force field with everything a file can hold; its weights are an arithmetic sequence."""
    potential = build_potential("painn", {"channels": 2, "n_blocks": 1, "n_radial": 2}, (1, 8))
    with torch.no_grad():
        for parameter in potential.parameters():
            parameter.copy_(torch.arange(parameter.numel()).reshape(parameter.shape) / 64 - 0.25)
        potential.references.copy_(torch.tensor([-13.5, -432.25]))
    whitening = torch.stack([torch.eye(2), 2 * torch.eye(2)])
    return ForceField(
        name="golden",
        potential=potential.eval().requires_grad_(False),
        calibration=(
            Atoms("H2O", positions=[[0, 0.75, 0.5], [0, -0.75, 0.5], [0, 0, 0]]),
            Atoms("H2", positions=[[0, 0, 0], [0, 0, 0.75]], cell=[4, 4, 8], pbc=(True, True, False)),
        ),
        level_of_theory="PBE/def2-SVP",
        provenance=Provenance(
            data_set="frames.xyz",
            data_hash=64 * "a",
            n_train=10,
            epochs=20,
            seed=3,
            lineage=(64 * "b",),
            errors={"force_mae": 0.5},
            seen_frames=("00ff00ff00ff00ff", 16 * "1"),
            origin="other 1.0",
        ),
        merged=MergeRecord(
            specialists=("a", "b"),
            fingerprints=(64 * "c", 64 * "d"),
            recipe={"ridge": 0.25},
            report={"verdict": "good"},
            cache_key=64 * "e",
        ),
        extrapolation_grade=ExtrapolationGrade(torch.tensor([1, 8]), whitening),
    )


def test_the_golden_file_is_read() -> None:
    found, expected = ForceField.load(GOLDEN), make()
    for name in ("name", "level_of_theory", "provenance", "merged", "fingerprint", "species", "cutoff"):
        assert getattr(found, name) == getattr(expected, name)
    for ours, theirs in zip(found.calibration, expected.calibration, strict=True):
        assert ours == theirs
    for name, value in expected.potential.state_dict().items():
        assert torch.equal(found.potential.state_dict()[name], value)
    np.testing.assert_array_equal(found.extrapolation_grade.whitening, expected.extrapolation_grade.whitening)


def test_the_golden_file_is_written(tmp_path: Path) -> None:
    assert ForceField.load(GOLDEN).save(tmp_path / "again.safetensors").read_bytes() == GOLDEN.read_bytes()
    assert make().save(tmp_path / "new.safetensors").read_bytes() == GOLDEN.read_bytes()


def test_digest_of_the_content_is_in_the_file() -> None:
    assert make().content_digest == ForceField.load(GOLDEN).content_digest == read_digest(GOLDEN)
