"""``gffmerge merge`` into the format of the specialists' package, and what that format cannot hold."""

from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write

from ase_gffmerge import ForceField
from ase_gffmerge.errors import FileFormatError
from ase_gffmerge.inference.predict import predict_frames
from ase_gffmerge.integrations.chgnet import CHGNetAdapter
from ase_gffmerge.integrations.load import load_force_field
from ase_gffmerge.merging.recipe import Recipe
from ase_gffmerge.workflows import merge as workflow
from helpers.toys import SHALLOW, family

PAIR = ("s0.safetensors", "s1.safetensors")
SOLVES = "preset: closed-form\nselect: false\ndirections: 0\nmessages: false\n"
WIDE = f"{SOLVES}readout: {{width: 8, copies: 1, directions: 2}}\n"
RECIPES = {
    "wide": WIDE,
    "apart": f"{SOLVES}readout: null\nconditioning: per-specialist\n",
    "both": f"{WIDE}conditioning: per-specialist\n",
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch) -> Path:
    """Two relatives of a small CHGNet, and recipes."""
    monkeypatch.chdir(tmp_path)
    for specialist in family("chgnet", hyper=SHALLOW["chgnet"], frames=3):
        specialist.save(f"{specialist.name}.safetensors")
    for name, text in RECIPES.items():
        Path(f"{name}.yaml").write_text(text)
    return tmp_path


@pytest.mark.parametrize(
    ("recipe", "at_fault", "not_at_fault"),
    [
        ("wide", ["readout: null"], ["conditioning"]),
        ("apart", ["conditioning: shared"], ["readout"]),
        ("both", ["readout: null", "conditioning: shared"], []),
    ],
)
def test_before_a_merge_it_is_said_what_cannot_be_exported(
    gffmerge, folder, monkeypatch, recipe: str, at_fault: list[str], not_at_fault: list[str]
) -> None:
    monkeypatch.setattr(workflow, "merge", None)  # would be a TypeError
    line = gffmerge("merge", *PAIR, "--recipe", f"{recipe}.yaml", "--out", "merged.pth.tar").error()
    assert all(words in line for words in [*at_fault, "CHGNet's format", "--exportable"])
    assert not any(words in line for words in not_at_fault)
    assert not Path("merged.pth.tar").exists()


def test_exportable_writes_the_format_of_the_package(gffmerge, folder) -> None:
    command = ("merge", *PAIR, "--recipe", "both.yaml", "--exportable", "--out")
    assert gffmerge(*command, "merged.pth.tar").code == 0
    assert gffmerge(*command, "merged.safetensors").code == 0
    assert gffmerge("convert", "merged.safetensors", "converted.pth.tar").code == 0
    ours = ForceField.load("merged.safetensors")
    frames: list[Atoms] = list(ForceField.load(PAIR[0]).calibration)
    expected = predict_frames(ours.potential, frames).energies
    for name in ("merged", "converted"):
        theirs = load_force_field(f"chgnet:{name}.pth.tar").to(dtype=ours.potential.dtype)
        np.testing.assert_allclose(predict_frames(theirs.potential, frames).energies, expected, atol=1e-4)


def test_a_merge_that_cannot_be_converted_names_the_options_at_fault(gffmerge, folder) -> None:
    assert gffmerge("merge", *PAIR, "--recipe", "both.yaml", "--out", "merged.safetensors").code == 0
    line = gffmerge("convert", "merged.safetensors", "merged.pth.tar", "--calibration", "none.xyz").error()
    for words in ("readout: null", "conditioning: shared", "gffmerge merge --exportable"):
        assert words in line


def test_impossible_wishes_are_refused(gffmerge, folder, files) -> None:
    wish = ("--exportable", "--out", "m.safetensors")
    assert (
        "leave --conditioning" in gffmerge("merge", *PAIR, *wish, "--conditioning", "per-specialist").error()
    )
    painn = ("methanol.safetensors", "water.safetensors")
    assert "no format but .safetensors" in gffmerge("merge", *painn, *wish).error()
    assert "no format but .safetensors" in gffmerge("merge", *painn, "--out", "m.pth").error()


def test_what_cannot_be_exported_after_all_is_not_lost(gffmerge, folder, monkeypatch) -> None:
    def refuse(*_: object) -> None:
        raise FileFormatError("the elements are too much alike; save it as .safetensors")

    monkeypatch.setattr(CHGNetAdapter, "vendor_content", refuse)
    done = gffmerge("merge", *PAIR, "--recipe", "wide.yaml", "--exportable", "--out", "m.pth.tar")
    assert done.code == 2
    assert "save it as .safetensors; what CHGNet's format cannot hold is in m.pth.tar.safetensors" in done.err
    assert ForceField.load("m.pth.tar.safetensors").merged is not None


def test_elements_that_the_format_cannot_tell_apart_are_refused_before_the_merge(
    gffmerge, folder, monkeypatch
) -> None:
    def refuse(*_: object, wide_readout: bool, embeddings: bool) -> None:
        assert (wide_readout, embeddings) == (False, False)
        raise FileFormatError("the elements are too much alike; save it as .safetensors")

    monkeypatch.setattr(CHGNetAdapter, "require_merge_exportable", refuse)
    monkeypatch.setattr(workflow, "merge", None)  # would be a TypeError
    for out in ("m.pth.tar", "m.safetensors"):
        line = gffmerge("merge", *PAIR, "--recipe", "apart.yaml", "--exportable", "--out", out).error()
        assert "too much alike" in line


@pytest.mark.filterwarnings("ignore")
def test_a_training_and_a_distillation_write_the_format_of_the_package(gffmerge, folder) -> None:
    frames = [atoms.copy() for atoms in ForceField.load(PAIR[0]).calibration]
    for atoms in frames:
        zero = {"energy": 0.0, "forces": np.zeros((len(atoms), 3))}
        atoms.calc = SinglePointCalculator(atoms, **zero)
    write("frames.xyz", frames)
    Path("quick.yaml").write_text("epochs: 1\nvalidation: 1\n")
    Path("short.yaml").write_text(f"{SOLVES}readout: null\nrefine: {{copies: 0, epochs: 1}}\n")
    train = ("train", "frames.xyz", "--init", PAIR[0], "--config", "quick.yaml", "--out")
    distill = ("distill", *PAIR, "--recipe", "short.yaml", "--out")
    for name, command in (("trained", train), ("distilled", distill)):
        energies = []
        for out, source in ((f"{name}.pth.tar", f"chgnet:{name}.pth.tar"), (f"{name}.safetensors",) * 2):
            done = gffmerge(*command, out, "--overwrite")
            assert done.code == 0, done.err
            potential = load_force_field(source).to(dtype=torch.float32).potential
            energies.append(predict_frames(potential, frames).energies)
        np.testing.assert_allclose(*energies, atol=1e-4)
    line = gffmerge("distill", *PAIR, "--recipe", "wide.yaml", "--out", "wide.pth.tar").error()
    assert "readout: null" in line


def test_a_name_of_another_package_is_none_for_a_force_field_of_this_one(gffmerge, folder, files) -> None:
    (folder / "frames.xyz").write_text("1\n\nH 0 0 0\n")
    for command in (
        ("train", "frames.xyz", "--init", "water.safetensors"),
        ("train", "frames.xyz"),
        ("distill", "methanol.safetensors", "water.safetensors"),
        ("distill", *PAIR, "--student", "painn"),
        ("compress", "water.safetensors", "--channels", "2"),
        ("convert", "water.safetensors"),
    ):
        out = ("--out", "m.pth") if command[0] != "convert" else ("m.pth",)
        assert "no format but .safetensors" in gffmerge(*command, *out).error()
    assert not list(Path().glob("m.*"))
    with pytest.raises(FileFormatError, match=r"m\.pth is no name .* end it in \.safetensors"):
        ForceField.load(PAIR[0]).save("m.pth")


def test_a_recipe_that_is_exportable_stays_as_it_is() -> None:
    distilled = Recipe(refine={})
    assert not distilled.keeps_wide_readout
    assert distilled.exportable() == distilled
    wide = Recipe(readout={}, refine={})
    assert wide.keeps_wide_readout
    assert wide.exportable() == distilled
