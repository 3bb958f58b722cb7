"""``gffmerge merge`` into the format of the specialists' package, and what that format cannot hold."""

from pathlib import Path

import numpy as np
import pytest
from ase import Atoms

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
    assert "save it as .safetensors; the merge is in m.pth.tar.safetensors" in done.err
    assert ForceField.load("m.pth.tar.safetensors").merged is not None


def test_a_recipe_that_is_exportable_stays_as_it_is() -> None:
    distilled = Recipe(refine={})
    assert not distilled.keeps_wide_readout
    assert distilled.exportable() == distilled
    wide = Recipe(readout={}, refine={})
    assert wide.keeps_wide_readout
    assert wide.exportable() == distilled
