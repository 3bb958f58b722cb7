"""Making a calculator: sources, merging through the cache, the choice of specialists, and bad input."""

import html
import json
import os
import pickle
import subprocess
import sys
import tempfile
import warnings
from contextlib import suppress
from types import SimpleNamespace

import numpy as np
import pytest
from ase.calculators.calculator import CalculatorSetupError

import ase_gffmerge.runtime.progress as progress_module
from ase_gffmerge import GFFMergeCalculator
from ase_gffmerge.errors import (
    CacheError,
    DeviceError,
    FileFormatError,
    GFFMergeError,
    IncompatibleSpecialistsError,
    MergeWarning,
    RecipeError,
    StructureError,
)
from helpers.structures import cluster
from helpers.toys import random_force_field, stranger

QUICK = {"preset": "closed-form", "select": False, "readout": {"width": 16}}


def energy(calc, **choice):
    atoms = cluster()
    atoms.info |= choice
    atoms.calc = calc
    return atoms.get_potential_energy()


# -- sources --


def test_a_single_specialist_is_served_as_it_is(force_field, tmp_path):
    path = force_field.save(tmp_path / "one.safetensors")
    energies = {
        energy(GFFMergeCalculator(source, dtype="float64", device="cpu"))
        for source in (path, str(path), [path], (force_field,), force_field)
    }
    assert len(energies) == 1
    calc = GFFMergeCalculator(path, device="cpu")
    assert calc.report is None
    assert calc.specialist_names == ("toy",)
    assert not any(tmp_path.glob("*/"))


def test_several_specialists_are_merged_once(relatives, tmp_path, monkeypatch):
    options = {"recipe": QUICK, "dtype": "float64", "cache_dir": tmp_path, "device": "cpu"}
    heard = []
    first = GFFMergeCalculator(relatives, progress=lambda fraction, text: heard.append(fraction), **options)
    assert heard[-1] == 1.0
    assert first.specialist_names == ("ethanol", "methanol")
    assert first.report.verdict in ("good", "fair", "failed")
    second = GFFMergeCalculator(relatives, progress=lambda *_: pytest.fail("merged again"), **options)
    assert energy(first) == energy(second)
    assert first.report.to_dict() == second.report.to_dict()


def test_the_merged_file_is_a_source(relatives, tmp_path):
    merged = GFFMergeCalculator(relatives, recipe="mean", dtype="float64", cache_dir=tmp_path, device="cpu")
    (path,) = tmp_path.glob("*.safetensors")
    again = GFFMergeCalculator(path, dtype="float64", device="cpu")
    assert energy(again) == energy(merged)
    assert again.specialist_names == merged.specialist_names
    assert again.report is not None


def test_the_callers_specialists_are_not_changed(relatives, tmp_path):
    before = [s.fingerprint for s in relatives]
    GFFMergeCalculator(relatives, recipe=QUICK, cache_dir=tmp_path, device="cpu")
    assert [s.fingerprint for s in relatives] == before


def test_a_poor_merge_warns_on_every_use(tmp_path):
    strangers = [stranger(random_force_field("painn"), "a", "CH3OH", seed=1)]
    other = stranger(strangers[0], "b", "CH3CH2OH", seed=2)
    for parameter in other.potential.parameters():
        parameter.add_(parameter.roll(1, -1))
    options = {"recipe": {"preset": "paper"}, "allow_unrelated": True, "cache_dir": tmp_path, "device": "cpu"}
    for _ in range(2):
        with pytest.warns(MergeWarning, match="misses a specialist's forces"):
            GFFMergeCalculator([*strangers, other], **options)


# -- the choice of specialists --


@pytest.mark.parametrize("via_file", [True, False])
def test_per_specialist_embeddings(conditioned, via_file, tmp_path):
    source = conditioned.save(tmp_path / "m.safetensors") if via_file else conditioned
    calc = GFFMergeCalculator(source, conditioning="per-specialist", dtype="float64", device="cpu")
    by_name = [energy(calc, specialist=name) for name in calc.specialist_names]
    assert by_name[0] != by_name[1]
    assert [energy(calc, specialist=i) for i in (0, 1)] == by_name
    fixed = GFFMergeCalculator(source, specialist="methanol", dtype="float64", device="cpu")
    assert energy(fixed) == by_name[1]
    assert energy(fixed, specialist="ethanol") == by_name[0], "the structure's word counts more"
    fixed.set(specialist="ethanol")
    assert energy(fixed) == by_name[0]
    assert energy(pickle.loads(pickle.dumps(fixed))) == by_name[0]
    numbered = GFFMergeCalculator(source, specialist=np.int64(1), dtype="float64", device="cpu")
    assert energy(numbered) == by_name[1]
    assert json.dumps(numbered.todict()["specialist"]) == "1"


def test_per_atom_specialists(conditioned):
    calc = GFFMergeCalculator(conditioned, dtype="float64", device="cpu")
    energies = []
    for array in ([0, 0, 0, 1, 1, 1], list("000111"), np.array(["ethanol"] * 3 + ["methanol"] * 3)):
        atoms = cluster()
        atoms.arrays["specialist"] = np.array(array)
        atoms.calc = calc
        energies.append(atoms.get_potential_energy())
    assert energies[0] == energies[1] == energies[2]
    assert energies[0] not in (energy(calc, specialist=0), energy(calc, specialist=1))


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("propanol", r"no specialist called 'propanol'.*0 = 'ethanol'"),
        ("2", "no specialist called '2'"),
        (2, "no specialist number 2"),
        (-1, "no specialist number -1"),
        (0.5, "float64 values"),
        ([0, 1], r"shape \(2,\)"),
        (None, "nothing says which one"),
    ],
)
def test_unknown_specialists_are_refused(conditioned, choice, message):
    calc = GFFMergeCalculator(conditioned, device="cpu")
    with pytest.raises(CalculatorSetupError, match=message) as info:
        energy(calc, **({} if choice is None else {"specialist": choice}))
    assert isinstance(info.value, StructureError)
    assert np.isfinite(energy(calc, specialist="ethanol"))


def test_specialists_that_share_a_name_are_told_apart(relatives, tmp_path):
    twins = [relatives[0], stranger(relatives[0], "ethanol", "CH3OH", seed=5)]
    recipe = {"preset": "mean", "conditioning": "per-specialist"}
    calc = GFFMergeCalculator(twins, recipe=recipe, specialist="ethanol-2", cache_dir=tmp_path, device="cpu")
    assert calc.specialist_names == ("ethanol", "ethanol-2")


# -- bad input --


@pytest.mark.parametrize(
    ("arguments", "message", "kind"),
    [
        ({"specialists": []}, "no specialists were given; name at least one of rmd17", GFFMergeError),
        ({"specialists": 5}, "5 .int. is no specialist", GFFMergeError),
        ({"specialists": "rmd17-etanol"}, "did you mean 'rmd17-ethanol'", FileFormatError),
        ({"specialists": "nowhere.safetensors"}, "neither bundled nor as a file", FileFormatError),
        ({"dtype": "float16"}, "float16.* use 'float32' or 'float64'", GFFMergeError),
        ({"skin": -1.0}, "skin=-1.0 is no length", GFFMergeError),
        ({"skin": "wide"}, "skin='wide' is no length", GFFMergeError),
        ({"device": "tpu9"}, "not a device", DeviceError),
        ({"weights": [1.0]}, "only one force field", GFFMergeError),
        ({"weights": 1.0}, "not a list of numbers", GFFMergeError),
        ({"conditioning": "per-specialist"}, "is a single specialist", GFFMergeError),
        ({"specialist": "toy"}, "has no effect", GFFMergeError),
    ],
)
def test_bad_arguments(arguments, message, kind):
    arguments = {"specialists": random_force_field("painn"), **arguments}
    with pytest.raises(CalculatorSetupError, match=message) as info:
        GFFMergeCalculator(**arguments)
    assert isinstance(info.value, kind)
    assert "\n" not in str(info.value)
    assert type(pickle.loads(pickle.dumps(info.value))) is type(info.value)


@pytest.mark.parametrize(
    ("arguments", "message", "kind"),
    [
        ({"recipe": "gffmrge"}, "neither a recipe file nor one of", RecipeError),
        ({"recipe": {"rigde": 1}}, "did you mean 'ridge'", RecipeError),
        ({"recipe": "mean", "weights": [1, 2, 3]}, "2 positive numbers", RecipeError),
        ({"conditioning": "both"}, "conditioning", RecipeError),
    ],
)
def test_bad_merge_arguments(relatives, arguments, message, kind, tmp_path):
    with pytest.raises(CalculatorSetupError, match=message) as info:
        GFFMergeCalculator(relatives, cache_dir=tmp_path, device="cpu", **arguments)
    assert isinstance(info.value, kind)
    assert not list(tmp_path.glob("*.safetensors"))


def test_specialists_that_must_not_be_merged(relatives, tmp_path):
    with pytest.raises(IncompatibleSpecialistsError, match="given twice"):
        GFFMergeCalculator([relatives[0], relatives[0]], cache_dir=tmp_path, device="cpu")


def test_unwritable_cache_is_told_before_the_merge(relatives, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CacheError, match=r"cannot write to the cache folder .* GFFMERGE_CACHE") as info:
        GFFMergeCalculator(
            relatives,
            cache_dir=tmp_path / "file" / "cache",
            device="cpu",
            progress=lambda *_: pytest.fail("merged"),
        )
    assert isinstance(info.value, CalculatorSetupError)


def test_truncated_and_foreign_files(force_field, tmp_path):
    path = force_field.save(tmp_path / "one.safetensors")
    path.write_bytes(path.read_bytes()[:-10])
    text = tmp_path / "notes.safetensors"
    text.write_text("no tensors here")
    for source in (path, text, tmp_path):
        with pytest.raises(CalculatorSetupError, match=source.name) as info:
            GFFMergeCalculator(source, device="cpu")
        assert isinstance(info.value, FileFormatError)


def test_set_refuses_what_it_cannot_change(painn_calc):
    with pytest.raises(CalculatorSetupError, match="make a new GFFMergeCalculator"):
        painn_calc.set(dtype="float32")
    with pytest.raises(CalculatorSetupError, match="has no effect"):
        painn_calc.set(specialist="toy")


def test_no_warnings_when_all_is_well(painn_calc):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        energy(painn_calc)


def test_its_repr_is_one_line_that_says_what_is_evaluated_and_where() -> None:
    calc = GFFMergeCalculator(random_force_field("painn"), device="cpu", dtype="float64")
    assert repr(calc).startswith(f"GFFMergeCalculator({calc.force_field.name}; elements ")
    assert repr(calc).endswith("; float64 on cpu)")


def test_a_notebook_shows_what_it_is_and_what_the_merge_was_worth(relatives, tmp_path) -> None:
    alone = GFFMergeCalculator(relatives[0], device="cpu")
    assert alone._repr_html_() == f"<p>{html.escape(repr(alone))}</p>"
    merged = GFFMergeCalculator(relatives, recipe="mean", cache_dir=tmp_path, device="cpu")
    page = merged._repr_html_()
    assert all(word in page for word in (merged.report.verdict, "<img ", *merged.specialist_names))
    assert f"elements {', '.join(merged.report.elements)}" in page


WATCHED = """
import sys
from ase_gffmerge import GFFMergeCalculator
options = {"progress": lambda *_: None} if sys.argv[1] == "given" else {}
GFFMergeCalculator(sys.argv[3:], recipe="mean", cache_dir=sys.argv[2], device="cpu", **options)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="terminals")
@pytest.mark.parametrize(("progress", "terminal"), [("default", True), ("given", True), ("default", False)])
def test_a_merge_shows_a_bar_on_a_terminal_only_and_says_what_it_does(
    relatives, tmp_path, progress, terminal
):
    files = [specialist.save(tmp_path / f"{specialist.name}.safetensors") for specialist in relatives]
    pty = pytest.importorskip("pty")
    shown, end = pty.openpty()
    command = [sys.executable, "-W", "ignore", "-c", WATCHED, progress, tmp_path / "cache", *files]
    environment = {**os.environ, "COLUMNS": "200", "TERM": "xterm"}
    with tempfile.TemporaryFile() as plain:
        run = subprocess.run(command, stderr=end if terminal else plain, env=environment, check=False)
        os.close(end)
        written = b""
        with suppress(OSError):  # how a closed terminal ends
            while chunk := os.read(shown, 65536):
                written += chunk
        os.close(shown)
        plain.seek(0)
        written += plain.read()
    assert run.returncode == 0, written
    assert (b"merging ethanol + methanol" in written) == (terminal and progress == "default"), written
    assert written == b"" or (terminal and progress == "default")


def test_notebooks_are_seen(monkeypatch):
    for names, shell, seen in (
        ({"ipywidgets"}, SimpleNamespace(kernel=None), True),
        (set(), SimpleNamespace(kernel=None), False),
        ({"ipywidgets"}, SimpleNamespace(), False),
        ({"ipywidgets"}, None, False),
    ):
        monkeypatch.setattr(progress_module, "find_spec", lambda name, names=names: name in names or None)
        monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda shell=shell: shell))
        assert progress_module.in_notebook() == seen
