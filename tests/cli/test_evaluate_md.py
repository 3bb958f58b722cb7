"""``gffmerge evaluate`` with several models, and with ``--md``."""

import json
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.io import read, write
from ase.units import GPa

from ase_gffmerge.cli.output import duration
from helpers.toys import labelled

VOIGT = ([0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1])
SHORT = ("--md", "--time", 0.04, "--seeds", 2, "--temperature", 50)


def test_several_models_side_by_side(gffmerge, files: Path) -> None:
    single = gffmerge("evaluate", "methanol.safetensors", "methanol.xyz", "--json").json()
    assert single["force_mae"] > 0
    both = gffmerge("evaluate", "methanol.safetensors", "water.safetensors", "methanol.xyz", "--json").json()
    assert set(both["models"]) == {"methanol", "water"}
    assert both["models"]["methanol"] == single
    assert both["models"]["water"] != single
    shown = gffmerge("evaluate", "methanol.safetensors", "water.safetensors", "methanol.xyz").out
    assert ["model", "methanol", "water"] in [line.split() for line in shown.splitlines()]
    assert f"{1000 * single['force_mae_by_element']['C']:.2f}" in shown


def test_predictions_and_parity_plot(gffmerge, files: Path) -> None:
    """Frames with stresses, one isolated atom, and two models."""
    crystals = [bulk("C", "diamond", a=a, cubic=True) for a in (3.4, 3.5, 3.6)]
    frames = [labelled(Atoms("H")), *(labelled(a, stress=True) for a in crystals)]
    write("crystals.extxyz", [*frames, *read("water.xyz", ":")])
    models = ("water.safetensors", "methanol.safetensors")
    files_wanted = ("--out", "new/predictions.extxyz", "--plot", "parity.png")
    result = gffmerge("evaluate", *models, "crystals.extxyz", *files_wanted, "--json")
    errors = result.json()["models"]
    assert "written: new/predictions.extxyz, parity.png" in result.err
    assert (files / "parity.png").read_bytes().startswith(b"\x89PNG")
    back = read("new/predictions.extxyz", ":")
    assert len(back) == 9  # without the isolated atom
    stress = np.mean(
        [np.abs(a.info["water_stress"].reshape(3, 3) - a.get_stress(voigt=False))[VOIGT] for a in back[:3]]
    )
    assert stress / GPa == pytest.approx(errors["water"]["stress_mae"], rel=1e-5)
    forces = np.concatenate([a.arrays["methanol_forces"] - a.get_forces() for a in back])
    assert np.abs(forces).mean() == pytest.approx(errors["methanol"]["force_mae"], rel=1e-5)
    kept = ["evaluate", models[0], "crystals.extxyz", "--out", "new/predictions.extxyz"]
    assert "exists" in gffmerge(*kept).error()
    assert gffmerge(*kept, "--overwrite").code == 0
    assert gffmerge("evaluate", models[0], "crystals.extxyz", "--plot", "p.svg").code == 0
    assert "<svg" in (files / "p.svg").read_text()


def test_errors_name_file_and_frame(gffmerge, files: Path) -> None:
    frames = [labelled(Atoms("H")), *read("water.xyz", ":"), *read("ammonia.xyz", ":1")]
    write("mixed.extxyz", frames)
    model = ("water.safetensors",)
    assert "mixed.extxyz, frame 7 (H3N) contains N" in gffmerge("evaluate", *model, "mixed.extxyz").error()
    frames[3].calc.results.pop("forces")
    write("mixed.extxyz", frames)
    assert "lack forces (frames 3)" in gffmerge("evaluate", *model, "mixed.extxyz").error()


def test_models_of_one_name_are_told_apart_by_their_source(gffmerge, files: Path) -> None:
    (files / "copy.safetensors").write_bytes((files / "water.safetensors").read_bytes())
    both = gffmerge("evaluate", "copy.safetensors", "water.safetensors", "water.xyz", "--json").json()
    assert list(both["models"]) == ["copy.safetensors", "water.safetensors"]


def test_a_specialist_beside_a_merge_with_one_surface_per_specialist(gffmerge, files: Path) -> None:
    pair = ["methanol.safetensors", "water.safetensors"]
    options = ["--recipe", "fast.yaml", "--conditioning", "per-specialist", "--out", "per.safetensors"]
    assert gffmerge("merge", *pair, *options).code == 0
    command = ["evaluate", "water.safetensors", "per.safetensors", "water.xyz"]
    silent = gffmerge(*command).error()
    assert "(--specialist in the command line)" in silent
    assert "water.xyz, frame 0: " in silent
    both = gffmerge(*command, "--specialist", "water", "--json").json()["models"]
    assert both["water"] == gffmerge("evaluate", "water.safetensors", "water.xyz", "--json").json()
    alone = gffmerge("evaluate", "per.safetensors", "water.xyz", "--specialist", "water", "--json").json()
    assert both["methanol+water"] == alone
    assert "no effect" in gffmerge("evaluate", *pair, "water.xyz", "--specialist", "water").error()


def test_dynamics(gffmerge, files: Path) -> None:
    arguments = ["evaluate", "methanol.safetensors", "water.safetensors", "methanol.xyz", *SHORT]
    result = gffmerge(*arguments, "--json", "--md-out", "runs-of-mine")
    document = result.json()
    assert document["structure"] == "CH4O"
    assert document["protocol"]["picoseconds"] == 0.04
    assert document["reference"]["n_frames"] == 6
    for model in ("methanol", "water"):
        summary = document["models"][model]
        assert len(summary["stability_time"]) == 2
        assert summary["h_mae"] > 0
        errors = gffmerge("evaluate", f"{model}.safetensors", "methanol.xyz", "--json").json()
        assert summary["force_mae"] == pytest.approx(errors["force_mae"], rel=1e-4)
    assert document["models"]["methanol"]["h_mae_to_first"] == 0
    assert "2 model(s) x 2 seed(s) x (0.04 ps NVT + 0.02 ps NVE) at 50 K: about" in result.err
    assert json.loads((files / "runs-of-mine" / "md.json").read_text()) == document
    assert (files / "runs-of-mine" / "md.png").read_bytes().startswith(b"\x89PNG")
    batches = {path: path.stat().st_mtime_ns for path in (files / "runs-of-mine" / "runs").iterdir()}
    assert len(batches) == 4
    shown = gffmerge(*arguments, "--md-out", "runs-of-mine")
    assert {path: path.stat().st_mtime_ns for path in batches} == batches
    assert "h(r) MAE" in shown.out
    assert "seeds that held" in shown.out
    assert "2 seeds, NVT 0.04 ps and NVE 0.02 ps at 50 K" in shown.out


def test_frames_without_labels_and_another_reference(gffmerge, files: Path) -> None:
    frames = read("water.xyz", ":")
    for atoms in frames:
        atoms.calc = None
    write("start.xyz", frames[0])
    document = gffmerge(
        "evaluate", "water.safetensors", "start.xyz", *SHORT, "--reference", "water.xyz", "--json"
    ).json()
    assert document["reference"]["n_frames"] == 6
    assert "force_mae" not in document["models"]["water"]
    assert (files / "gffmerge-md" / "md.json").exists()


def test_interrupted(gffmerge, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ase_gffmerge.evaluation.md.evaluate.run_models", stop)
    stopped = gffmerge("evaluate", "water.safetensors", "water.xyz", *SHORT)
    assert stopped.code == 130
    assert "gffmerge-md holds the finished runs, and the same command goes on from there" in stopped.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nothing.safetensors", "water.safetensors", "water.xyz"], "nothing.safetensors"),
        (["water.safetensors", "water.xyz", "--md", "--seeds", 0], "at least 1"),
        (["water.safetensors", "water.xyz", "--md", "--time", 0.001], "too short"),
        (["water.safetensors", "water.xyz", "--md", "--temperature", -5], "must be positive"),
        (["water.safetensors", "ammonia.xyz", "--md"], "contains N"),
        (["water.safetensors", "water.xyz", "--md", "--reference", "no.xyz"], "no.xyz does not exist"),
        (["water.safetensors", "water.xyz", "--md", "--reference", "methanol.xyz"], "no reference frame"),
        (["water.safetensors", "water.xyz", "--md", "--md-out", "water.xyz"], "cannot write"),
        (["water.safetensors", "--md"], "Missing argument 'MODELS'"),
    ],
)
def test_bad_input(gffmerge, files: Path, arguments: list[object], said: str) -> None:
    before = {path.name for path in files.iterdir()}
    assert said in gffmerge("evaluate", *arguments).error()
    assert {path.name for path in files.iterdir()} == before


def test_duration() -> None:
    assert [duration(seconds) for seconds in (0.4, 90, 600)] == ["0 s", "90 s", "10 min"]
