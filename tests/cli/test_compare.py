"""``gffmerge compare`` on tiny and on bundled specialists."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import read, write

from ase_gffmerge.cli.options import spread
from ase_gffmerge.data.frames import geometry_keys
from ase_gffmerge.evaluation.comparison import compare as comparison
from ase_gffmerge.forcefield.force_field import ForceField
from ase_gffmerge.methods import METHODS, MergeOutput

BUNDLED = ("rmd17-ethanol", "rmd17-malonaldehyde")
PAIR = ("methanol.safetensors", "water.safetensors")
TESTS = ("methanol.xyz", "water.xyz")


@pytest.fixture
def unseen(files: Path) -> Path:
    """The folder of ``files``, whose frames the specialists have not seen: they keep the first three only."""
    for path, frames in zip(PAIR, TESTS):
        specialist = ForceField.load(files / path)
        seen = specialist.calibration[:3]
        provenance = replace(specialist.provenance, seen_frames=geometry_keys(seen))
        replace(specialist, calibration=seen, provenance=provenance).save(files / path)
        write(files / frames, read(files / frames, "3:"), format="extxyz")
    return files


def labelled(atoms: Atoms) -> Atoms:
    atoms.calc = SinglePointCalculator(atoms, energy=0.0, forces=0 * atoms.positions)
    return atoms


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Every method returns the first specialist; the names of those that ran."""
    ran: list[str] = []
    saved = dict(METHODS)
    for name, method in saved.items():

        def run(merge_inputs, progress, name=name):
            ran.append(name)
            return MergeOutput(potentials=(merge_inputs.specialists[0].potential,), settings={"scale": 0.5})

        METHODS[name] = replace(method, run=run)
    yield ran
    METHODS.update(saved)


def test_bundled_pair(gffmerge, tmp_path: Path) -> None:
    options = ("--methods", "mean", "paper", "ensemble", "--device", "cpu", "--resume", "rows")
    document = gffmerge("compare", *BUNDLED, *options, "--json").json()
    errors = document["force_mae"]
    assert list(errors) == ["specialist", "mean", "paper", "ensemble"]
    for name in BUNDLED:
        assert errors["specialist"][name] < 0.030
        assert 0.1 < errors["mean"][name] < 0.5
        assert 0.1 < errors["ensemble"][name] < 0.5
    assert document["parameters"]["ensemble"] == 2 * document["parameters"]["mean"]
    assert min(document["cost"].values()) > 0
    assert document["base"] == "rmd17-base"
    assert document["notes"] == []
    rows = {path: path.read_bytes() for path in (tmp_path / "rows").iterdir()}
    assert len(rows) == 4
    again = gffmerge("compare", *BUNDLED, *options, "--markdown", "out/table.md", "--plot", "out/bars.png")
    assert again.code == 0, again.err
    assert "rmd17-malonaldehyde" in again.out
    assert "* best of its column" in again.out
    assert rows == {path: path.read_bytes() for path in (tmp_path / "rows").iterdir()}, "taken from there"
    text = (tmp_path / "out" / "table.md").read_text(encoding="utf-8")
    assert f"| {1000 * errors['mean']['rmd17-ethanol']:.1f} |" in text.replace("*", "")
    assert (tmp_path / "out" / "bars.png").read_bytes().startswith(b"\x89PNG")


def test_everything_without_training_is_default(gffmerge, unseen: Path, quick: list[str]) -> None:
    document = gffmerge("compare", *PAIR, "--test", *TESTS, "--json").json()
    ready = [name for name, m in METHODS.items() if not m.trains and "base" not in m.needs]
    assert quick == ready
    assert set(document["force_mae"]) == {"specialist", *ready}
    assert set(document["skipped"]) == set(METHODS) - set(ready)
    assert document["base"] is None
    assert "--base" in document["skipped"]["ties"]
    quick.clear()
    document = gffmerge("compare", *PAIR, "--test", *TESTS, "--base", "base.safetensors", "--json").json()
    assert set(quick) == {name for name, m in METHODS.items() if not m.trains} - set(ready)
    assert document["base"] == "base"
    assert "ties" in document["force_mae"]


def test_several_values_or_repeated_options(gffmerge, unseen: Path, quick: list[str]) -> None:
    first = gffmerge("compare", *PAIR, "--test", *TESTS, "--methods", "mean", "ties", "--json").json()
    options = ("--methods", "mean,ties", "--test", TESTS[0], "--test", TESTS[1])
    assert gffmerge("compare", *options, *PAIR, "--json").json() == first
    assert quick == ["mean"]


def test_spread() -> None:
    line = ["A", "B", "--test", "x", "y", "--json", "--test", "z", "--device", "cpu"]
    expected = ["A", "B", "--test", "x", "--test", "y", "--json", "--test", "z", "--device", "cpu"]
    assert spread(line, {"--test"}) == expected
    assert spread(expected, {"--test"}) == expected
    assert spread(["--test", "x", "A", "B"], {"--test"}) == ["--test", "x", "A", "B"]
    assert spread([], {"--test"}) == []


def test_fresh(gffmerge, unseen: Path, quick: list[str]) -> None:
    command = ("compare", *PAIR, "--test", *TESTS, "--methods", "mean", "--json")
    for options, runs in (((), 1), ((), 1), (("--fresh",), 2), (("--resume", "elsewhere"), 3)):
        gffmerge(*command, *options).json()
        assert quick == ["mean"] * runs
    assert list((unseen / "cache" / "comparisons").glob("*.safetensors"))


def test_moved_training_frame_is_refused(gffmerge, unseen: Path, quick: list[str]) -> None:
    frames = read(unseen / "water.xyz", ":")
    seen = ForceField.load(unseen / "water.safetensors").calibration[1]
    turned = Atoms(seen.numbers, seen.positions + 5.0)[[0, 2, 1]]
    turned.rotate(70, (1, 2, 3))
    write(unseen / "leaky.xyz", [*frames, labelled(turned)], format="extxyz")
    line = gffmerge("compare", *PAIR, "--test", "methanol.xyz", "leaky.xyz").error()
    assert f"1 of {len(frames) + 1} frames in leaky.xyz" in line
    assert "'water'" in line
    assert "leave them out" in line
    assert quick == []


def test_frames_of_the_labels_are_leaks_too(gffmerge, unseen: Path, quick: list[str]) -> None:
    line = gffmerge("compare", *PAIR, "--test", *TESTS, "--labels", *TESTS).error()
    assert "labelled training frames in methanol.xyz" in line


def test_files_that_know_no_frames_seen_get_a_note(gffmerge, unseen: Path, quick: list[str]) -> None:
    for path in PAIR:
        specialist = ForceField.load(unseen / path)
        forgotten = replace(specialist, provenance=replace(specialist.provenance, seen_frames=()))
        forgotten.save(unseen / path)
    outcome = gffmerge("compare", *PAIR, "--test", *TESTS, "--methods", "mean")
    assert outcome.code == 0
    assert "training of methanol, water saw" in outcome.out
    write(unseen / "leaky.xyz", labelled(ForceField.load(unseen / PAIR[1]).calibration[0]), format="extxyz")
    line = gffmerge("compare", *PAIR, "--test", TESTS[0], "leaky.xyz").error()
    assert "the calibration frames of 'water'" in line


def test_interrupted(gffmerge, unseen: Path, quick: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    measure = comparison.measure

    def stop_at_ties(method, *rest):
        if method.name == "ties":
            raise KeyboardInterrupt
        return measure(method, *rest)

    command = ("compare", *PAIR, "--test", *TESTS, "--base", "base.safetensors", "--methods", "mean", "ties")
    monkeypatch.setattr(comparison, "measure", stop_at_ties)
    outcome = gffmerge(*command)
    assert outcome.code == 130
    assert "the same command" in outcome.err
    monkeypatch.setattr(comparison, "measure", measure)
    assert set(gffmerge(*command, "--json").json()["force_mae"]) == {"specialist", "mean", "ties"}
    assert quick == ["mean", "ties"]


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        (PAIR, "no test frames for methanol.safetensors, water.safetensors"),
        ((*PAIR, "--test", "water.xyz"), "1 file(s) for 2 specialists"),
        ((PAIR[0], "--test", TESTS[0]), "at least two specialists"),
        ((*PAIR, "--test", "methanol.xyz", "ammonia.xyz"), "contains N"),
        ((*PAIR, "--test", *TESTS, "--methods", "tize"), "did you mean 'ties'"),
        ((*PAIR, "--test", *TESTS, "--base", "water.safetensors"), "is not the base of methanol"),
        ((*PAIR, "--test", *TESTS, "--device", "abacus"), "abacus"),
        ((*PAIR, "--test", *TESTS, "--labels", "water.xyz"), "--labels was given 1 file(s)"),
        ((*PAIR, "--test", *TESTS, "--plot", "water.xyz/bars.png"), "cannot write"),
        ((*PAIR, "--test", *TESTS, "--resume", "water.xyz/rows"), "cannot write"),
        (("rmd17-ethanole", PAIR[0], "--test", *TESTS), "did you mean 'rmd17-ethanol'"),
    ],
)
def test_bad_input(gffmerge, unseen: Path, arguments: tuple[str, ...], pattern: str) -> None:
    assert pattern in gffmerge("compare", *arguments).error()
