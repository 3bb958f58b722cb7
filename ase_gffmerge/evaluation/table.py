"""Tables of results: text, Markdown, JSON, and a terminal's."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table as RichTable

    from ase_gffmerge.inference.errors import Errors
    from ase_gffmerge.inference.reliability import Reliability

    Reliabilities = Mapping[str, Mapping[str, Reliability]]
    """Of energies and forces, by label of the model."""


Value = str | float | int | None
"""What a cell holds; ``None`` is left empty."""


@dataclass(frozen=True)
class Best:
    """A value that is the best of its column."""

    value: Value


@dataclass(frozen=True)
class Column:
    """A column of values of one kind.

    Attributes
    ----------
    title, unit
        Of the heading.
    spec
        Format of its numbers, such as ``.1f``.
    words
        Whether it is aligned to the left, as text is.
    """

    title: str
    unit: str = ""
    spec: str = ".6g"
    words: bool = False

    @property
    def heading(self) -> str:
        """Title with unit."""
        return f"{self.title} ({self.unit})" if self.unit else self.title

    def text(self, value: Value) -> str:
        """Write a value of this column."""
        if value is None or isinstance(value, str):
            return value or ""
        return str(value) if isinstance(value, int) else format(value, self.spec)


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of values under columns with units.

    Attributes
    ----------
    title
        Above the table; may be empty.
    columns
        A table whose columns all lack a title is shown without a heading.
    rows
        As many cells each as there are columns.
    footnotes
        Lines below the table.
    """

    title: str = ""
    columns: tuple[Column, ...]
    rows: tuple[tuple[Value | Best, ...], ...]
    footnotes: tuple[str, ...] = ()

    @classmethod
    def of_values(cls, values: Mapping[str, Value] | Iterable[tuple[str, Value]]) -> "Table":
        """Names and values in two columns, without a heading."""
        pairs = values.items() if isinstance(values, Mapping) else values
        return cls(columns=(Column("", words=True), Column("", words=True)), rows=tuple(pairs))

    def to_rows(self) -> list[dict[str, Value]]:
        """Values by heading, a dictionary for each row, JSON-able."""
        headings = [column.heading for column in self.columns]
        return [dict(zip(headings, (_plain(cell)[0] for cell in row), strict=True)) for row in self.rows]

    def to_markdown(self) -> str:
        """Write heading, rows (the best values bold) and footnotes as Markdown, without the title."""
        rule = ["---" if column.words else "---:" for column in self.columns]
        lines = [[column.heading for column in self.columns], rule]
        for row in self._written():
            lines.append([f"**{text}**" if best else text for text, best in row])
        table = "\n".join(
            f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines
        )
        return "\n\n".join([table, *self.footnotes])

    def to_text(self, width: int | None = None) -> str:
        """Write title, rows (the best values with a star) and footnotes as plain text.

        Parameters
        ----------
        width
            Characters in a line, into which the cells are folded; default: as many as the table needs.
        """
        from rich.console import Console

        file = StringIO()
        Console(file=file, width=width or 100_000, color_system=None).print(self.to_rich())
        lines = [line.rstrip() for line in file.getvalue().strip("\n").splitlines()]
        return "\n".join([*lines, *self.footnotes])

    def to_rich(self) -> "RichTable":
        """Give the title and the rows for a terminal, the best values bold and with a star."""
        from rich.box import SIMPLE
        from rich.table import Table as RichTable
        from rich.text import Text

        named = any(column.title for column in self.columns)
        drawn = RichTable(
            title=self.title or None,
            title_justify="left",
            box=SIMPLE if named else None,
            show_header=named,
            padding=(0, 2, 0, 0),
            pad_edge=named,
        )
        for column in self.columns:
            drawn.add_column(
                Text(column.heading), justify="left" if column.words else "right", overflow="fold"
            )
        for row in self._written():
            drawn.add_row(
                *(Text(f"* {text}", style="bold green") if best else Text(text) for text, best in row)
            )
        return drawn

    def _written(self) -> list[list[tuple[str, bool]]]:
        rows = [[_plain(cell) for cell in row] for row in self.rows]
        return [
            [(column.text(value), best) for column, (value, best) in zip(self.columns, row, strict=True)]
            for row in rows
        ]


def _plain(cell: Value | Best) -> tuple[Value, bool]:
    return (cell.value, True) if isinstance(cell, Best) else (cell, False)


def error_table(errors: "Mapping[str, Errors]", reliabilities: "Reliabilities") -> Table:
    """A row per quantity with its unit, and a column per model.

    Parameters
    ----------
    errors, reliabilities
        By label of the model; the second may be empty.
    """
    found = list(errors.values())
    rows = [
        ("force MAE (meV/Å)", *(f"{1000 * e.force_mae:.2f}" for e in found)),
        ("force RMSE (meV/Å)", *(f"{1000 * e.force_rmse:.2f}" for e in found)),
        *(
            (
                f"force MAE of {symbol} (meV/Å)",
                *(f"{1000 * e.force_mae_by_element[symbol]:.2f}" for e in found),
            )
            for symbol in found[0].force_mae_by_element
        ),
        ("energy MAE (meV/atom)", *(f"{1000 * e.energy_mae:.2f}" for e in found)),
        (
            "stress MAE (GPa)",
            *("no labels" if e.stress_mae is None else f"{e.stress_mae:.4f}" for e in found),
        ),
        ("frames", *(str(e.n_frames) for e in found)),
        *_reliability_rows(list(errors), reliabilities),
    ]
    return Table(columns=(Column("model", words=True), *map(Column, errors)), rows=tuple(rows))


def _reliability_rows(labels: Sequence[str], reliabilities: "Reliabilities") -> list[tuple[str, ...]]:
    titles = {
        "ratio": "{} error / standard deviation (RMS)",
        "rank_correlation": "{} error and standard deviation: rank correlation",
        "calibration_error": "{} calibration error of the standard deviation",
    }
    columns = [reliabilities.get(label) for label in labels]
    return [
        (
            title.format(what),
            *("none" if c is None else f"{getattr(c[name], key):.2f}" for c in columns),
        )
        for what, name in (("force", "forces"), ("energy", "energies"))
        for key, title in titles.items()
        if reliabilities
    ]
