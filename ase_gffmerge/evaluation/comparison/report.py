"""A comparison as tables: cells for the terminal, Markdown for a file."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from ase_gffmerge.evaluation.comparison.compare import SPECIALIST, Comparison

TITLES = {
    "force_mae": "Force MAE (meV/Å)",
    "force_rmse": "Force RMSE (meV/Å)",
    "energy_mae": "Energy MAE (meV/atom)",
}
EFFORT = ("worst ratio", "seconds", "size", "cost")
TOLD_APART = "†"


class Cell(NamedTuple):
    """Text, and whether it is the best of its column."""

    text: str
    best: bool = False


@dataclass(frozen=True, kw_only=True)
class MethodTable:
    """A row per method; the columns named in ``words`` hold words, all others numbers."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    words: tuple[str, ...] = ("method",)


def method_tables(comparison: Comparison) -> tuple[MethodTable, ...]:
    """Force MAE with effort; settings, and why methods were skipped; force RMSE; energy MAE."""
    first, *others = (_error_table(comparison, kind) for kind in TITLES)
    rows = (
        *((*cells, *_effort(comparison, model)) for cells, model in zip(first.rows, comparison.rows)),
        *_skipped(comparison),
    )
    full = MethodTable(title=first.title, header=(*first.header, *EFFORT), rows=rows)
    return full, *_settings_table(comparison), *others


def _error_table(comparison: Comparison, kind: str) -> MethodTable:
    errors, digits = comparison.errors(kind), 2 if kind == "energy_mae" else 1
    least = {
        name: min((row[name] for model, row in errors.items() if model != SPECIALIST), default=None)
        for name in comparison.names
    }
    rows = []
    for model, row in errors.items():
        cells = [Cell(model + TOLD_APART * (model in comparison.told_apart))]
        for name in comparison.names:
            best = model != SPECIALIST and row[name] == least[name]
            cells.append(Cell(f"{1000 * row[name]:.{digits}f}", best))
        rows.append(tuple(cells))
    return MethodTable(title=TITLES[kind], header=("method", *comparison.names), rows=tuple(rows))


def _effort(comparison: Comparison, model: str) -> tuple[Cell, ...]:
    row = comparison.rows[model]
    ratios = {other: comparison.worst_ratio(other) for other in comparison.rows}
    least = min((ratio for other, ratio in ratios.items() if other != SPECIALIST), default=None)
    return (
        Cell(f"{ratios[model]:.2f}", model != SPECIALIST and ratios[model] == least),
        Cell("" if row.seconds is None else f"{row.seconds:.{2 if row.seconds < 10 else 0}f}"),
        Cell(f"{row.parameters / 1000:.0f}k"),
        Cell(f"{row.cost:.2f}"),
    )


def _skipped(comparison: Comparison) -> list[tuple[Cell, ...]]:
    said = (Cell("skipped"),) * len(comparison.names)
    return [(Cell(model), *said, *(Cell(""),) * len(EFFORT)) for model in comparison.skipped]


def _settings_table(comparison: Comparison) -> list[MethodTable]:
    """One table, or none when nothing was chosen or skipped."""
    said = {model: _settings(row.settings) for model, row in comparison.rows.items() if row.settings}
    said |= {model: f"skipped: {reason}" for model, reason in comparison.skipped.items()}
    rows = tuple((Cell(model), Cell(text)) for model, text in said.items())
    header = ("method", "settings")
    title = "Settings that methods chose, and why methods were skipped"
    return [MethodTable(title=title, header=header, rows=rows, words=header)] if rows else []


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
            f"{TOLD_APART} must be told whose territory a structure belongs to: not one potential energy surface."
        )
    if comparison.base:
        said.append(f"Base: {comparison.base}.")
    return said + [f"Note: {note}." for note in comparison.notes]


def markdown(comparison: Comparison) -> str:
    """Write all tables and footnotes as a Markdown document; the best errors are bold."""
    parts = [f"# Methods on {', '.join(comparison.names)}"]
    for table in method_tables(comparison):
        rule = ["---" if title in table.words else "---:" for title in table.header]
        rows = [[f"**{cell.text}**" if cell.best else cell.text for cell in row] for row in table.rows]
        lines = [f"| {' | '.join(line)} |" for line in (table.header, rule, *map(_escaped, rows))]
        parts += [f"## {table.title}", "\n".join(lines)]
    return "\n\n".join([*parts, *footnotes(comparison)]) + "\n"


def _escaped(cells: list[str]) -> list[str]:
    return [cell.replace("|", "\\|") for cell in cells]
