"""Force-field files: bitwise round trips, and one clear error that names the file for everything else."""

import json
import os
import pickle
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from safetensors import safe_open
from safetensors.torch import save_file

from ase_gffmerge.errors import FileFormatError, StructureError
from ase_gffmerge.forcefield import force_field, serialization
from ase_gffmerge.forcefield.force_field import ForceField
from ase_gffmerge.forcefield.provenance import MergeRecord, Provenance
from ase_gffmerge.models import build_potential
from ase_gffmerge.storage.tensor_file import digest, read_file, read_metadata, require_writable

HYPER = {"channels": 8, "n_blocks": 1, "n_radial": 4}


def make(dtype: torch.dtype = torch.float32) -> ForceField:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        potential = build_potential("painn", HYPER, (1, 6, 8)).to(dtype=dtype)
    potential.references[:] = torch.tensor([-13.6, -1030.123456789, -2040.0])
    frames = (
        molecule("CH3OH"),
        molecule("H2O"),
        bulk("C", "diamond", a=3.57),
        Atoms("H", pbc=[1, 0, 1], cell=[4, 0, 5]),
    )
    provenance = Provenance(
        data_set="toy",
        n_train=3,
        seed=7,
        lineage=("abc",),
        errors={"force_mae": 0.01},
        seen_frames=("00ff00ff00ff00ff", "0123456789abcdef"),
    )
    return ForceField(
        name="toy", potential=potential, calibration=frames, level_of_theory="PBE", provenance=provenance
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return make().save(tmp_path / "toy.safetensors")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_round_trip_is_bitwise(tmp_path: Path, dtype: torch.dtype) -> None:
    original = make(dtype)
    loaded = ForceField.load(original.save(tmp_path / "a.safetensors"))
    for name, value in original.potential.state_dict().items():
        stored = loaded.potential.state_dict()[name]
        assert stored.dtype == value.dtype
        assert torch.equal(stored, value), name
    assert loaded.potential.dtype == dtype
    assert loaded.potential.references.dtype == torch.float64
    assert loaded.fingerprint == original.fingerprint
    assert loaded.provenance == original.provenance
    assert loaded.potential.hyper == original.potential.hyper
    assert (loaded.name, loaded.level_of_theory, loaded.merged) == ("toy", "PBE", None)
    for frame, kept in zip(original.calibration, loaded.calibration, strict=True):
        assert frame == kept
        np.testing.assert_array_equal(frame.positions, kept.positions)
    assert not any(parameter.requires_grad for parameter in loaded.potential.parameters())
    second = loaded.save(tmp_path / "b.safetensors")
    assert second.read_bytes() == (tmp_path / "a.safetensors").read_bytes()


def test_large_weights_are_finite(tmp_path: Path) -> None:
    """Although their sum is not."""
    large = make()
    torch.nn.init.constant_(large.potential.readout.hidden.weight, torch.finfo(torch.float32).max)
    loaded = ForceField.load(large.save(tmp_path / "large.safetensors"))
    assert loaded.fingerprint == large.fingerprint


def test_merge_record_round_trip(tmp_path: Path) -> None:
    record = MergeRecord(
        specialists=("a", "b"), fingerprints=("1", "2"), recipe={"ridge": 1e-4}, report={"x": [1.5]}
    )
    saved = replace(make(), merged=record, calibration=()).save(tmp_path / "m.safetensors")
    loaded = ForceField.load(saved)
    assert loaded.merged == record
    assert loaded.calibration == ()


def test_its_repr_is_one_line() -> None:
    assert repr(ForceField.load("rmd17-ethanol")) == (
        "<ForceField rmd17-ethanol: painn, 64 channels, H C N O, 100 calibration frames>"
    )


def test_loading_leaves_the_random_state_alone(path: Path) -> None:
    before = torch.random.get_rng_state()
    ForceField.load(path)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_load_casts_on_request(path: Path) -> None:
    assert ForceField.load(path, dtype=torch.float64).potential.dtype == torch.float64


def test_fingerprint_depends_on_every_weight() -> None:
    first, second = make(), make()
    assert first.fingerprint == second.fingerprint
    with torch.no_grad():
        next(second.potential.readout.parameters())[0] += 1e-6
    assert first.fingerprint != second.fingerprint


def test_unknown_elements_are_named() -> None:
    with pytest.raises(StructureError, match=r"contains Na, Cl.*knows H, C, O"):
        make().check_species(molecule("NaCl"))


# -- files that cannot be used: the message names the file --


def refused(path: Path, pattern: str) -> None:
    with pytest.raises(FileFormatError, match=pattern) as caught:
        ForceField.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value).strip()


def test_missing_file(tmp_path: Path) -> None:
    refused(tmp_path / "none.safetensors", "does not exist")


def test_folder(tmp_path: Path) -> None:
    refused(tmp_path, "is a folder")


def test_unreadable_file(path: Path) -> None:
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read everything")
    refused(path, "not a readable")


@pytest.mark.parametrize(
    "content", [b"", b"not a model at all", bytes(200), pickle.dumps({"weights": [1.0] * 50})]
)
def test_other_kinds_of_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    refused(tmp_path / "model.safetensors", "never opened")


def test_pickle_is_not_executed(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple:
            return Path.touch, (tmp_path / "boom",)

    torch.save({"weights": Bomb()}, tmp_path / "model.safetensors")
    refused(tmp_path / "model.safetensors", "never opened")
    assert not (tmp_path / "boom").exists()


@pytest.mark.parametrize("fraction", [0.0, 0.001, 0.1, 0.5, 0.9, 0.999])
def test_truncated(path: Path, fraction: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * fraction)])
    refused(path, "truncated")


def test_appended(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"x")
    refused(path, "truncated, altered")


def test_flipped_bits_anywhere(path: Path) -> None:
    data = path.read_bytes()
    header = 8 + struct.unpack("<Q", data[:8])[0]
    rng = np.random.default_rng(0)
    places = [*range(0, header, 5), *rng.integers(header, len(data), size=200).tolist()]
    for place in places:
        altered = bytearray(data)
        altered[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(altered)
        with pytest.raises(FileFormatError, match=r"toy\.safetensors"):
            ForceField.load(path)


def rewrite(path: Path, *, metadata: object = None, tensors: dict | None = None, **header: str) -> None:
    """Write a file with a right digest but other content."""
    old_metadata, old_tensors = read_file(path)
    text = json.dumps(old_metadata if metadata is None else metadata, sort_keys=True)
    text = metadata if isinstance(metadata, str) else text
    tensors = old_tensors if tensors is None else tensors
    standard = {"format": "ase-gffmerge", "schema": "1", "metadata": text, "sha256": digest(text, tensors)}
    save_file(tensors, path, metadata={**standard, **header})


def test_rewriting_alone_changes_nothing(path: Path) -> None:
    rewrite(path)
    assert ForceField.load(path).name == "toy"


def test_foreign_safetensors(path: Path) -> None:
    save_file({"weight": torch.zeros(2)}, path)
    refused(path, "not one of ase-gffmerge")


@pytest.mark.parametrize("version", ["2", "0", "banana"])
def test_unknown_schema(path: Path, version: str) -> None:
    rewrite(path, schema=version)
    refused(path, f"schema version '{version}'.*install the version")


def test_files_may_know_no_frames_seen(path: Path) -> None:
    metadata, tensors = read_file(path)
    metadata["provenance"]["seen_frames"] = 0
    del tensors["provenance.seen_frames"]
    rewrite(path, metadata=metadata, tensors=tensors)
    loaded = ForceField.load(path)
    assert loaded.provenance == replace(make().provenance, seen_frames=())
    assert loaded.fingerprint == make().fingerprint


@pytest.mark.parametrize("text", ["{", "[1]", "null", ""])
def test_garbled_metadata(path: Path, text: str) -> None:
    rewrite(path, metadata=text)
    refused(path, "metadata")


KEYS = ("name", "architecture", "hyper", "species", "units", "level_of_theory", "provenance", "merged")


@pytest.mark.parametrize("key", KEYS)
def test_missing_metadata(path: Path, key: str) -> None:
    metadata = read_metadata(path)
    del metadata[key]
    rewrite(path, metadata=metadata)
    refused(path, key)


@pytest.mark.parametrize(
    ("key", "value", "pattern"),
    [
        ("architecture", "transformer", "unknown architecture 'transformer'"),
        ("hyper", {"chanels": 3}, "hyper-parameters do not fit"),
        ("hyper", {**HYPER, "channels": -3}, "channels must be at least 1"),
        ("hyper", {**HYPER, "channels": 16}, "shape"),
        ("hyper", {**HYPER, "channels": "many"}, "hyper-parameters"),
        ("hyper", {**HYPER, "cutoff": True}, "cutoff must be a positive number, not True"),
        ("species", [1, 6], "shape"),
        ("species", [1, 6, 999], "write the file again"),
        ("species", None, "write the file again"),
        ("units", {"energy": "Ha", "length": "Å"}, "units"),
        ("provenance", {"lineage": [], "seen_frames": 2, "mood": "good"}, "mood"),
        ("provenance", None, "write the file again"),
        ("merged", {"specialists": ["a"]}, "write the file again"),
    ],
)
def test_wrong_metadata(path: Path, key: str, value: object, pattern: str) -> None:
    rewrite(path, metadata={**read_metadata(path), key: value})
    refused(path, pattern)


@pytest.mark.parametrize(
    ("name", "value", "pattern"),
    [
        ("potential.embedding", None, "lacks the tensor 'embedding'"),
        ("potential.references", None, "lacks the tensor 'references'"),
        ("potential.embedding", torch.zeros(2, 2), r"'embedding' has shape \(2, 2\)"),
        ("potential.embedding", torch.full((1, 3, 8), torch.nan), "NaN"),
        ("potential.readout.out.bias", torch.tensor([torch.inf]), "NaN or infinity"),
        ("potential.readout.hidden.bias", torch.tensor([torch.inf, -torch.inf, 0, 0]), "NaN or infinity"),
        ("potential.embedding", torch.zeros(1, 3, 8, dtype=torch.int64), "not real numbers"),
        ("potential.extra", torch.zeros(1), "unexpected tensors"),
        ("provenance.seen_frames", None, "seen_frames"),
        ("provenance.seen_frames", torch.zeros(3, 8, dtype=torch.uint8), "seen_frames"),
        ("provenance.seen_frames", torch.zeros(2, 8), "seen_frames"),
        ("calibration.numbers", None, "calibration.numbers"),
        ("calibration.numbers", torch.ones(3, dtype=torch.int64), "calibration frames"),
        ("calibration.n_atoms", torch.tensor([1, 1]), "calibration frames"),
        ("calibration.positions", torch.full((12, 3), torch.nan, dtype=torch.float64), "calibration frames"),
    ],
)
def test_wrong_tensors(path: Path, name: str, value: torch.Tensor | None, pattern: str) -> None:
    tensors = {key: tensor for key, tensor in read_file(path)[1].items() if key != name}
    rewrite(path, tensors=tensors if value is None else {**tensors, name: value})
    refused(path, pattern)


# -- writing --


def test_failing_disk_leaves_the_old_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = path.read_bytes()

    def full(self: Path, data: bytes) -> int:
        with self.open("wb") as handle:
            handle.write(data[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(FileFormatError, match=r"toy\.safetensors: No space left on device"):
        replace(make(), name="other").save(path)
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_interrupted_writing_leaves_the_old_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = path.read_bytes()

    def interrupt(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        make().save(path)
    assert path.read_bytes() == before
    assert len(list(path.parent.iterdir())) == 1


def a_tensor_too_many(metadata, tensors):
    return metadata, {**tensors, "potential.stages.0._constant0": torch.zeros(2)}


def a_tensor_too_few(metadata, tensors):
    return metadata, {name: value for name, value in tensors.items() if name != "potential.embedding"}


def other_hyper_parameters(metadata, tensors):
    return {**metadata, "hyper": {**metadata["hyper"], "channels": 16}}, tensors


def what_nobody_reads(metadata, tensors):
    return metadata, {**tensors, "calibration.masses": torch.ones(3)}


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (a_tensor_too_many, "unexpected tensors"),
        (a_tensor_too_few, "lacks the tensor 'embedding'"),
        (other_hyper_parameters, "shape"),
        (what_nobody_reads, "does not hold all"),
    ],
)
def test_what_cannot_be_read_back_is_not_written(path: Path, monkeypatch, broken, said: str) -> None:
    before = path.read_bytes()
    monkeypatch.setattr(force_field, "pack", lambda contents: broken(*serialization.pack(contents)))
    with pytest.raises(FileFormatError, match=r"toy\.safetensors is not written.*report") as caught:
        replace(make(), name="other").save(path)
    message = str(caught.value)
    assert said in message
    assert "\n" not in message
    assert ".tmp" not in message
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_bytes_that_change_on_their_way_are_noticed(path: Path, monkeypatch) -> None:
    before, write = path.read_bytes(), Path.write_bytes
    monkeypatch.setattr(Path, "write_bytes", lambda self, data: write(self, data[:-9] + b"\1" + data[-8:]))
    with pytest.raises(FileFormatError, match=r"is not written.*SHA-256"):
        replace(make(), name="other").save(path)
    assert path.read_bytes() == before


def test_unwritable_places(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileFormatError, match="choose a folder"):
        make().save(tmp_path / "file" / "model.safetensors")
    with pytest.raises(FileFormatError, match="is a folder"):
        make().save(tmp_path)
    with pytest.raises(FileFormatError, match="cannot write"):
        require_writable(tmp_path / "file" / "x")
    require_writable(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_written_file_has_ordinary_permissions(path: Path) -> None:
    (path.parent / "plain").write_text("x")
    assert path.stat().st_mode == (path.parent / "plain").stat().st_mode
    with safe_open(path, framework="pt") as handle:
        assert handle.metadata()["schema"] == "1"


def test_float64_weights_survive_a_round_trip_bitwise(tmp_path) -> None:
    torch.manual_seed(0)
    potential = build_potential("painn", {"channels": 4, "n_blocks": 1}, (1, 8)).double()
    saved = ForceField(name="exact", potential=potential)
    loaded = ForceField.load(saved.save(tmp_path / "exact.safetensors"))
    assert loaded.potential.dtype == torch.float64
    assert loaded.fingerprint == saved.fingerprint
