"""Plots, drawn on figures of their own (no global state of matplotlib is touched)."""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ase_gffmerge.storage.atomic import atomic_write

if TYPE_CHECKING:
    from ase_gffmerge.training.checkpoint import History

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
