"""A comparison as bars: force errors of all methods, a panel per specialist."""

from collections.abc import Mapping
from math import ceil
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from ase_gffmerge.evaluation.analysis.plots import save_figure
from ase_gffmerge.evaluation.comparison.compare import SPECIALIST, Comparison

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
        axes.barh(
            y,
            errors[model],
            height=0.7,
            color=TOLD_APART if apart else ONE_SURFACE,
            hatch="///" if apart else None,
            edgecolor="white",
        )
        axes.annotate(
            f"{errors[model]:.1f}",
            (errors[model], y),
            (3, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    axes.axvline(own, color="black", linestyle="--", linewidth=1, label=f"{SPECIALIST} on its own frames")
    axes.set_xscale("log")
    axes.set_yticks(range(len(models)), models)
    axes.set_ylim(len(models) - 0.4, -0.6)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(axis="x", alpha=0.25, linewidth=0.5)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _legend(figure: Figure, axes: Axes, comparison: Comparison) -> None:
    handles = [
        *axes.get_legend_handles_labels()[0],
        Patch(facecolor=ONE_SURFACE, label="one potential for all"),
    ]
    if comparison.told_apart:
        label = "must be told the specialist"
        handles.append(Patch(facecolor=TOLD_APART, hatch="///", edgecolor="white", label=label))
    figure.legend(
        handles=handles, loc="outside upper center", ncols=len(handles), frameon=False, fontsize="small"
    )
