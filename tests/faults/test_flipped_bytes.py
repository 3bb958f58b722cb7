"""Every byte of a file flipped in turn: an error, or the same content; never something else without a word."""

import json
from pathlib import Path

import pytest

from ase_gffmerge.errors import CacheWarning, FileFormatError
from ase_gffmerge.forcefield.force_field import ForceField
from ase_gffmerge.storage.tensor_file import read_file, write_file
from ase_gffmerge.training.checkpoint import can_resume
from ase_gffmerge.workflows.cache import MergeCache
from helpers.faults import RECIPE, explains, same_content


def header_end(data: bytes) -> int:
    return 8 + int.from_bytes(data[:8], "little")


def flipped(data: bytes, place: int, mask: int) -> bytes:
    altered = bytearray(data)
    altered[place] ^= mask
    return bytes(altered)


def survivors(path: Path, places: range | list[int], mask: int) -> list[int]:
    """Flip places in turn; where the file can be read nevertheless, its content must be what it was."""
    data, original, unharmed = path.read_bytes(), ForceField.load(path), []
    for place in places:
        path.write_bytes(flipped(data, place, mask))
        try:
            found = ForceField.load(path)
        except FileFormatError as error:
            explains(error, named=path)
            continue
        assert same_content(found, original), f"byte {place}"
        unharmed.append(place)
    path.write_bytes(data)
    return unharmed


def padding(data: bytes) -> set[int]:
    """Places of the blanks that fill the header up."""
    end = header_end(data)
    return set(range(8 + len(data[8:end].rstrip()), end))


@pytest.mark.parametrize("stride", [7, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("mask", [0xFF, 0x01])
def test_every_byte_of_a_specialist(model, mask, stride):
    """Every seventh by default: coprime to the size of every number, so that each kind of byte is met."""
    data = model.read_bytes()
    assert set(survivors(model, range(0, len(data), stride), mask)) <= padding(data)


@pytest.mark.parametrize("stride", [11, pytest.param(3, marks=pytest.mark.slow)])
def test_every_byte_of_a_cached_potential(entry, stride):
    data = entry.read_bytes()
    places = [*range(8), *range(8, len(data), stride)]
    assert set(survivors(entry, places, 0x20)) <= padding(data)


def test_every_bit_of_the_lengths_and_of_the_version(model):
    data = model.read_bytes()
    schema = data.index(b'"schema":"') + len(b'"schema":"')
    for bit in range(8):
        assert survivors(model, [*range(8), schema], 1 << bit) == []


def test_blanks_become_other_blanks(model):
    """The one change that nobody notices, because it changes nothing."""
    data = model.read_bytes()
    places = sorted(padding(data))
    if not places:
        model.write_bytes(data)
        pytest.skip("this header needs no blanks")
    assert survivors(model, places, ord(" ") ^ ord("\t")) == places


def parts(data: bytes) -> list[int]:
    """One byte in each part of a file: lengths, keys, metadata, digest, every tensor."""
    end = header_end(data)
    header = json.loads(data[8:end])
    starts = [
        end + tensor["data_offsets"][0]
        for name, tensor in header.items()
        if name != "__metadata__" and tensor["data_offsets"][1] > tensor["data_offsets"][0]
    ]
    keys = [data.index(key) for key in (b"sha256", b"metadata", b"schema", b"dtype", b"shape")]
    digest = data.index(header["__metadata__"]["sha256"].encode())
    return [0, 3, 7, *keys, digest, digest + 63, end // 2, end - 1, *starts, len(data) - 1]


def test_flipped_entry_is_built_again(specialists, merged, entry):
    cache, data = MergeCache(entry.parent), entry.read_bytes()
    for place in parts(data):
        entry.write_bytes(flipped(data, place, 0x40))
        with pytest.warns(CacheWarning, match=entry.name):
            found, hit = cache.get_or_build(specialists, RECIPE, lambda: merged)
        assert not hit
        assert found.fingerprint == merged.fingerprint
        assert entry.read_bytes() == data, "the same merge gives the same file"


def test_flipped_checkpoint_is_set_aside(model, tmp_path):
    run = {"epochs": 3}
    path = tmp_path / "toy.checkpoint.safetensors"
    _, tensors = read_file(model)
    write_file(path, {"checkpoint": {"run": run}}, tensors)
    assert can_resume(path, run)
    data = path.read_bytes()
    path.write_bytes(flipped(data, len(data) - 5, 0x10))
    with pytest.warns(
        UserWarning, match=r"is not continued: it cannot be read.*kept as toy\.checkpoint\.old"
    ):
        assert not can_resume(path, run)
    assert (tmp_path / "toy.checkpoint.old.safetensors").exists()


@pytest.mark.parametrize("n_bytes", [1, 2, 7])
def test_truncated_at_many_lengths(model, n_bytes):
    data = model.read_bytes()
    for length in range(0, len(data), max(1, len(data) // (60 * n_bytes)) + n_bytes):
        model.write_bytes(data[:length])
        with pytest.raises(FileFormatError, match=model.name):
            ForceField.load(model)
    for more in (b"x", b"\0" * 8, data):
        model.write_bytes(data + more)
        with pytest.raises(FileFormatError, match=model.name):
            ForceField.load(model)


def test_file_that_is_overwritten_in_place_leaves_loaded_models_alone(model, tmp_path):
    """A copy over the same file must not reach into the memory of a running simulation."""
    loaded = ForceField.load(model)
    before = model.read_bytes()
    with model.open("r+b") as handle:
        handle.seek(header_end(before))
        handle.write(bytes(len(before) - handle.tell()))
    assert loaded.save(tmp_path / "again.safetensors").read_bytes() == before
