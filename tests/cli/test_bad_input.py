"""What cannot be run ends in one line, exit code 2 and no file, before anything is computed."""

from pathlib import Path

import pytest
import torch
from ase.build import molecule
from ase.io import read, write

from ase_gffmerge.errors import DeviceError, DynamicsError
from ase_gffmerge.evaluation.benchmark.harness import ROWS, Bench
from ase_gffmerge.evaluation.md.runs import Protocol
from ase_gffmerge.forcefield.force_field import ForceField
from ase_gffmerge.runtime.devices import resolve_device

WATER = ("water.safetensors", "water.xyz")
NVT = ("--ensemble", "nvt", "--steps", 2, "--out", "out.traj")
DIAMOND = ("base.safetensors", "diamond.cif", "--ensemble", "npt", "--steps", 2, "--out", "out.traj")
BAD = [
    (("md", *WATER, *NVT, "--temperature", 300, "--seed", -1), "a seed of -1"),
    (("md", *WATER, *NVT, "--temperature", 300, "--friction", -1), "a friction of -1"),
    (("md", *WATER, *NVT, "--temperature", 300, "--friction", "nan"), "a friction of nan"),
    (("md", *WATER, *NVT, "--temperature", "inf"), "inf K are impossible"),
    (("md", *WATER, *NVT, "--temperature", "nan"), "nan K are impossible"),
    (("md", *WATER, *NVT, "--temperature", 300, "--timestep", "inf"), "a time step of inf fs"),
    (("md", *DIAMOND, "--temperature", 300, "--pressure", "nan"), "a pressure of nan GPa"),
    (("md", *DIAMOND, "--temperature", 300, "--pressure", "inf"), "a pressure of inf GPa"),
    (("md", *DIAMOND, "--temperature", 0), "npt has no thermostat for 0 K"),
    (("md", *WATER, *NVT[:-1], "water.xyz", "--temperature", 300), "it is the input"),
    (("md", *WATER, *NVT[:-1], "../{}/water.xyz", "--temperature", 300), "it is the input"),
    (("relax", *WATER, "--out", "water.xyz"), "it is the input"),
    (("relax", *WATER, "--out", "out.xyz", "--steps", 0), "Invalid value for '--steps'"),
    (("relax", *WATER, "--out", "out.xyz", "--fmax", "nan"), "nan is not positive and finite"),
    (("relax", *WATER, "--out", "out.xyz", "--fmax", -1), "-1 is not positive and finite"),
    (("relax", *WATER, "--out", "out.gif"), "cannot write the structure to out.gif"),
    (("relax", *WATER, "--out", "out.db"), "cannot write the structure to out.db"),
    (("relax", *WATER, "--out", "out.xyz.gz"), "cannot write the structure to out.xyz.gz"),
    (("relax", *WATER, "--out", "out.vasp"), "in the format 'vasp'"),
    (("sample", *WATER, "--out", "water.xyz", "--frames", 1), "it is the input"),
    (("merge", "base.safetensors", "water.safetensors", "--out", "water.safetensors"), "it is the input"),
    (("distill", "base.safetensors", "water.safetensors", "--out", "base.safetensors"), "it is the input"),
    (("train", "water.xyz", "--init", "base.safetensors", "--out", "base.safetensors"), "it is the input"),
    (("convert", "water.safetensors", "water.safetensors"), "it is the input"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[f"{i}-{row[0][0]}" for i, row in enumerate(BAD)])
def test_one_line_and_no_file(gffmerge, files: Path, arguments: tuple[object, ...], message: str) -> None:
    before = {path: path.read_bytes() for path in files.iterdir()}
    assert message in gffmerge(*(str(argument).format(files.name) for argument in arguments)).error()
    assert {path: path.read_bytes() for path in files.iterdir()} == before


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("option", [("--timestep", 1e200), ("--timestep", 1e5, "--steps", 5)])
def test_integrators_that_give_up(gffmerge, files: Path, option: tuple[object, ...]) -> None:
    ended = gffmerge("md", *DIAMOND, "--temperature", 300, *option)
    assert ended.code == 2
    assert "the integrator cannot go on (" in ended.err.splitlines()[-1]


@pytest.mark.parametrize("device", ["mps", "meta", "privateuseone", "xpu:0"])
@pytest.mark.parametrize(
    "verb", [("md", *WATER, *NVT, "--temperature", 300), ("evaluate", *WATER), ("benchmark", WATER[0])]
)
def test_devices_that_are_not_supported(gffmerge, files: Path, verb, device: str) -> None:
    assert f"devices of type '{device.partition(':')[0]}'" in gffmerge(*verb, "--device", device).error()


def test_devices_in_python() -> None:
    assert resolve_device(torch.device("cpu")) == torch.device("cpu")
    with pytest.raises(DeviceError, match="'meta' are not supported"):
        resolve_device(torch.device("meta"))


@pytest.mark.parametrize("suffix", ["xyz", "cif", "vasp", "json", "res", "traj"])
def test_formats_that_hold_a_crystal(gffmerge, files: Path, suffix: str) -> None:
    arguments = ("relax", "base.safetensors", "diamond.cif", "--out", f"out.{suffix}", "--steps", 1)
    assert gffmerge(*arguments).code in (0, 1)
    written = read(files / f"out.{suffix}")
    assert sorted(written.numbers) == [6] * 8
    assert {path.name for path in files.iterdir() if path.name.startswith(".")} == set()


def test_what_exists_is_replaced_only_when_told(gffmerge, files: Path) -> None:
    write(files / "out.traj", molecule("H2O"))
    run = ("md", *WATER, *NVT, "--temperature", 1, "--interval", 1)
    assert "out.traj exists; choose another name, or replace it with --overwrite" in gffmerge(*run).error()
    assert len(read("out.traj", ":")) == 1
    assert gffmerge(*run, "--overwrite").code == 0
    assert len(read("out.traj", ":")) == 3


EXISTING = [
    ("relax", *WATER, "--out", "x.xyz"),
    ("train", "water.xyz", "--out", "x.safetensors", "--config", "tiny.yaml"),
    ("train", "water.xyz", "--out", "new.safetensors", "--config", "tiny.yaml"),
    ("merge", "methanol.safetensors", "water.safetensors", "--out", "x.safetensors"),
    ("merge", "methanol.safetensors", "water.safetensors", "--out", "new.safetensors", "--report", "x.html"),
    ("distill", "methanol.safetensors", "water.safetensors", "--out", "x.safetensors"),
    ("sample", *WATER, "--out", "x.xyz"),
    ("sample", *WATER, "--attach", "x.safetensors"),
    ("convert", "water.safetensors", "x.safetensors"),
    ("benchmark", WATER[0], "--plot", "new.png"),
    ("compare", "methanol.safetensors", "water.safetensors", "--markdown", "x.html"),
    ("demo", "--out", "."),
]


@pytest.mark.parametrize("arguments", EXISTING, ids=[f"{i}-{row[0]}" for i, row in enumerate(EXISTING)])
def test_no_verb_replaces_a_file_untold(gffmerge, files: Path, arguments: tuple[object, ...]) -> None:
    for name in ("x.xyz", "x.safetensors", "x.html", "new.png", "demo.json"):
        (files / name).write_text("precious")
    before = {path: path.read_bytes() for path in files.iterdir()}
    assert "exists; choose another name, or replace it with --overwrite" in gffmerge(*arguments).error()
    assert {path: path.read_bytes() for path in files.iterdir()} == before


@pytest.mark.parametrize("field", ["picoseconds", "temperature", "timestep"])
@pytest.mark.parametrize("value", [float("inf"), float("nan"), -1.0])
def test_protocols_that_cannot_be_run(field: str, value: float) -> None:
    with pytest.raises(DynamicsError, match="must be positive and finite"):
        Protocol(**{field: value})


@pytest.mark.parametrize("row", ["merge", "cache", "ensemble"])
def test_rows_that_a_single_force_field_cannot_have_say_so(files: Path, row: str) -> None:
    single = ForceField.load(files / "water.safetensors")
    (found,) = ROWS[row](
        Bench(specialists=(single,), force_field=single, calculator=pytest.fail, from_files=pytest.fail)
    )
    assert found.ratio is None
    assert found.note == "a single force field: nothing was merged"


@pytest.mark.parametrize(
    "verb", [("md", *WATER, *NVT, "--temperature", 300), ("relax", *WATER, "--out", "out.xyz")]
)
def test_dispersion_that_is_not_understood(gffmerge, files, verb: tuple[str, ...]) -> None:
    assert "dispersion='pbe' is not understood" in gffmerge(*verb, "--dispersion", "pbe").error()
