"""One table, three ways to write it."""

import json

from ase_gffmerge.evaluation.table import Best, Column, Table

TABLE = Table(
    title="Errors",
    columns=(Column("method", words=True), Column("force MAE", "meV/Å", ".1f"), Column("frames")),
    rows=(("one|two", Best(1.25), 3), ("a method with a long name", 20.0, None)),
    footnotes=("of test frames",),
)


def test_text_is_as_wide_as_it_is() -> None:
    lines = TABLE.to_text().splitlines()
    assert lines[0] == "Errors"
    assert "force MAE (meV/Å)" in TABLE.to_text()
    (best,) = (line for line in lines if "one|two" in line)
    assert best.split() == ["one|two", "*", "1.2", "3"]
    assert lines[-1] == "of test frames"
    assert len({line.index("20.0") + 4 for line in lines if "20.0" in line} | {best.index("1.2") + 3}) == 1


def test_text_folds_into_a_width() -> None:
    lines = TABLE.to_text(width=30).splitlines()[:-1]
    assert max(map(len, lines)) <= 30


def test_markdown() -> None:
    assert TABLE.to_markdown().splitlines() == [
        "| method | force MAE (meV/Å) | frames |",
        "| --- | ---: | ---: |",
        "| one\\|two | **1.2** | 3 |",
        "| a method with a long name | 20.0 |  |",
        "",
        "of test frames",
    ]


def test_rows_are_values() -> None:
    rows = TABLE.to_rows()
    assert rows[0] == {"method": "one|two", "force MAE (meV/Å)": 1.25, "frames": 3}
    assert json.loads(json.dumps(rows)) == rows


def test_values_have_no_heading() -> None:
    shown = Table.of_values({"energy (eV)": -1.23456789, "path": "a b", "verdict": "good\nindeed"}).to_text()
    assert shown.splitlines() == [
        "energy (eV)  -1.23457",
        "path         a b",
        "verdict      good",
        "             indeed",
    ]
