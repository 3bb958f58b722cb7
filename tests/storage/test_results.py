"""Finished results on disk: exact, whole or absent, found again by key whatever file they are in."""

from pathlib import Path

import numpy as np
import pytest

from ase_gffmerge.errors import FileFormatError
from ase_gffmerge.storage.results import ResultStore

RECORDS = {
    "a": {"energy": 0.1 + 0.2, "forces": np.arange(6.0).reshape(2, 3), "rigid": np.zeros((0, 3)), "steps": 3},
    "b": {"energy": -1e-300, "forces": np.ones((4, 3), dtype=np.float32), "flags": np.array([True, False])},
    "c": {"energy": float("inf"), "forces": np.arange(3), "note": {"of": ["anything", None]}},
}


def same(one: object, other: object) -> bool:
    if isinstance(one, np.ndarray):
        return isinstance(other, np.ndarray) and one.dtype == other.dtype and np.array_equal(one, other)
    return one == other and type(one) is type(other)


def test_records_come_back_as_they_were(tmp_path: Path) -> None:
    ResultStore(tmp_path).keep(RECORDS)
    found = ResultStore(tmp_path).find(["a", "b", "c", "missing"])
    assert set(found) == set(RECORDS)
    for key, record in RECORDS.items():
        assert set(found[key]) == set(record)
        assert all(same(record[name], found[key][name]) for name in record)


def test_results_are_found_whatever_file_they_are_in(tmp_path: Path) -> None:
    store = ResultStore(tmp_path / "made when it is missing")
    assert store.find(["a"]) == {}
    store.keep({"a": RECORDS["a"]})
    store.keep({key: RECORDS[key] for key in "bc"})
    assert list(store.find(["c"])) == ["c"]
    assert set(store.find("abc")) == set("abc")


def test_what_is_damaged_or_something_else_is_absent(tmp_path: Path) -> None:
    store = ResultStore(tmp_path)
    whole, damaged = store.keep({"a": RECORDS["a"]}), store.keep({"b": RECORDS["b"]})
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(data)
    (tmp_path / "notes.safetensors").write_text("no such file")
    (tmp_path / f".{whole.name}.0123.tmp").write_bytes(whole.read_bytes()[:100])
    assert set(store.find("ab")) == {"a"}
    store.keep({"a": RECORDS["a"]})
    assert not list(tmp_path.glob(".*.tmp")), "what a killed writer of the same results left is gone"


def test_fresh_finds_nothing_and_replaces(tmp_path: Path) -> None:
    ResultStore(tmp_path).keep({"a": {"energy": 1.0}, "b": {"energy": 1.0}})
    again = ResultStore(tmp_path, fresh=True)
    assert again.find(["a"]) == {}
    again.keep({"a": {"energy": 2.0}})
    assert ResultStore(tmp_path).find("ab") == {"a": {"energy": 2.0}, "b": {"energy": 1.0}}


def test_a_folder_that_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FileFormatError, match="choose a folder you may write to"):
        ResultStore(tmp_path / "file")
