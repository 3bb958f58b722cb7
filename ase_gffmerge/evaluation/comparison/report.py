"""A comparison of methods as tables and as a plot of force errors, a panel per specialist."""

from collections.abc import Mapping
from math import ceil
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from ase_gffmerge.evaluation.comparison.compare import SPECIALIST, Comparison
from ase_gffmerge.evaluation.plots import save_figure
from ase_gffmerge.evaluation.table import Best, Column, Table, Value

KINDS = {
    "force_mae": ("Force MAE", "meV/Å", ".1f"),
    "force_rmse": ("Force RMSE", "meV/Å", ".1f"),
    "energy_mae": ("Energy MAE", "meV/atom", ".2f"),
}
"""Title, unit and format of each kind of error."""
EFFORT = (
    Column("worst ratio", spec=".2f"),
    Column("seconds"),
    Column("size"),
    Column("cost", spec=".2f"),
)
APART_MARK = "†"


def method_tables(comparison: Comparison) -> tuple[Table, ...]:
    """Force MAE with effort; settings, and why methods were skipped; force RMSE; energy MAE."""
    first, *others = (_error_table(comparison, kind) for kind in KINDS)
    rows = (
        *((*cells, *_effort(comparison, model)) for cells, model in zip(first.rows, comparison.rows)),
        *_skipped(comparison),
    )
    full = Table(title=first.title, columns=(*first.columns, *EFFORT), rows=rows)
    return full, *_settings_table(comparison), *others


def _error_table(comparison: Comparison, kind: str) -> Table:
    errors, (title, unit, spec) = comparison.errors(kind), KINDS[kind]
    least = {
        name: min((row[name] for model, row in errors.items() if model != SPECIALIST), default=None)
        for name in comparison.names
    }
    rows = []
    for model, row in errors.items():
        cells: list[Value | Best] = [model + APART_MARK * (model in comparison.told_apart)]
        for name in comparison.names:
            best = model != SPECIALIST and row[name] == least[name]
            cells.append(Best(1000 * row[name]) if best else 1000 * row[name])
        rows.append(tuple(cells))
    columns = (Column("method", words=True), *(Column(name, spec=spec) for name in comparison.names))
    return Table(title=f"{title} ({unit})", columns=columns, rows=tuple(rows))


def _effort(comparison: Comparison, model: str) -> tuple[Value | Best, ...]:
    row = comparison.rows[model]
    ratios = {other: comparison.worst_ratio(other) for other in comparison.rows}
    least = min((ratio for other, ratio in ratios.items() if other != SPECIALIST), default=None)
    best = model != SPECIALIST and ratios[model] == least
    return (
        Best(ratios[model]) if best else ratios[model],
        None if row.seconds is None else f"{row.seconds:.{2 if row.seconds < 10 else 0}f}",
        f"{row.parameters / 1000:.0f}k",
        row.cost,
    )


def _skipped(comparison: Comparison) -> list[tuple[Value, ...]]:
    said = ("skipped",) * len(comparison.names)
    return [(model, *said, *(None,) * len(EFFORT)) for model in comparison.skipped]


def _settings_table(comparison: Comparison) -> list[Table]:
    """One table, or none when nothing was chosen or skipped."""
    said = {model: _settings(row.settings) for model, row in comparison.rows.items() if row.settings}
    said |= {model: f"skipped: {reason}" for model, reason in comparison.skipped.items()}
    title = "Settings that methods chose, and why methods were skipped"
    columns = (Column("method", words=True), Column("settings", words=True))
    return [Table(title=title, columns=columns, rows=tuple(said.items()))] if said else []


def _settings(chosen: Mapping[str, float | str]) -> str:
    return ", ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in chosen.items()
    )


def footnotes(comparison: Comparison) -> list[str]:
    """What a reader must know to read the tables."""
    frames = ", ".join(f"{n} of {name}" for name, n in comparison.frames.items())
    said = [
        f"Errors against the labels of the test frames ({frames}); `{SPECIALIST}` is every specialist on its own frames. "
        "Worst ratio: force MAE in units of the specialist's own, where it is largest. Seconds: from the specialists to "
        "the potential, tuning included. Size: parameters that must be stored. Cost: time for energy and forces of one "
        "frame in units of the specialist's own, measured in turn with it.",
    ]
    if comparison.told_apart:
        said.append(
            f"{APART_MARK} must be told which specialist a structure belongs to: not one potential energy surface."
        )
    if comparison.base:
        said.append(f"Base: {comparison.base}.")
    return said + [f"Note: {note}." for note in comparison.notes]


def markdown(comparison: Comparison) -> str:
    """Write all tables and footnotes as a Markdown document; the best errors are bold."""
    parts = [f"# Methods on {', '.join(comparison.names)}"]
    for table in method_tables(comparison):
        parts += [f"## {table.title}", table.to_markdown()]
    return "\n\n".join([*parts, *footnotes(comparison)]) + "\n"


ONE_SURFACE, TOLD_APART = "#0072B2", "#E69F00"  # Okabe and Ito: told apart by colour-blind readers
PANELS_PER_ROW = 3


def plot_comparison(comparison: Comparison, path: str | Path) -> Path:
    """Draw force MAEs on a logarithmic axis, the specialist's own as a line, and write a PNG.

    Parameters
    ----------
    comparison
        With at least the row of the specialists.
    path
        The PNG file, written atomically.

    Raises
    ------
    FileFormatError
        When ``path`` cannot be written.
    """
    errors = comparison.errors("force_mae")
    n_columns = min(len(comparison.names), PANELS_PER_ROW)
    n_rows = ceil(len(comparison.names) / n_columns)
    height = 0.27 * max(len(errors) - 1, 2) + 1.1
    figure = Figure(figsize=(1.2 + 3.6 * n_columns, 0.5 + height * n_rows), layout="constrained")
    grid = figure.subplots(n_rows, n_columns, sharex=True, sharey=True, squeeze=False).ravel()
    for axes, name in zip(grid, comparison.names):
        _panel(axes, {model: 1000 * row[name] for model, row in errors.items()}, comparison.told_apart)
        axes.set_title(name, fontsize="medium")
    for axes in grid[len(comparison.names) :]:
        axes.set_visible(False)
    values = [1000 * value for row in errors.values() for value in row.values() if value > 0]
    if values:
        grid[0].set_xlim(0.6 * min(values), 2.2 * max(values))
    figure.supxlabel("force MAE on test frames (meV/Å, logarithmic)", fontsize="medium")
    _legend(figure, grid[0], comparison)
    return save_figure(figure, Path(path))


def _panel(axes: Axes, errors: Mapping[str, float], told_apart: tuple[str, ...]) -> None:
    own = errors[SPECIALIST]
    models = [model for model in errors if model != SPECIALIST]
    for y, model in enumerate(models):
        apart = model in told_apart
        axes.plot(errors[model], y, **_dot(apart))
        axes.annotate(
            f"{errors[model]:.1f}",
            (errors[model], y),
            (6, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    if not models:
        axes.text(0.5, 0.5, "no method was measured", ha="center", va="center", transform=axes.transAxes)
    axes.axvline(own, color="black", linestyle="--", linewidth=1, label=f"{SPECIALIST} on its own frames")
    axes.set_xscale("log")
    axes.set_yticks(range(len(models)), models)
    axes.set_ylim(len(models) - 0.4, -0.6)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.25, linewidth=0.5)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _dot(apart: bool) -> dict[str, Any]:
    """Style of a method's error: a diamond for methods that must be told the specialist."""
    return {"marker": "D" if apart else "o", "color": TOLD_APART if apart else ONE_SURFACE, "linestyle": ""}


def _legend(figure: Figure, axes: Axes, comparison: Comparison) -> None:
    handles = [
        *axes.get_legend_handles_labels()[0],
        Line2D([], [], label="one potential for all", **_dot(False)),
    ]
    if comparison.told_apart:
        label = "must be told the specialist"
        handles.append(Line2D([], [], label=label, **_dot(True)))
    figure.legend(
        handles=handles, loc="outside upper center", ncols=len(handles), frameon=False, fontsize="small"
    )
