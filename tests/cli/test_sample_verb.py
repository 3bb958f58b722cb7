"""``gffmerge sample``."""

import pytest
from ase.build import molecule
from ase.io import read, write

from ase_gffmerge import ForceField


@pytest.fixture
def ethanol(tmp_path):
    path = tmp_path / "ethanol.xyz"
    write(path, molecule("CH3CH2OH"))
    return path


def test_frames_are_written_and_attached(gffmerge, ethanol, tmp_path):
    few = ("--frames", 5, "--temperatures", 100, 200, "--time", 0.24, "--copies", 1, "--no-relax")
    document = gffmerge(
        "sample", "rmd17-ethanol", ethanol, "--out", "f.extxyz", "--attach", "s.safetensors", *few, "--json"
    ).json()
    assert document["n_frames"] == document["wanted"] == 5
    assert document["sources"] == {"md": 4, "rattled": 1}
    assert document["rejected"] == {}
    frames = read(tmp_path / "f.extxyz", ":")
    assert [atoms.info["source"] for atoms in frames] == ["md"] * 4 + ["rattled"]
    assert {atoms.info["temperature"] for atoms in frames[:4]} == {100, 200}
    assert all(atoms.calc is None for atoms in frames)
    attached = ForceField.load(tmp_path / "s.safetensors")
    assert attached.fingerprint == ForceField.load("rmd17-ethanol").fingerprint
    assert len(attached.calibration) == 5


def test_bad_requests_are_refused_in_one_line(gffmerge, ethanol):
    assert "nowhere to go" in gffmerge("sample", "rmd17-ethanol", ethanol).error()
    assert ".extxyz" in gffmerge("sample", "rmd17-ethanol", ethanol, "--out", "frames.npz").error()
    assert ".safetensors" in gffmerge("sample", "rmd17-ethanol", ethanol, "--attach", "frames.xyz").error()
    wrong = gffmerge("sample", "rmd17-ethanol", ethanol, "--out", "f.xyz", "--frames", 0)
    assert "'--frames': Input should be greater than or equal to 1" in wrong.error()
    cold = gffmerge(
        "sample", "rmd17-ethanol", ethanol, "--out", "f.xyz", "--temperatures=300", "--temperatures=-5"
    )
    assert "temperatures.1: Input should be greater than or equal to 0" in cold.error()
    assert "no frames" in gffmerge("sample", "rmd17-ethanol", "none.xyz", "--out", "f.xyz").error()


def test_unknown_elements_are_refused(gffmerge, tmp_path):
    write(tmp_path / "hcl.xyz", molecule("HCl"))
    assert "Cl" in gffmerge("sample", "rmd17-ethanol", "hcl.xyz", "--out", "f.xyz").error()
