"""``gffmerge demo`` on the bundled specialists, with short dynamics."""

import json
from pathlib import Path

import pytest
from ase.io import read

NAMES = {"rmd17-ethanol", "rmd17-malonaldehyde"}
SHORT = ("--nvt-ps", 0.01, "--nve-ps", 0.005, "--device", "cpu")


def test_demo(gffmerge, merge_cache: Path, tmp_path: Path) -> None:
    document = gffmerge("demo", "--out", "results", "--cache-dir", merge_cache, *SHORT, "--json").json()
    assert list(document) == [
        "force_mae", "merge_seconds", "cache_hit", "nve_drift_per_atom", "steps_per_second",
    ]  # fmt: skip
    assert list(document["force_mae"]) == ["specialist", "mean", "paper", "ensemble", "gffmerge"]
    assert all(set(errors) == NAMES for errors in document["force_mae"].values())
    assert set(document["nve_drift_per_atom"]) == set(document["steps_per_second"]) == NAMES
    errors = document["force_mae"]
    for name in NAMES:
        assert errors["specialist"][name] < errors["gffmerge"][name] < errors["mean"][name] < 1
        assert errors["gffmerge"][name] < min(errors["paper"][name], errors["ensemble"][name])
        assert abs(document["nve_drift_per_atom"][name]) < 1e-3
    folder = tmp_path / "results"
    assert json.loads((folder / "demo.json").read_text()) == document
    assert "| gffmerge |" in (folder / "demo.md").read_text(encoding="utf-8")
    for picture in ("errors.png", "parity.png"):
        assert (folder / picture).read_bytes().startswith(b"\x89PNG")
    for name in NAMES:
        assert len(read(folder / f"{name}-nvt.traj", ":")) == 3
        assert read(folder / f"{name}-nve.traj", -1).get_forces().shape == (9, 3)

    again = gffmerge("demo", "--cache-dir", merge_cache, *SHORT, "--dtype", "float64")
    assert again.code == 0, again.err
    assert "(cached)" in again.out
    assert "no bond broke" in again.out
    assert (tmp_path / "gffmerge-demo" / "demo.md").is_file()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--out", "file/folder"), "cannot write"),
        (("--nvt-ps", 0), "--nvt-ps"),
        (("--device", "abacus"), "abacus"),
        (("--cache-dir", "file/cache"), "cache folder"),
    ],
)
def test_bad_input(gffmerge, tmp_path: Path, options: tuple[object, ...], words: str) -> None:
    (tmp_path / "file").touch()
    assert words in gffmerge("demo", *options).error()
