"""Calibration frames that a merge lets its specialists sample."""

from dataclasses import replace
from pathlib import Path

import pytest
from ase import Atoms
from ase.build import molecule
from ase.io import write

from ase_gffmerge import ForceField, GFFMergeCalculator
from ase_gffmerge.cli import app
from ase_gffmerge.errors import ArgumentError, FileFormatError, FramesError, StructureError
from ase_gffmerge.sampling import on_request
from ase_gffmerge.sampling.calibration_frames import SampleOptions
from ase_gffmerge.sampling.on_request import file_of_frames, with_frames

NAMES = ("ethanol", "malonaldehyde")


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The bundled pair without frames, a structure of each, and few frames to be sampled."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GFFMERGE_CACHE", str(tmp_path / "cache"))
    few = SampleOptions(n=3, temperatures=(300.0,), time=0.02, equilibration=0.01, relax=False, rattled=0.0)
    monkeypatch.setattr(on_request, "SampleOptions", lambda: few)
    for name in NAMES:
        specialist = ForceField.load(f"rmd17-{name}")
        write(f"{name}.xyz", specialist.calibration[0])
        replace(specialist, name=name, calibration=()).save(f"{name}.safetensors")
    return tmp_path


FILES = [f"{name}.safetensors" for name in NAMES]
SAMPLED = [f"sample:{name}.xyz" for name in NAMES]


def test_a_calculator_samples_once_and_finds_the_merge_again(folder, monkeypatch):
    arguments = {"calibration": SAMPLED, "recipe": "mean", "device": "cpu"}
    calc = GFFMergeCalculator(FILES, **arguments)
    assert {row.specialist for row in calc.report.disagreements} == set(NAMES)
    monkeypatch.setattr(on_request, "sample_frames", None)  # would be a TypeError
    again = GFFMergeCalculator(FILES, **arguments)
    assert (calc.cache_hit, again.cache_hit) == (False, True)
    ethanol = molecule("CH3CH2OH")
    assert again.get_potential_energy(ethanol) == calc.get_potential_energy(ethanol)
    assert GFFMergeCalculator(**calc.parameters).force_field.fingerprint == calc.force_field.fingerprint
    write("ethanol.xyz", ethanol)  # another start: another merge
    with pytest.raises(TypeError):
        GFFMergeCalculator(FILES, **arguments)


def test_sampled_from_frames_that_are_held(folder):
    specialist = ForceField.load("rmd17-ethanol")
    (later,) = with_frames(specialist, "sample")
    assert len(later.starts) == on_request.MOST_STARTS
    sampled = later.sample(device=specialist.potential.device)
    assert len(sampled.calibration) == 3
    assert sampled.fingerprint == specialist.fingerprint
    assert {atoms.get_chemical_formula() for atoms in sampled.calibration} == {"C2H6O"}


def test_the_command_line_samples_and_its_advice_can_be_followed(folder, capsys):
    def gffmerge(*arguments: str) -> str:
        code = 0
        try:
            app(["merge", *FILES, "--recipe", "mean", *arguments], prog_name="gffmerge")
        except SystemExit as stop:
            code = stop.code or 0
        assert code in (0, 2)
        return capsys.readouterr().err if code else ""

    without = gffmerge("--recipe", "gffmerge", "--out", "m.safetensors")
    assert "--calibration A B" in without
    assert "sample:FILE" in without
    nothing_to_start_from = gffmerge("--out", "m.safetensors", "--calibration", "sample")
    assert "sample:FILE, in place of sample" in nothing_to_start_from
    lost = gffmerge("--out", "ethanol.xyz", "--overwrite", "--calibration", *SAMPLED)
    assert "it is the input" in lost
    assert gffmerge("--out", "m.safetensors", "--calibration", *SAMPLED) == ""
    assert ForceField.load("m.safetensors").specialist_names == NAMES
    mixed = ("--calibration", "malonaldehyde.xyz", "own")
    assert "2 specialists" in gffmerge("--out", "n.safetensors", "--calibration", "sample:ethanol.xyz")
    assert gffmerge("--out", "n.safetensors", *mixed) == ""


def test_what_cannot_be_sampled_is_refused(folder):
    with pytest.raises(FramesError, match="sample:FILE"):
        with_frames(FILES, "sample")
    with pytest.raises(ArgumentError, match="each of the 2 specialists"):
        with_frames(FILES, [SAMPLED[0]])
    with pytest.raises((FileFormatError, FramesError), match="none"):
        with_frames(FILES, ["sample:none.xyz", SAMPLED[1]])
    write("salt.xyz", Atoms("NaCl", [[0, 0, 0], [0, 0, 2.4]]))
    with pytest.raises(StructureError, match="Na"):
        with_frames(FILES, ["sample:salt.xyz", SAMPLED[1]])


def test_a_file_of_that_name_is_a_file(folder):
    assert file_of_frames("sample") is None
    assert file_of_frames("sample:a.xyz") == "a.xyz"
    assert file_of_frames("samples.xyz") == "samples.xyz"
    Path("sample").write_bytes(Path("ethanol.xyz").read_bytes())
    assert file_of_frames("sample") == "sample"
