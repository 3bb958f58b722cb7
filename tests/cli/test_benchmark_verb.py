"""``gffmerge benchmark`` on tiny specialists: what is measured, never how long it takes."""

import math
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
from ase import Atoms
from ase.build import bulk, molecule

from ase_gffmerge.cli import benchmark
from ase_gffmerge.evaluation.benchmark import peers as benchmark_peers
from ase_gffmerge.evaluation.benchmark import schnetpack as benchmark_schnetpack
from ase_gffmerge.evaluation.benchmark.harness import Row, crowd
from ase_gffmerge.evaluation.benchmark.rows import ROWS
from ase_gffmerge.forcefield.force_field import ForceField
from ase_gffmerge.models import build_potential

QUICK = ("--atoms", 3, "--scaling", 6, "--scaling", 12, "--steps", 3, "--repeats", 1, "--device", "cpu")
PEERS = ("schnetpack", "nequip", "torchmd-net")


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

    monkeypatch.setattr(
        benchmark_schnetpack, "SCHNETPACK", replace(benchmark_schnetpack.SCHNETPACK, make=broken)
    )
    monkeypatch.setattr(benchmark_peers, "find_spec", {"schnetpack": "found"}.get)
    shown = gffmerge("benchmark", pair[0], "--only", *PEERS, *QUICK, "--json").json()["rows"]
    assert [shown[name][0]["note"] for name in PEERS] == [
        "schnetpack does not work here: cannot import name 'T_co'",
        "nequip is not installed",
        "torchmd-net is not installed",
    ]
