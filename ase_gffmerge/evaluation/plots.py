"""Plots of training and of forces, drawn on figures of their own (no global state of matplotlib is touched)."""

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
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
