"""Tables of results (text, Markdown, JSON) and the plots that go with them.

Plots of training and of forces, drawn on figures of their own (no global state of matplotlib is touched).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO, StringIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ase_gffmerge.storage.tensor_file import atomic_write

if TYPE_CHECKING:
    from rich.table import Table as RichTable

    from ase_gffmerge.training.checkpoint import History


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

        console = Console(file=StringIO(), width=width or 100_000, color_system=None)
        console.print(self.to_rich())
        file = console.file
        assert isinstance(file, StringIO)
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


CURVES = {
    "loss": "training loss",
    "force_mae": "force MAE (eV/Å)",
    "energy_mae": "energy MAE (eV/atom)",
}


def plot_history(history: "History", path: str | Path) -> Path:
    """Draw the loss curves of a training on a logarithmic axis and write a PNG.

    Parameters
    ----------
    history
        Losses per epoch.
    path
        The PNG file, written atomically.

    Raises
    ------
    FileFormatError
        When ``path`` cannot be written.
    """
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    for key, label in CURVES.items():
        _curve(axes, [row.get(key) for row in history.rows], label)
    axes.set(xlabel="epoch", yscale="log")
    axes.grid(visible=True, which="both", alpha=0.25, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(loc="outside upper center", ncols=len(CURVES), frameon=False, fontsize="small")
    return save_figure(figure, Path(path))


def save_figure(figure: Figure, path: Path) -> Path:
    """Write ``figure`` as a PNG, atomically."""
    buffer = BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    atomic_write(path, buffer.getvalue())
    return path


def _curve(axes: Axes, values: Sequence[float | None], label: str) -> None:
    points = [(epoch, value) for epoch, value in enumerate(values, start=1) if value]
    if points:
        marker = "o" if len(points) < 30 else ""
        axes.plot(*zip(*points, strict=True), label=label, linewidth=1.5, marker=marker, markersize=3)


COLOURS = {
    "specialist": "#222222",
    "gffmerge": "#2a8fb0",
    "paper": "#d1793b",
    "mean": "#b8b8b8",
    "ensemble": "#8d7bb0",
}


def plot_errors(force_mae: Mapping[str, Mapping[str, float]], path: Path) -> Path:
    """Draw mean absolute force errors as bars, a panel per molecule, and write a PNG.

    Parameters
    ----------
    force_mae
        Errors in eV/Å by model and molecule.
    path
        The PNG file, written atomically.
    """
    molecules = list(next(iter(force_mae.values())))
    figure = Figure(figsize=(3.6 * len(molecules), 0.35 * len(force_mae) + 0.9), layout="constrained")
    grid = figure.subplots(1, len(molecules), squeeze=False, sharex=True, sharey=True)[0]
    for axes, molecule in zip(grid, molecules):
        errors = [1000 * row[molecule] for row in force_mae.values()]
        bars = axes.barh(
            list(force_mae), errors, color=[COLOURS.get(model, "#b8b8b8") for model in force_mae]
        )
        axes.bar_label(bars, fmt="%.0f", padding=2, fontsize=8)
        axes.set_title(molecule, fontsize="medium")
        axes.spines[["top", "right"]].set_visible(False)
    grid[0].invert_yaxis()
    grid[0].set_xlim(0, 1.12 * max(1000 * value for row in force_mae.values() for value in row.values()))
    figure.supxlabel("force MAE on test frames (meV/Å)", fontsize="medium")
    return save_figure(figure, path)


def plot_parity(
    reference: Mapping[str, np.ndarray], predicted: Mapping[str, Mapping[str, np.ndarray]], path: Path
) -> Path:
    """Draw a panel per molecule and model, all with the same axes, and write a PNG.

    Parameters
    ----------
    reference
        Labels by molecule, flat, in eV/Å.
    predicted
        The same by model and molecule.
    path
        The PNG file, written atomically.
    """
    figure = Figure(figsize=(2.6 * len(predicted) + 0.4, 2.7 * len(reference) + 0.3), layout="constrained")
    grid = figure.subplots(len(reference), len(predicted), squeeze=False, sharex=True, sharey=True)
    for row, (name, labels) in zip(grid, reference.items()):
        for axes, (model, forces) in zip(row, predicted.items()):
            _parity(axes, labels, forces[name], color=COLOURS.get(model))
            axes.set_title(f"{name}: {model}", fontsize="small")
    figure.supxlabel("labelled force (eV/Å)", fontsize="medium")
    figure.supylabel("predicted force (eV/Å)", fontsize="medium")
    return save_figure(figure, path)


def _parity(axes: Axes, labels: np.ndarray, forces: np.ndarray, *, color: str | None) -> None:
    axes.scatter(labels, forces, s=5, linewidth=0, alpha=0.7, color=color)
    axes.axline((0.0, 0.0), slope=1.0, color="black", linewidth=0.8)
    axes.set_aspect("equal")
    error = 1000 * float(np.abs(forces - labels).mean())
    axes.annotate(f"MAE {error:.1f} meV/Å", (0.04, 0.92), xycoords="axes fraction", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
