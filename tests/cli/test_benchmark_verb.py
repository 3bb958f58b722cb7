"""``gffmerge benchmark`` on tiny specialists: what is measured, never how long it takes."""

import math
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
from ase import Atoms
from ase.build import bulk, molecule

from ase_gffmerge.cli import benchmark
from ase_gffmerge.evaluation.benchmark import ROWS
from ase_gffmerge.evaluation.benchmark.harness import Row, crowd
from ase_gffmerge.forcefield.force_field import ForceField
from ase_gffmerge.models import build_potential

QUICK = ("--atoms", 3, "--scaling", 6, "--scaling", 12, "--steps", 3, "--repeats", 1, "--device", "cpu")
PEERS = {"schnetpack": "peer_schnetpack", "nequip": "peer_nequip", "torchmd-net": "peer_torchmdnet"}
FOLDER = Path(__file__).parents[2] / "md_examples" / "benchmarks"


@pytest.fixture
def pair(tmp_path: Path) -> list[Path]:
    potential = build_potential("painn", {"channels": 8, "n_blocks": 1, "n_radial": 4, "cutoff": 4.0}, (1, 8))
    paths = [tmp_path / f"{name}.safetensors" for name in ("one", "two")]
    for path in paths:
        frame = molecule("H2O")
        frame.rattle(0.05)
        ForceField(name=path.stem, potential=potential.eval(), calibration=(frame,)).save(path)
        potential.readout.out.bias.data += 0.1
    return paths


@pytest.mark.filterwarnings("ignore::ase_gffmerge.errors.MergeWarning")
def test_all_rows_but_those_of_other_packages(gffmerge, pair, monkeypatch) -> None:
    steps = []
    monkeypatch.setattr(
        benchmark,
        "progress_bar",
        lambda _: nullcontext(lambda fraction, text: steps.append((fraction, text))),
    )
    options = [word for name in ROWS if name not in PEERS for word in ("--only", name)]
    shown = gffmerge("benchmark", *pair, *options, *QUICK, "--plot", "scaling.png", "--json").json()
    assert set(shown["rows"]) == set(ROWS) - set(PEERS)
    assert shown["machine"]["architecture"] == "painn"
    measured = [row for rows in shown["rows"].values() for row in rows if row["ratio"] is not None]
    assert {"what", "against", "target", "sense", "met", "milliseconds", "note"} <= set(measured[0])
    assert len(measured) >= 7
    for row in measured:
        assert math.isfinite(row["ratio"]), row
        assert all(value > 0 for value in row["milliseconds"].values()), row
    assert Path("scaling.png").read_bytes().startswith(b"\x89PNG")
    fractions, texts = map(list, zip(*steps, strict=True))
    assert fractions == sorted(fractions)
    assert 5 < texts.index("merge") < len(texts) - 5, "the merge, and then the rows, show their progress"
    assert fractions[texts.index("merge")] == benchmark.MERGE_SHARE


def test_table_for_people(gffmerge, pair) -> None:
    shown = gffmerge("benchmark", pair[0], "--only", "gram", "memory", *QUICK).out
    assert "reference recipe" in shown
    assert "met" in shown or "missed" in shown


@pytest.mark.parametrize("sizes", [(6,), (6, 7)], ids=["one", "the same twice"])
def test_one_size_has_no_exponent(gffmerge, pair, sizes) -> None:
    options = [word for size in sizes for word in ("--scaling", size)]
    shown = gffmerge(
        "benchmark", pair[0], "--only", "scaling", *options, "--repeats", 1, "--device", "cpu", "--json"
    )
    (row,) = shown.json()["rows"]["scaling"]
    assert row["ratio"] is None
    assert row["met"] is None
    assert list(row["milliseconds"]) == ["6"]
    assert "6 atoms alone have no exponent; give --scaling twice" in row["note"]


def test_unknown_rows_are_refused(gffmerge, pair) -> None:
    assert (
        "there is no row speed; choose from merge"
        in gffmerge("benchmark", pair[0], "--only", "speed").error()
    )


def test_targets() -> None:
    row = {"what": "a", "against": "b"}
    assert Row(**row, ratio=1.0, target=1.1).met
    assert not Row(**row, ratio=1.0, target=1.1, sense="at least").met
    assert Row(**row, ratio=None, target=1.1).met is None


def test_crowds() -> None:
    water = molecule("H2O")
    assert len(crowd(water, 3)) == 3
    assert not crowd(water, 3).pbc.any()
    many = crowd(water, 300)
    assert len(many) == 300
    assert many.pbc.all()
    distances = Atoms.get_all_distances(many, mic=True)
    assert distances[~distances.astype(bool) == 0].min() > 0.7
    assert len(crowd(bulk("Cu", cubic=True), 100)) >= 100


def test_packages_that_are_not_there_or_do_not_work_are_named(gffmerge, pair, monkeypatch) -> None:
    def broken(*_):
        raise ImportError("cannot import name 'T_co'")

    files = [word for name in PEERS.values() for word in ("--with", FOLDER / f"{name}.py")]
    gffmerge("benchmark", pair[0], *files, "--only", "merge", *QUICK, "--json").json()
    schnetpack = sys.modules["peer_schnetpack"]
    monkeypatch.setattr(schnetpack, "SCHNETPACK", replace(schnetpack.SCHNETPACK, make=broken))
    monkeypatch.setattr(sys.modules["peers"], "find_spec", {"schnetpack": "found"}.get)
    shown = gffmerge("benchmark", pair[0], *files, "--only", *PEERS, *QUICK, "--json").json()["rows"]
    assert [shown[name][0]["note"] for name in PEERS] == [
        "schnetpack does not work here: cannot import name 'T_co'",
        "nequip is not installed",
        "torchmd-net is not installed",
    ]


def test_a_file_adds_rows(gffmerge, pair, tmp_path, monkeypatch) -> None:
    monkeypatch.delitem(sys.modules, "own_rows", raising=False)
    (tmp_path / "helpers_of_rows.py").write_text("RATIO = 0.5\n")
    own = tmp_path / "own_rows.py"
    own.write_text(
        "from helpers_of_rows import RATIO\n"
        "from ase_gffmerge.evaluation.benchmark.harness import Row, register\n"
        "@register('own')\n"
        "def own(bench):\n"
        "    yield Row(what='a', against=f'{len(bench.specialists)} of b', ratio=RATIO, target=1.0)\n"
    )
    try:
        for _ in range(2):
            shown = gffmerge("benchmark", pair[0], "--with", own, "--only", "own", *QUICK, "--json").json()
            assert [(row["against"], row["ratio"], row["met"]) for row in shown["rows"]["own"]] == [
                ("1 of b", 0.5, True)
            ]
    finally:
        ROWS.pop("own", None)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("missing.txt", "", "is not a Python file"),
        ("broken_rows.py", "import no_such_package", "cannot be imported: No module named"),
        ("json.py", "", "has the name of another module, 'json'; rename the file"),
        (
            "twice.py",
            "from ase_gffmerge.evaluation.benchmark.harness import register\nregister('merge')(None)",
            "two rows 'merge'",
        ),
    ],
)
def test_files_that_add_no_rows_are_refused(gffmerge, pair, tmp_path, name, text, message) -> None:
    (tmp_path / name).write_text(text)
    assert message in gffmerge("benchmark", pair[0], "--with", tmp_path / name, *QUICK).error()


def test_help_names_every_row(gffmerge) -> None:
    shown = " ".join(gffmerge("benchmark", "--help").out.replace("│", " ").split())
    assert ", ".join(name for name in ROWS if name not in {*PEERS, "own"}) in shown
