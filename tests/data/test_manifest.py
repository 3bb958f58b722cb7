"""Manifests: all shipped ones are valid, and mistakes give one clear error."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from ase_gffmerge.data.manifest import Manifest, list_manifests, load_manifest
from ase_gffmerge.errors import DataError

NAMES = ["3bpa", "acac", "lips20", "md17", "md22", "rmd17"]


def small_document() -> dict:
    return {
        "schema_version": 1,
        "name": "tiny",
        "title": "Tiny",
        "citations": [{"text": "Nobody (2000)"}],
        "licence": "CC0-1.0",
        "homepage": "http://localhost",
        "base_url": "http://localhost",
        "reader": "npz",
        "units": {"length": "Å", "energy": "kcal/mol", "force": "kcal/mol/Å"},
        "keys": {"z": "numbers"},
        "level_of_theory": "none",
        "elements": ["H"],
        "splits": "none",
        "files": [{"path": "a.npz", "system": "a", "sha256": "0" * 64}],
    }


def test_the_shipped_data_sets_are_listed() -> None:
    assert list_manifests() == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_shipped_manifest_is_valid(name: str) -> None:
    manifest = load_manifest(name)
    assert manifest.name == name
    assert manifest.licence
    assert all(file.sha256 or file.reason for file in manifest.files)
    assert {"npz": ".npz", "ase": ".xyz"}.get(manifest.reader, "") in manifest.files[0].path


def test_rmd17_has_five_verified_splits_of_ten_molecules() -> None:
    manifest = load_manifest("rMD17")
    assert len(manifest.systems) == 10
    assert len(manifest.files) == 100
    assert all(file.sha256 for file in manifest.files)


def test_lips20_folders_are_complete() -> None:
    names = {"box.npy", "coord.npy", "energy.npy", "force.npy", "virial.npy", "type.raw", "type_map.raw"}
    manifest = load_manifest("lips20")
    for system in manifest.systems:
        assert {Path(f.path).name for f in manifest.files if f.system == system} == names


def test_unknown_name_suggests_the_closest() -> None:
    with pytest.raises(DataError, match=r"unknown data set 'rmd71': did you mean rmd17"):
        load_manifest("rmd71")
    with pytest.raises(DataError, match="known data sets: 3bpa, acac"):
        load_manifest("zzzzzz")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"licnce": "MIT"}, "licnce: Extra inputs"),
        ({"elements": ["Xx"]}, "not an element symbol"),
        ({"files": []}, "files: List should have at least 1"),
        ({"files": [{"path": "../a", "system": "a", "sha256": "0" * 64}]}, "must be a relative path"),
        ({"files": [{"path": "/a", "system": "a", "sha256": "0" * 64}]}, "must be a relative path"),
        ({"files": [{"path": "a", "system": "a", "sha256": "xyz"}]}, "sha256: String should match"),
        ({"files": [{"path": "a", "system": "a", "sha256": None}]}, "the reason why there is none"),
        ({"files": [{"path": "a", "system": "a", "sha256": "0" * 64}] * 2}, "listed more than once: a"),
        ({"base_url": "ftp://x"}, "base_url"),
        ({"schema_version": 2}, "schema_version"),
    ],
)
def test_invalid_documents_are_refused(tmp_path: Path, change: dict, message: str) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(small_document() | change, allow_unicode=True), encoding="utf-8")
    with pytest.raises(DataError, match=message) as caught:
        load_manifest(path)
    assert str(path) in str(caught.value)


def test_a_manifest_of_the_user(tmp_path: Path) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(small_document(), allow_unicode=True), encoding="utf-8")
    assert load_manifest(path) == load_manifest(str(path)) == Manifest.model_validate(small_document())


def test_missing_and_broken_yaml(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot read the manifest"):
        load_manifest(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [1", encoding="utf-8")
    with pytest.raises(DataError, match="not valid YAML"):
        load_manifest(tmp_path / "bad.yaml")


def test_data_imports_no_torch() -> None:
    modules = "download, manifest, readers, frames"
    code = f"import sys; from ase_gffmerge.data import {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
