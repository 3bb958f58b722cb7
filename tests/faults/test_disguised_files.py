"""Files that are not what their name says: refused by name, without executing or allocating anything."""

import io
import json
import pickle
import resource
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ase_gffmerge import GFFMergeCalculator
from ase_gffmerge.errors import CacheWarning, FileFormatError
from ase_gffmerge.forcefield.force_field import ForceField
from ase_gffmerge.storage.documents import shown
from ase_gffmerge.storage.tensor_file import SCHEMA, digest, read_file, read_metadata
from ase_gffmerge.workflows.cache import MergeCache
from helpers.faults import RECIPE, explains, same_content


def refused(path: Path, pattern: str | None = None) -> None:
    """Loading is refused in one line that names the file; reading alone is, or gives what is there."""
    for load in (ForceField.load, GFFMergeCalculator):
        with pytest.raises(FileFormatError, match=pattern) as caught:
            load(path)
        explains(caught.value, named=path)
    for read in (read_metadata, read_file):
        try:
            read(path)
        except FileFormatError as error:
            explains(error, named=path)


# -- what would execute --


class Bomb:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple:
        return Path.touch, (self.mark,)


def pickled(bomb: Bomb) -> bytes:
    return pickle.dumps(bomb)


def torch_saved(bomb: Bomb) -> bytes:
    buffer = io.BytesIO()
    torch.save({"weights": bomb}, buffer)
    return buffer.getvalue()


def torch_saved_long_ago(bomb: Bomb) -> bytes:
    buffer = io.BytesIO()
    torch.save({"weights": bomb}, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def numpy_saved(bomb: Bomb) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([bomb], dtype=object), allow_pickle=True)
    return buffer.getvalue()


def zipped(bomb: Bomb) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(bomb))
        archive.writestr("__main__.py", f"open({str(bomb.mark)!r}, 'w')")
    return buffer.getvalue()


def script(bomb: Bomb) -> bytes:
    return f"#!/usr/bin/env python\nopen({str(bomb.mark)!r}, 'w')\n".encode()


def behind_a_header(bomb: Bomb) -> bytes:
    """A right header, and a pickle where the tensors should be."""
    payload = pickle.dumps(bomb)
    header = json.dumps({"x": {"dtype": "U8", "shape": [len(payload)], "data_offsets": [0, len(payload)]}})
    return struct.pack("<Q", len(header)) + header.encode() + payload


@pytest.mark.parametrize(
    "disguise",
    [pickled, torch_saved, torch_saved_long_ago, numpy_saved, zipped, script, behind_a_header],
    ids=lambda make: make.__name__,
)
def test_nothing_is_executed(tmp_path, disguise):
    mark, path = tmp_path / "executed", tmp_path / "model.safetensors"
    path.write_bytes(disguise(Bomb(mark)))
    refused(path)
    assert not mark.exists()


def test_nothing_in_the_cache_is_executed(entry, tmp_path):
    mark = tmp_path / "executed"
    entry.write_bytes(torch_saved(Bomb(mark)))
    checks = MergeCache(entry.parent).verify()
    assert [check.ok for check in checks] == [False]
    assert "Pickled checkpoints are never opened" in checks[0].problem
    assert not mark.exists()


def test_the_bomb_works(tmp_path):
    """Otherwise the tests above prove nothing."""
    pickle.loads(pickled(Bomb(tmp_path / "executed")))
    assert (tmp_path / "executed").exists()


# -- headers --


def file_of(header: object, tensors: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + tensors


def tensor(shape: list, offsets: list, dtype: str = "F32") -> dict:
    return {"x": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


OURS = {"__metadata__": {"format": "ase-gffmerge", "schema": str(SCHEMA), "metadata": "{}", "sha256": ""}}


@pytest.mark.parametrize(
    "size", [0, 1, 7, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1], ids=lambda n: f"{n:g}"
)
@pytest.mark.parametrize(
    "rest", [b"", b"{}", bytes(64), json.dumps(OURS).encode()], ids=["nothing", "empty", "zeros", "header"]
)
def test_absurd_header_sizes(tmp_path, size, rest):
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", size) + rest)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000, "kB"


HEADERS = {
    "no JSON": b"nonsense",
    "no object": [1, 2],
    "null": None,
    "deep": b"[" * 100_000 + b"]" * 100_000,
    "deep objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "deep metadata": {
        "__metadata__": {"format": "ase-gffmerge", "schema": str(SCHEMA), "metadata": "[" * 10**5}
    },
    "metadata that is no object": {"__metadata__": [1]},
    "metadata of numbers": {"__metadata__": {"format": 1}},
    "not UTF-8": b'{"\xff": 1}',
    "lone surrogate": b'{"__metadata__": {"format": "\\ud800"}}',
    "a number of 10000 digits": b'{"x": ' + b"9" * 10_000 + b"}",
    "infinity": b'{"x": Infinity}',
    "tensor that is no object": {"x": 1},
    "tensor without shape": {"x": {"dtype": "F32", "data_offsets": [0, 4]}},
    "shape that overflows": tensor([2**33, 2**33], [0, 4]),
    "shape of 2^64": tensor([2**64], [0, 4]),
    "empty by an overflowing shape": tensor([0, 2**63], [0, 0]),
    "negative shape": tensor([-1], [0, 4]),
    "shape of a fraction": tensor([1.5], [0, 4]),
    "larger than the data": tensor([1000], [0, 4000]),
    "shape against offsets": tensor([3], [0, 4]),
    "offsets backwards": tensor([1], [4, 0]),
    "negative offsets": tensor([1], [-4, 0]),
    "offsets beyond the end": tensor([1], [2**63, 2**63 + 4]),
    "offsets that overflow": tensor([1], [2**64 - 4, 2**64]),
    "three offsets": tensor([1], [0, 2, 4]),
    "a hole before the data": tensor([1], [4, 8]),
    "overlap": tensor([1], [0, 4]) | {"y": tensor([1], [0, 4])["x"]},
    "overlap in part": tensor([2], [0, 8]) | {"y": tensor([2], [4, 12])["x"]},
    "unknown type": tensor([1], [0, 4], "F31"),
    "type of half a byte": tensor([8], [0, 4], "F4"),
    "type that torch has not": tensor([4], [0, 4], "F8_E8M0"),
    "type of nothing": tensor([1], [0, 4], ""),
}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS.keys())
def test_header_bombs(tmp_path, header):
    path = tmp_path / "model.safetensors"
    for tail in (b"", bytes(4), bytes(8), bytes(12)):
        path.write_bytes(file_of(header, tail))
        refused(path)


def test_duplicated_keys(model):
    """Whichever of two of one name is taken: either it is the right one, or the file is refused."""
    original = ForceField.load(model)
    data = model.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = data[8:end].decode()
    name = '"potential.embedding":'
    entry = json.dumps(json.loads(header)["potential.readout.out.bias"])
    for changed in (
        header.replace("{", "{" + f"{name}{entry},", 1),
        header.rstrip()[:-1] + f",{name}{entry}}}",
        header.replace("{", '{"__metadata__":{"format":"ase-gffmerge"},', 1),
        header.rstrip()[:-1] + ',"__metadata__":{"format":"ase-gffmerge"}}',
    ):
        model.write_bytes(file_of(changed.encode(), data[end:]))
        try:
            assert same_content(ForceField.load(model), original)
        except FileFormatError as error:
            explains(error, named=model)


# -- content with a right digest, as only a program can write it --


def rewrite(
    path: Path, *, metadata: dict | str | None = None, tensors: dict | None = None, **header: str
) -> None:
    old_metadata, old_tensors = read_file(path)
    text = metadata if isinstance(metadata, str) else json.dumps(metadata or old_metadata, sort_keys=True)
    tensors = old_tensors | (tensors or {})
    standard = {
        "format": "ase-gffmerge",
        "schema": str(SCHEMA),
        "metadata": text,
        "sha256": digest(text, tensors),
    }
    save_file(tensors, path, metadata={**standard, **header})


@pytest.mark.parametrize("version", [SCHEMA + 1, 99])
def test_newer_version(model, version):
    rewrite(model, schema=str(version))
    refused(model, f"schema version '{version}'.*written by a newer one: install the version that wrote it")


@pytest.mark.parametrize("version", ["0", "-1", "1.5", "", " 2", "２", "9" * 5000, "banana"])
def test_no_version(model, version):
    rewrite(model, schema=version)
    with pytest.raises(
        FileFormatError, match=r"schema version .*install the version that wrote it"
    ) as caught:
        ForceField.load(model)
    assert "newer one: " not in str(caught.value)


def test_announced_frames_must_be_there(model):
    metadata = read_metadata(model)
    del metadata["provenance"]["seen_frames"]
    rewrite(model, metadata=metadata)
    with pytest.raises(FileFormatError, match="seen_frames"):
        ForceField.load(model)


TYPES = [torch.int64, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(
    "name", ["potential.embedding", "potential.readout.out.weight", "potential.references"]
)
def test_wrong_types_of_weights(model, name, dtype):
    value = read_file(model)[1][name]
    rewrite(model, tensors={name: value.to(dtype)})
    refused(model, name.removeprefix("potential."))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("potential.embedding", torch.bfloat16),
        ("potential.readout.out.weight", torch.float16),
        ("potential.references", torch.float32),
        ("calibration.positions", torch.int64),
        ("calibration.numbers", torch.float64),
        ("calibration.n_atoms", torch.bool),
        ("calibration.pbc", torch.int64),
        ("extrapolation_grade.species", torch.float32),
        ("extrapolation_grade.species", torch.uint8),
        ("extrapolation_grade.whitening", torch.int32),
        ("provenance.seen_frames", torch.float32),
    ],
    ids=str,
)
def test_types_that_do_not_fit_the_others(model, name, dtype):
    rewrite(model, tensors={name: read_file(model)[1][name].to(dtype)})
    refused(model)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("extrapolation_grade.species", torch.tensor([1, 6, 119])),
        ("extrapolation_grade.species", torch.tensor([1, 6, -8])),
        ("extrapolation_grade.species", torch.tensor([1, 6, 6])),
        ("extrapolation_grade.whitening", torch.zeros(3, 5, 5)),
        ("extrapolation_grade.whitening", torch.zeros(3, 0, 0)),
        ("calibration.numbers", torch.full((9,), 200)),
        ("calibration.n_atoms", torch.tensor([2**62, 2**62, 2**62, 2**62])),
        ("calibration.cells", torch.full((2, 3, 3), torch.inf, dtype=torch.float64)),
        ("calibration.cells", torch.zeros(2, 3, dtype=torch.float64)),
        ("calibration.pbc", torch.zeros(6, dtype=torch.bool)),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.shape)),
)
def test_values_that_cannot_be(model, name, value):
    rewrite(model, tensors={name: value})
    refused(model)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("name", 5),
        ("name", None),
        ("level_of_theory", ["PBE"]),
        ("species", [1, 6, 6]),
        ("species", [0, 6, 8]),
        ("species", [-1, 6, 8]),
        ("species", [1.0, 6, 8]),
        ("species", [True, 6, 8]),
        ("species", "CHO"),
        ("species", {}),
        ("hyper", []),
        ("hyper", {"channels": 10**12}),
        ("hyper", {"channels": 10**400}),
        ("hyper", {"n_blocks": 10**9}),
        ("hyper", {"cutoff": float("nan")}),
        ("hyper", {"cutoff": -1.0}),
        ("hyper", {"cutoff": 10**400}),
        ("hyper", {"n_radial": 3.0}),
        ("hyper", {"n_radial": True}),
        ("hyper", {"readout_width": 8, "readout_blocks": 9}),
        ("provenance", {"lineage": "abc", "seen_frames": 1}),
        ("provenance", {"lineage": [1], "seen_frames": 1}),
        ("provenance", {"lineage": [], "seen_frames": 1, "errors": {"mae": "small"}}),
        ("provenance", {"lineage": [], "seen_frames": 1, "epochs": "many"}),
        ("merged", {"specialists": "ab", "fingerprints": [], "recipe": {}, "report": {}, "cache_key": ""}),
        ("merged", {"specialists": [], "fingerprints": [], "recipe": [], "report": {}, "cache_key": ""}),
        ("merged", {"specialists": [], "fingerprints": [], "recipe": {}, "report": {}, "cache_key": 1}),
        ("merged", 5),
    ],
    ids=lambda value: value if isinstance(value, str) else shown(value),
)
def test_metadata_that_cannot_be(model, key, value):
    metadata = read_metadata(model)
    if key == "hyper" and isinstance(value, dict):
        value = {**metadata["hyper"], **value}
    rewrite(model, metadata={**metadata, key: value})
    refused(model)


def test_report_that_is_none(model):
    record = {
        "specialists": ["a", "b"],
        "fingerprints": ["1", "2"],
        "recipe": {},
        "report": {"layers": 5},
        "cache_key": "",
    }
    rewrite(model, metadata={**read_metadata(model), "merged": record})
    calc = GFFMergeCalculator(model)
    with pytest.raises(
        FileFormatError, match=r"the merge report is garbled at 'specialists'.*merge the specialists"
    ):
        assert calc.report


def test_disguise_in_a_list_of_specialists(files, tmp_path):
    files[1].write_bytes(pickled(Bomb(tmp_path / "executed")))
    with pytest.raises(FileFormatError, match=r"b\.safetensors is not a readable safetensors file"):
        GFFMergeCalculator(files, cache_dir=tmp_path / "cache")
    assert not (tmp_path / "executed").exists()
    assert not (tmp_path / "cache").exists()


def test_disguised_entry_is_replaced(specialists, merged, entry, tmp_path):
    entry.write_bytes(zipped(Bomb(tmp_path / "executed")))
    with pytest.warns(CacheWarning, match=entry.name):
        MergeCache(entry.parent).get_or_build(specialists, RECIPE, lambda: merged)
    assert not (tmp_path / "executed").exists()
    assert [check.ok for check in MergeCache(entry.parent).verify()] == [True]
