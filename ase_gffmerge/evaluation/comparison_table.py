"""A comparison as tables: cells for the terminal, Markdown for a file."""

from dataclasses import dataclass
from typing import NamedTuple

from ase_gffmerge.evaluation.comparison import SPECIALIST, Comparison

TITLES = {
    "force_mae": "Force MAE (meV/Å)",
    "force_rmse": "Force RMSE (meV/Å)",
    "energy_mae": "Energy MAE (meV/atom)",
}
TOLD_APART = "†"


class Cell(NamedTuple):
    """Text, and whether it is the best of its column."""

    text: str
    best: bool = False


@dataclass(frozen=True, kw_only=True)
class ErrorTable:
    """One kind of error: a column per specialist; the first table has what else was measured as well."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


def error_tables(comparison: Comparison) -> tuple[ErrorTable, ...]:
    """Force MAE with seconds, size, cost, settings and reasons for skipping; then force RMSE and energy MAE."""
    first, *others = (_error_table(comparison, kind) for kind in TITLES)
    blank = (Cell(""),) * (len(comparison.names) + 4)
    skipped = [
        (Cell(model), *blank, Cell(f"skipped: {reason}")) for model, reason in comparison.skipped.items()
    ]
    full = ErrorTable(
        title=first.title,
        header=(*first.header, "worst ratio", "seconds", "parameters", "cost", "settings"),
        rows=(
            *((*cells, *_effort(comparison, model)) for cells, model in zip(first.rows, comparison.rows)),
            *skipped,
        ),
    )
    return full, *others


def _error_table(comparison: Comparison, kind: str) -> ErrorTable:
    errors = comparison.errors(kind)
    least = {
        name: min((row[name] for model, row in errors.items() if model != SPECIALIST), default=None)
        for name in comparison.names
    }
    return ErrorTable(
        title=TITLES[kind],
        header=("method", *comparison.names),
        rows=tuple(
            (
                Cell(model + TOLD_APART * (model in comparison.told_apart)),
                *(
                    Cell(
                        f"{1000 * row[name]:.{2 if kind == 'energy_mae' else 1}f}",
                        _best(model, row[name], least[name]),
                    )
                    for name in comparison.names
                ),
            )
            for model, row in errors.items()
        ),
    )


def _best(model: str, error: float, least: float | None) -> bool:
    return model != SPECIALIST and error == least


def _effort(comparison: Comparison, model: str) -> tuple[Cell, ...]:
    row = comparison.rows[model]
    settings = ", ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in row.settings.items()
    )
    seconds = (
        "" if row.seconds is None else f"{row.seconds:.3g}" if row.seconds < 100 else f"{row.seconds:.0f}"
    )
    ratio = comparison.worst_ratio(model)
    least = min(
        (comparison.worst_ratio(other) for other in comparison.rows if other != SPECIALIST), default=None
    )
    return (
        Cell(f"{ratio:.2f}", _best(model, ratio, least)),
        Cell(seconds),
        Cell(str(row.parameters)),
        Cell(f"{row.cost:.2f}"),
        Cell(settings),
    )


def footnotes(comparison: Comparison) -> list[str]:
    """What a reader must know to read the tables."""
    frames = ", ".join(f"{n} of {name}" for name, n in comparison.frames.items())
    said = [
        f"Errors against the labels of the test frames ({frames}); `{SPECIALIST}` is every specialist on its own frames. "
        "Worst ratio: force MAE in units of the specialist's own, where it is largest. Seconds: from the specialists to "
        "the potential, tuning included. Parameters: all that must be stored. Cost: time for energy and forces of one "
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
    for table in error_tables(comparison):
        numbers = len(comparison.names) + 4 if "settings" in table.header else len(comparison.names)
        rule = ["---", *["---:"] * numbers, *["---"] * (len(table.header) - 1 - numbers)]
        rows = [[f"**{cell.text}**" if cell.best else cell.text for cell in row] for row in table.rows]
        lines = [f"| {' | '.join(line)} |" for line in (table.header, rule, *map(_escaped, rows))]
        parts += [f"## {table.title}", "\n".join(lines)]
    return "\n\n".join([*parts, *footnotes(comparison)]) + "\n"


def _escaped(cells: list[str]) -> list[str]:
    return [cell.replace("|", "\\|") for cell in cells]
