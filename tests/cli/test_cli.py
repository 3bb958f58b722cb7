"""Every verb on tiny models; bad input gives one line, exit code 2, and leaves nothing behind."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import get_type_hints

import numpy as np
import pytest
import torch
import typer
from ase import Atoms
from ase.build import bulk
from ase.io import read, write

from ase_gffmerge import __version__
from ase_gffmerge.cli import EXAMPLES, VERBS, app
from ase_gffmerge.engines.ase.dispersion import Dispersion
from ase_gffmerge.forcefield.force_field import ForceField
from ase_gffmerge.workflows import memory
from helpers.toys import labelled


def entries(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_help_is_light() -> None:
    script = (
        "import sys; from ase_gffmerge.cli import app\n"
        "for arguments in (['--help'], ['md', '--help'], ['cache', '--help']):\n"
        "    try: app(arguments, prog_name='gffmerge')\n"
        "    except SystemExit as stop: assert not stop.code\n"
        "heavy = {'torch', 'ase', 'numpy', 'matplotlib', 'scipy', 'pooch'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for verb in ("train", "merge", "evaluate", "info", "md", "relax", "cache", "data"):
        assert verb in done.stdout


def test_main_is_the_entry_point() -> None:
    script = (
        "import sys; sys.argv = ['gffmerge', 'info', 'nothing']; from ase_gffmerge.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("gffmerge: error: ")
    assert done.stderr.count("\n") == 1


def plain(shown: str) -> str:
    """Help without the frames that a terminal's width decides on."""
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", shown).split())


COMMANDS = [(verb,) for verb in VERBS]
COMMANDS += [("cache", verb) for verb in ("list", "verify", "clear")]
COMMANDS += [("data", verb) for verb in ("list", "show", "fetch")]


@pytest.mark.parametrize("width", [60, 80, 100, 200])
@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_has_an_example(gffmerge, monkeypatch, command: tuple[str, ...], width: int) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    text = plain(gffmerge(*command, "--help").out)
    assert f"Example: gffmerge {' '.join(command)}" in text
    assert "--json" in text
    assert " . " not in text, "a default in brackets is markup, and vanishes"


def test_help_says_what_stands_where_nothing_is_given(gffmerge) -> None:
    assert "[default: (of the recipe)]" in plain(gffmerge("merge", "--help").out)
    assert "[default: (300 500 700)]" in plain(gffmerge("sample", "--help").out)


def test_examples_name_options_that_exist() -> None:
    commands = typer.main.get_command(app).commands
    for verb, example in EXAMPLES.items():
        known = {text for option in commands[verb].params for text in option.opts}
        given = [word for word in example.split() if word.startswith("--")]
        assert set(given) <= known, example


def test_options_mean_the_same_everywhere() -> None:
    """One type for every name: a number of frames here and a file of frames there cannot be remembered."""
    kinds: dict[str, set[str]] = {}
    for verb in VERBS.values():
        for name, hint in get_type_hints(verb, include_extras=True).items():
            for option in getattr(hint, "__metadata__", ()):
                if isinstance(option, typer.models.OptionInfo):
                    declared = (*(option.param_decls or ()), f"--{name.replace('_', '-')}")[0]
                    kind = re.sub(r"list\[|\]| \| None|<class '|'>", "", str(hint.__origin__))
                    kinds.setdefault(declared, set()).add(kind)
    assert len(kinds) > 30
    assert {name: found for name, found in kinds.items() if len(found) > 1} == {}


def test_version(gffmerge) -> None:
    assert gffmerge("--version").out == f"gffmerge {__version__}\n"


def test_files_of_other_packages_without_their_name(gffmerge, files: Path) -> None:
    torch.save({"model": torch.ones(3)}, files / "a.pth.tar")
    for arguments in (
        ("info", "a.pth.tar"),
        ("merge", "a.pth.tar", "water.safetensors", "--out", "m.safetensors"),
    ):
        assert "write chgnet:a.pth.tar" in gffmerge(*arguments).error()


def test_merge_with_frames_from_files(gffmerge, files: Path) -> None:
    bare = [replace(ForceField.load(f"{name}.safetensors"), calibration=()) for name in ("methanol", "water")]
    for force_field in bare:
        force_field.save(f"bare-{force_field.name}.safetensors")
    merge = ("merge", "bare-methanol.safetensors", "bare-water.safetensors", "--recipe", "fast.yaml")
    frames = ("--calibration", "methanol.xyz", "water.xyz")
    assert "calibration" in gffmerge(*merge, "--out", "m.safetensors").error()
    assert "one file" in gffmerge(*merge, "--out", "m.safetensors", "--calibration", "water.xyz").error()
    assert gffmerge(*merge, "--out", "m.safetensors", *frames).code == 0
    assert (
        gffmerge(
            "merge",
            "methanol.safetensors",
            "water.safetensors",
            "--recipe",
            "fast.yaml",
            "--out",
            "n.safetensors",
        ).code
        == 0
    )
    one, other = (ForceField.load(f"{name}.safetensors").potential.state_dict() for name in "mn")
    assert all(torch.allclose(one[key], other[key], atol=1e-4) for key in one)


# -- the verbs --


def test_train(gffmerge, files: Path) -> None:
    document = gffmerge(
        "train", "methanol.xyz", "water.xyz", "--out", "new.safetensors", "--config", "tiny.yaml",
        "--frames", 3, "--test", "water.xyz", "--seed", 5, "--name", "both", "--json",
    ).json()  # fmt: skip
    specialist = ForceField.load("new.safetensors")
    assert document["fingerprint"] == specialist.fingerprint
    assert document["name"] == specialist.name == "both"
    assert document["epochs"] == 2
    assert document["n_train"] == 8
    assert set(document["last_epoch"]) == {"loss", "force_mae", "energy_mae"}
    assert set(document["test_errors"]) == {"force_mae", "force_rmse", "energy_mae", "n_frames"}
    assert specialist.provenance.seed == 5
    assert len(specialist.calibration) == 3
    assert Path(document["loss_curve"]).read_bytes().startswith(b"\x89PNG")
    assert document["loss_curve"] == "new.png"


def test_train_from_a_parent_with_references(gffmerge, files: Path) -> None:
    (files / "references.json").write_text('{"H": -1.0, "C": -2.0, "O": -3.0}')
    shown = gffmerge(
        "train", "methanol.xyz", "--out", "child.safetensors", "--init", "base.safetensors", "--epochs", 1,
        "--config", "tiny-child.yaml", "--references", "references.json",
    )  # fmt: skip
    assert "cannot read the configuration tiny-child.yaml" in shown.error()
    (files / "tiny-child.yaml").write_text("validation: 2\n")
    shown = gffmerge(
        "train", "methanol.xyz", "--out", "child.safetensors", "--init", "base.safetensors", "--epochs", 1,
        "--config", "tiny-child.yaml", "--references", "references.json",
    )  # fmt: skip
    assert shown.code == 0, shown.err
    assert "epoch 1/1" in shown.err
    assert "force MAE (eV/Å)" in shown.out
    assert "force MAE (eV/Å)" in shown.err
    child, base = ForceField.load("child.safetensors"), ForceField.load("base.safetensors")
    assert child.provenance.lineage == (base.fingerprint,)
    assert child.potential.references.tolist() == [-1, -2, -3]


def test_train_interrupted_and_continued(gffmerge, files: Path, monkeypatch) -> None:
    from ase_gffmerge.training import loop

    command = ["train", "methanol.xyz", "--out", "new.safetensors", "--config", "tiny.yaml", "--epochs", 3]
    original, count = loop._train_epoch, 0

    def interrupted(*args: object, **options: object) -> dict[str, float]:
        nonlocal count
        count += 1
        if count == 3:
            raise KeyboardInterrupt
        return original(*args, **options)

    monkeypatch.setattr(loop, "_train_epoch", interrupted)
    stopped = gffmerge(*command)
    monkeypatch.undo()
    assert stopped.code == 130
    assert stopped.err.splitlines()[-1] == (
        "gffmerge: interrupted; epoch 2 of 3 is saved; the same command continues"
    )
    assert not (files / "new.safetensors").exists()
    monkeypatch.chdir(files)
    resumed = gffmerge(*command)
    assert resumed.code == 0
    assert "continued after epoch 2" in resumed.err
    assert "epoch 1/3" not in resumed.err
    other = gffmerge(*command[:3], "other.safetensors", *command[4:], "--json").json()
    assert other["fingerprint"] == ForceField.load("new.safetensors").fingerprint


def test_train_warns_about_another_checkpoint(gffmerge, files: Path) -> None:
    command = ["train", "methanol.xyz", "--out", "new.safetensors", "--config", "tiny.yaml", "--overwrite"]
    assert gffmerge(*command).code == 0
    (files / "new.checkpoint.safetensors").write_bytes(b"x" * 20)
    again = gffmerge(*command)
    assert again.code == 0
    assert "gffmerge: warning: new.checkpoint.safetensors is not continued" in again.err
    assert (files / "new.checkpoint.old.safetensors").exists()


@pytest.fixture
def merged(gffmerge, files: Path) -> Path:
    done = gffmerge(
        "merge",
        "methanol.safetensors",
        "water.safetensors",
        "--out",
        "merged.safetensors",
        "--recipe",
        "fast.yaml",
    )
    assert done.code == 0, done.err
    return files / "merged.safetensors"


def test_merge(gffmerge, files: Path) -> None:
    command = [
        "merge",
        "methanol.safetensors",
        "water.safetensors",
        "--recipe",
        "fast.yaml",
        "--device",
        "cpu",
    ]
    document = gffmerge(*command, "--out", "m.safetensors", "--report", "m.html", "--json").json()
    assert document["verdict"] in ("good", "usable after distillation", "failed")
    assert document["seconds"]
    assert "<html" in (files / "m.html").read_text().lower()
    model = ForceField.load("m.safetensors")
    assert model.merged is not None
    assert model.merged.specialists == ("methanol", "water")
    text = gffmerge(*command, "--out", "again.safetensors", "--weights", "1,2")
    assert text.code == 0, text.err
    assert "methanol" in text.out
    assert ForceField.load("again.safetensors").merged.recipe["weights"] == [1, 2]
    assert "weights" in gffmerge(*command, "--out", "x.safetensors", "--weights", "one,2").error()


def test_merge_mean_and_conditioning(gffmerge, files: Path) -> None:
    pair = ["methanol.safetensors", "water.safetensors"]
    assert gffmerge("merge", *pair, "--recipe", "mean", "--out", "mean.safetensors").code == 0
    done = gffmerge(
        "merge",
        *pair,
        "--recipe",
        "fast.yaml",
        "--conditioning",
        "per-specialist",
        "--out",
        "per.safetensors",
    )
    assert done.code == 0, done.err
    missing = gffmerge("evaluate", "per.safetensors", "water.xyz").error()
    assert "(--specialist in the command line)" in missing
    assert "0 = 'methanol', 1 = 'water'" in missing
    assert (
        "no specialist 'ice'"
        in gffmerge("evaluate", "per.safetensors", "water.xyz", "--specialist", "ice").error()
    )
    results = [
        gffmerge("evaluate", "per.safetensors", "water.xyz", "--specialist", name, "--json").json()
        for name in ("methanol", "water")
    ]
    assert results[0]["force_mae"] != results[1]["force_mae"]
    run = [
        "md",
        "per.safetensors",
        "water.xyz",
        "--ensemble",
        "nve",
        "--temperature",
        100,
        "--steps",
        2,
        "--json",
    ]
    assert gffmerge(*run, "--out", "w.traj", "--specialist", "water").json()["steps"] == 2
    assert "water" in gffmerge(*run, "--out", "v.traj").error()
    assert not (files / "v.traj").exists()


def test_evaluate(gffmerge, merged: Path) -> None:
    for model in ("merged.safetensors", "methanol.safetensors"):
        document = gffmerge("evaluate", model, "methanol.xyz", "--json").json()
        assert {"force_mae", "force_rmse", "energy_mae"} < set(document)
        assert set(document["force_mae_by_element"]) == {"H", "C", "O"}
        assert document["stress_mae"] is None
        assert document["n_frames"] == 6
        assert 0 < document["force_mae"] <= document["force_rmse"]
    shown = gffmerge("evaluate", "methanol.safetensors", "methanol.xyz").out
    for key in ("force MAE (meV/Å)", "force MAE of C (meV/Å)", "energy MAE (meV/atom)", "stress MAE (GPa)"):
        assert key in shown
    assert f"{1000 * document['force_mae']:.2f}" in shown
    assert "no effect" in gffmerge("evaluate", merged, "water.xyz", "--specialist", "water").error()


def test_evaluate_with_dispersion(gffmerge, files: Path) -> None:
    pytest.importorskip("dftd3")
    from ase_gffmerge import GFFMergeCalculator

    frames = [labelled(bulk("C", "diamond", a=a, cubic=True), stress=True) for a in (3.5, 3.6)]
    write("crystals.extxyz", frames)
    calculator = GFFMergeCalculator("water.safetensors", dispersion="d3bj:pbe", dtype="float32")
    command = ["evaluate", "water.safetensors", "crystals.extxyz", "--dispersion", "d3bj:pbe"]
    errors = gffmerge(*command, "--out", "d3.extxyz", "--json").json()
    expected = [calculator.get_property("forces", atoms) - atoms.get_forces() for atoms in frames]
    assert errors["force_mae"] == pytest.approx(np.abs(np.concatenate(expected)).mean(), abs=1e-5)
    predicted = read("d3.extxyz", 0)
    calculator.calculate(frames[0], ["energy", "stress"])
    assert predicted.info["water_energy"] == pytest.approx(calculator.results["energy"], abs=1e-4)
    stress = np.reshape(predicted.info["water_stress"], (3, 3))
    assert stress[[0, 1, 2], [0, 1, 2]] == pytest.approx(calculator.results["stress"][:3], abs=1e-6)
    assert "without --dispersion" in gffmerge(*command, "--md").error()
    assert "damping:functional" in gffmerge(*command[:-1], "pbe").error()


def test_evaluate_uncertainty(gffmerge, merged: Path) -> None:
    models = ["merged.safetensors", "methanol.safetensors", "methanol.xyz"]
    written = ["--out", "std.extxyz", "--plot", "std.png"]
    document = gffmerge("evaluate", *models, "--uncertainty", *written, "--json").json()["models"]
    found = [one["uncertainty"] for one in document.values() if "uncertainty" in one]
    assert len(found) == 1
    assert {"rank_correlation", "calibration_error", "ratio", "observed", "n"} == set(found[0]["forces"])
    assert found[0]["energies"]["n"] == 6
    frame = read("std.extxyz")
    (name,) = (key for key in frame.arrays if key.endswith("_forces_std"))
    assert frame.arrays[name].shape == (len(frame), 3)
    assert frame.info[name.replace("forces", "energy")] > 0
    assert Path("std.png").stat().st_size > 10_000
    assert "calibration error" in gffmerge("evaluate", *models, "--uncertainty").out
    refused = gffmerge("evaluate", "methanol.safetensors", "methanol.xyz", "--uncertainty").error()
    assert "no calibrated uncertainty" in refused


def test_info(gffmerge, merged: Path) -> None:
    document = gffmerge("info", "methanol.safetensors", "--json").json()
    model = ForceField.load("methanol.safetensors")
    assert document["kind"] == "specialist"
    assert document["species"] == ["H", "C", "O"]
    assert document["cutoff"] == 4.0
    assert document["hyper"]["channels"] == 8
    assert document["calibration_frames"] == 6
    assert document["fingerprint"] == model.fingerprint
    assert document["level_of_theory"] == "EMT"
    assert document["n_parameters"] == sum(p.numel() for p in model.potential.parameters())
    assert document["provenance"]["lineage"] == list(model.provenance.lineage)
    assert document["provenance"]["errors"] == {"force_mae": 0.1}
    assert document["merged"] is None
    both = gffmerge("info", merged, "--json").json()
    assert both["kind"] == "merged"
    assert both["merged"]["specialists"] == ["methanol", "water"]
    assert both["merged"]["verdict"]
    assert both["merged"]["recipe"]["readout"]["width"] == 16
    text = gffmerge("info", merged).out
    assert "methanol, water" in text
    assert re.search(r"recipe +[\w-]+, but .*readout\.width 16", text)
    assert "ridge" not in text  # as in the preset
    assert "verdict" in text
    (errors,) = (
        line for line in gffmerge("info", "methanol.safetensors").out.splitlines() if "test errors" in line
    )
    assert errors.split(maxsplit=2)[2] == "force MAE 100 meV/Å"


def test_a_base_that_is_kept_counts_in_the_memory(
    gffmerge, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (files / "kept.yaml").write_text("preset: mean\nkeep_base: 2\n")
    seen: list[tuple[int, bool]] = []

    def estimate(models, *args: object, base_joined: bool = False, **options: object) -> str:
        seen.append((len(models), base_joined))
        return "about 1 MB"

    monkeypatch.setattr(memory, "estimate_memory", estimate)
    pair = ("merge", "methanol.safetensors", "water.safetensors", "--base", "base.safetensors")
    for recipe, options in (("kept.yaml", ()), ("mean", ("--keep-base",)), ("mean", ())):
        done = gffmerge(*pair, "--recipe", recipe, *options, "--out", "m.safetensors", "--overwrite")
        assert done.code == 0, done.err
    assert seen == [(3, True), (3, True), (2, False)]


def test_md(gffmerge, files: Path) -> None:
    run = [
        "md",
        "methanol.safetensors",
        "methanol.xyz",
        "--temperature",
        50,
        "--steps",
        20,
        "--timestep",
        0.2,
    ]
    nve = gffmerge(*run, "--ensemble", "nve", "--out", "nve.traj", "--dtype", "float64", "--json").json()
    assert {"steps", "steps_per_second", "temperature_mean", "drift_per_atom", "drift_slope_per_atom"} <= set(
        nve
    )
    assert abs(nve["drift_per_atom"]) < 1e-4
    frames = read("nve.traj", ":")
    assert len(frames) == 3
    assert frames[-1].get_potential_energy() == pytest.approx(nve["potential_energy"])
    nvt = gffmerge(*run, "--ensemble", "nvt", "--out", "nvt.xyz", "--friction", 0.1, "--interval", 5)
    assert nvt.code == 0, nvt.err
    assert "mean temperature (K)" in nvt.out
    assert "energy drift" not in nvt.out
    assert re.search(r"^total energy \(eV\) +-?\d+\.\d{5}$", nvt.out, re.MULTILINE)
    assert "stopped" not in nvt.out
    assert nvt.err.endswith("written: nvt.xyz; the same command with more --steps and --restart goes on\n")
    assert len(read("nvt.xyz", ":")) == 5


def test_md_npt_of_a_crystal(gffmerge, files: Path) -> None:
    run = ["md", "base.safetensors", "diamond.cif", "--ensemble", "npt", "--temperature", 10, "--steps", 5]
    npt = gffmerge(*run, "--out", "npt.traj", "--pressure", 1, "--interval", 1, "--json").json()
    assert npt["n_atoms"] == 8
    volumes = [atoms.cell.volume for atoms in read("npt.traj", ":")]
    assert len(set(volumes)) > 1
    assert npt["volume_mean"] == pytest.approx(np.mean(volumes[1:]))


def test_md_from_an_npz_archive(gffmerge, files: Path) -> None:
    atoms = read("water.xyz", 0)
    np.savez(
        "water.npz",
        nuclear_charges=atoms.numbers, coords=atoms.positions[None], energies=[0], forces=np.zeros((1, 3, 3)),
    )  # fmt: skip
    run = ["md", "water.safetensors", "water.npz", "--ensemble", "nve", "--temperature", 10, "--steps", 1]
    assert gffmerge(*run, "--out", "w.traj", "--json").json()["n_atoms"] == 3


def test_relax(gffmerge, files: Path) -> None:
    done = gffmerge(
        "relax", "methanol.safetensors", "methanol.xyz", "--out", "r.xyz", "--fmax", 0.5, "--json"
    )
    document = done.json()
    assert document["converged"] is True
    assert document["energy_gain"] >= 0
    assert document["max_force"] <= 0.5
    assert read("r.xyz").get_potential_energy() == pytest.approx(document["energy"], abs=1e-5)
    short = gffmerge(
        "relax", "methanol.safetensors", "methanol.xyz", "--out", "s.xyz", "--fmax", 1e-9, "--steps", 1
    )
    assert short.code == 1
    assert "not converged" in short.err
    assert (files / "s.xyz").exists()


def test_relax_many_structures(gffmerge, files: Path) -> None:
    command = ["relax", "methanol.safetensors", "methanol.xyz", "--fmax", 0.5, "--all", "--json"]
    document = gffmerge(*command, "--out", "all.xyz").json()
    assert document["converged"]
    assert len(document["structures"]) == 6
    assert len(read("all.xyz", ":")) == 6
    assert "--trajectory" in gffmerge(*command, "--out", "b.xyz", "--trajectory", "t.traj").error()
    assert "need --cell" in gffmerge(*command, "--out", "b.xyz", "--pressure", 1).error()


def test_relax_with_the_cell(gffmerge, files: Path) -> None:
    done = gffmerge(
        "relax", "base.safetensors", "diamond.cif", "--out", "d.cif", "--cell", "--steps", 3, "--fmax", 1e-4,
        "--optimizer", "fire", "--json",
    )  # fmt: skip
    assert done.code in (0, 1)
    assert json.loads(done.out)["volume"] != pytest.approx(3.6**3, abs=1e-9)
    assert len(read("d.cif")) == 8


def test_cache(gffmerge, merged: Path, tmp_path: Path) -> None:
    folder = tmp_path / "store"
    assert gffmerge("cache", "list", "--cache-dir", folder, "--json").json()["entries"] == []
    folder.mkdir(exist_ok=True)
    key = "0" * 64
    force_field = ForceField.load(merged)
    entry = replace(force_field, merged=replace(force_field.merged, cache_key=key)).save(
        folder / f"{key}.safetensors"
    )
    (listed,) = gffmerge("cache", "list", "--cache-dir", folder, "--json").json()["entries"]
    assert (listed["key"], listed["specialists"]) == (key, ["methanol", "water"])
    assert listed["size"] == entry.stat().st_size
    assert "methanol + water" in gffmerge("cache", "list", "--cache-dir", folder).out
    assert gffmerge("cache", "verify", "--cache-dir", folder, "--json").json()["entries"][0]["ok"] is True
    data = bytearray(entry.read_bytes())
    data[-1] ^= 1
    entry.write_bytes(data)
    broken = gffmerge("cache", "verify", "--cache-dir", folder)
    assert broken.code == 1
    assert "altered" in broken.out
    assert len(gffmerge("cache", "clear", "--cache-dir", folder, "--json").json()["deleted"]) == 1
    assert gffmerge("cache", "list", "--cache-dir", folder).out == ""


# -- bad input --

MD = ["--ensemble", "nve", "--temperature", "300", "--steps", "5", "--out", "out.traj"]
BAD = [
    (["info", "nothing.safetensors"], "nothing.safetensors"),
    (["info", "rmd17-ethanl"], "did you mean 'rmd17-ethanol'"),
    (["info", "water.xyz"], "water.xyz is not a readable safetensors file"),
    (["info", "."], "is a folder"),
    (["evaluate", "nothing.safetensors", "water.xyz"], "nothing.safetensors"),
    (["evaluate", "water.safetensors", "nothing.xyz"], "nothing.xyz does not exist"),
    (["evaluate", "water.safetensors", "ammonia.xyz"], "ammonia.xyz, frame 0 (H3N) contains N"),
    (["evaluate", "water.safetensors", "water.xyz", "--plot", "e.txt"], "must be .png, .svg, .pdf"),
    (["evaluate", "water.safetensors", "water.xyz", "--out", "water.xyz"], "is the input"),
    (["evaluate", "water.safetensors", "water.xyz", "--out", "p.traj"], "end the name with .extxyz"),
    (["evaluate", "water.safetensors", "no-forces.xyz"], "lack forces"),
    (["evaluate", "water.safetensors", "no-energy.xyz"], "lack energy"),
    (["evaluate", "water.safetensors", "empty.xyz"], "empty.xyz is empty"),
    (["train", "no-forces.xyz", "--out", "out.safetensors", "--config", "tiny.yaml"], "lack forces"),
    (["train", "no-energy.xyz", "--out", "out.safetensors", "--config", "tiny.yaml"], "lack energy"),
    (["train", "water.xyz", "--out", "out.safetensors"], "leaves none beside 50"),
    (["train", "water.xyz", "--out", "out.safetensors", "--config", "bad.yaml"], "did you mean 'epochs'"),
    (["train", "water.xyz", "--out", "out.safetensors", "--config", "tiny.yaml", "--epochs", "0"], "epochs"),
    (
        ["train", "water.xyz", "--out", "out.safetensors", "--config", "tiny.yaml", "--model", "schnet"],
        "schnet",
    ),
    (["train", "water.xyz", "--out", "file/out.safetensors", "--config", "tiny.yaml"], "cannot write"),
    (
        [
            "train",
            "ammonia.xyz",
            "--out",
            "o.safetensors",
            "--config",
            "tiny.yaml",
            "--init",
            "base.safetensors",
        ],
        "N",
    ),
    (
        ["train", "water.xyz", "--out", "o.safetensors", "--config", "tiny.yaml", "--references", "no.json"],
        "no.json",
    ),
    (["merge", "water.safetensors", "--out", "out.safetensors"], "gffmerge: error"),
    (["merge", "water.safetensors", "water.safetensors", "--out", "out.safetensors"], "gffmerge: error"),
    (["merge", "water.safetensors", "base.safetensors", "--out", "out.safetensors"], "calibration"),
    (
        ["merge", "water.safetensors", "methanol.safetensors", "--out", "o.safetensors", "--recipe", "magic"],
        "magic",
    ),
    (["merge", "water.safetensors", "methanol.safetensors", "--out", "file/o.safetensors"], "cannot write"),
    (
        ["merge", "water.safetensors", "methanol.safetensors", "--out", "o.safetensors", "--weights", "1"],
        "weights",
    ),
    (["md", "water.safetensors", "ammonia.xyz", *MD], "contains N"),
    (["md", "water.safetensors", "nothing.xyz", *MD], "nothing.xyz does not exist"),
    (["md", "water.safetensors", "nan.xyz", *MD], "not finite"),
    (["md", "water.safetensors", "water.xyz", *MD[:-1], "out.pdf"], "must end in"),
    (["md", "water.safetensors", "water.xyz", *MD[:-1], "file/out.traj"], "cannot write"),
    (["md", "water.safetensors", "water.xyz", *MD, "--timestep", "-1"], "time step"),
    (["md", "water.safetensors", "water.xyz", *MD, "--specialist", "water"], "no effect"),
    (["md", "water.safetensors", "water.xyz", "--ensemble", "npt", *MD[2:]], "not periodic"),
    (["md", "water.safetensors", "water.xyz", "--ensemble", "nph", *MD[2:]], "nph"),
    (["md", "water.safetensors", "water.xyz"], "npt. Try `gffmerge md --help`."),
    (["relax", "water.safetensors", "water.xyz", "--out", "out.banana"], "cannot write"),
    (["relax", "water.safetensors", "water.xyz", "--out", "file/out.xyz"], "cannot write"),
    (
        ["relax", "water.safetensors", "water.xyz", "--out", "out.xyz", "--cell"],
        "periodic in three directions",
    ),
    (["relax", "water.safetensors", "ammonia.xyz", "--out", "out.xyz"], "contains N"),
    (["melt"], "melt"),
    (["info"], "Missing argument"),
    (["info", "water.safetensors", "--jsn"], "--jsn"),
]


@pytest.fixture
def bad_files(files: Path) -> Path:
    frames = read(files / "water.xyz", ":")
    bare = [Atoms(atoms.numbers, atoms.positions) for atoms in frames]
    for atoms in frames:
        del atoms.calc.results["forces"]
    write(files / "no-forces.xyz", frames, format="extxyz")
    for atoms, original in zip(bare, read(files / "water.xyz", ":"), strict=True):
        atoms.arrays["forces"] = original.get_forces()
    write(files / "no-energy.xyz", bare, format="extxyz")
    bare[0].positions[0, 0] = np.nan
    write(files / "nan.xyz", bare[:1], format="extxyz")
    (files / "empty.xyz").write_text("")
    (files / "bad.yaml").write_text("epoch: 3\n")
    (files / "file").write_text("")
    return files


@pytest.mark.parametrize(("arguments", "pattern"), BAD, ids=[f"{i}-{row[0][0]}" for i, row in enumerate(BAD)])
def test_bad_input(gffmerge, bad_files: Path, arguments: list[str], pattern: str) -> None:
    before = entries(bad_files)
    assert pattern in gffmerge(*arguments).error()
    assert entries(bad_files) == before
    with_json = gffmerge(*arguments, "--json") if arguments != ["melt"] else None
    assert with_json is None or with_json.error()
    assert entries(bad_files) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
@pytest.mark.parametrize(
    "arguments",
    [
        ["evaluate", "water.safetensors", "water.xyz"],
        ["train", "water.xyz", "--out", "o.safetensors", "--config", "tiny.yaml"],
        ["merge", "water.safetensors", "methanol.safetensors", "--out", "o.safetensors"],
        ["md", "water.safetensors", "water.xyz", *MD],
        ["relax", "water.safetensors", "water.xyz", "--out", "o.xyz"],
    ],
)
def test_no_cuda(gffmerge, files: Path, arguments: list[str]) -> None:
    before = entries(files)
    for device in ("cuda", "cuda:3"):
        assert "CUDA" in gffmerge(*arguments, "--device", device).error()
    assert "is not a device" in gffmerge(*arguments, "--device", "toaster").error()
    assert entries(files) == before


def test_md_interrupted(gffmerge, files: Path, monkeypatch) -> None:
    from ase_gffmerge.cli import md

    def interrupt(sample: object, steps: int) -> str:
        if sample.step >= 2:  # type: ignore[attr-defined]
            raise KeyboardInterrupt
        return ""

    monkeypatch.setattr(md, "describe", interrupt)
    stopped = gffmerge("md", "water.safetensors", "water.xyz", *MD, "--interval", 1)
    assert stopped.code == 130
    assert (
        stopped.err.strip()
        == "gffmerge: interrupted; out.traj holds 2 of 5 steps; the same command with --restart continues"
    )
    assert len(read("out.traj", ":")) == 3


def test_dispersion_is_added(gffmerge, files) -> None:
    pytest.importorskip("dftd3")
    energies = []
    for k, more in enumerate([(), ("--dispersion", "d3bj:pbe")]):
        command = (
            "md",
            "water.safetensors",
            "water.xyz",
            "--ensemble",
            "nve",
            "--temperature",
            300,
            "--steps",
            1,
        )
        done = gffmerge(*command, "--out", f"{k}.traj", *more)
        assert done.code == 0, done.err
        energies.append(read(f"{k}.traj", 0).get_potential_energy())
    expected = Dispersion.parse("d3bj:pbe").results(read("water.xyz", 0))["energy"]
    assert energies[1] - energies[0] == pytest.approx(expected, abs=1e-6)
