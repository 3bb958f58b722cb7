"""Plots of trainings, of force errors and of predictions against labels.

They are drawn on figures of their own: no global state of matplotlib is touched.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from ase_gffmerge.errors import FileFormatError
from ase_gffmerge.inference.errors import stress_components
from ase_gffmerge.inference.predict import FramePredictions
from ase_gffmerge.inference.reliability import LEVELS, Reliability
from ase_gffmerge.storage.tensor_file import atomic_write

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


FORMATS = ("png", "svg", "pdf")


def figure_format(path: Path) -> str:
    """Format of a figure's file by its ending: PNG, SVG or PDF.

    Raises
    ------
    FileFormatError
        For any other ending.
    """
    ending = path.suffix.removeprefix(".").lower()
    if ending not in FORMATS:
        raise FileFormatError(f"cannot draw {path}: the ending must be .{', .'.join(FORMATS)}")
    return ending


def save_figure(figure: Figure, path: Path) -> Path:
    """Write ``figure`` in the format that the ending says, atomically; raises as :func:`figure_format` does."""
    buffer = BytesIO()
    figure.savefig(buffer, format=figure_format(path))
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


PALETTE = ("#2a8fb0", "#d1793b", "#5b8c3a", "#8a5a9e", "#b03a48", "#6b6b6b")
"""Colors of groups and models that have none of their own."""


def plot_errors_of_frames(
    reference: FramePredictions,
    predicted: Mapping[str, FramePredictions],
    groups: Sequence[str],
    path: Path,
    *,
    reliabilities: Mapping[str, Mapping[str, Reliability]] | None = None,
) -> Path:
    """Draw predictions against labels: a row per model; energies per atom, force components, stresses.

    The two axes of a panel are equal. Energies are those of a frame less the mean label of its group, unless every frame
    is a group of its own.

    Parameters
    ----------
    reference
        Labels.
    predicted
        By model.
    groups
        One name per frame; every group has a color, the ones after the fifth share one.
    path
        PNG, SVG or PDF, written atomically.
    reliabilities
        By model: a reliability diagram stands last in its row.

    Raises
    ------
    FileFormatError
        When the ending is none of these, or the file cannot be written.
    """
    colors = {name: PALETTE[min(k, len(PALETTE) - 1)] for k, name in enumerate(dict.fromkeys(groups))}
    series = {name: _frame_series(found, reference, groups) for name, found in predicted.items()}
    width = max(len(panels) for panels in series.values()) + bool(reliabilities)
    figure = Figure(figsize=(3.3 * width + 0.3, 3.2 * len(series) + 0.5), layout="constrained")
    grid = figure.subplots(len(series), width, squeeze=False)
    for row, (model, panels) in zip(grid, series.items()):
        for axes, panel in zip(row, panels):
            for name in colors:
                mine = [k for k, group in enumerate(groups) if group == name]
                x, y = (np.concatenate([values[k] for k in mine]) for values in (panel.labels, panel.values))
                axes.scatter(x, y, s=6, linewidth=0, alpha=0.6, color=colors[name], rasterized=True)
            _equal_axes(axes, panel)
            axes.set_title(f"{model}: {panel.name}", fontsize="small")
        known = (reliabilities or {}).get(model)
        for axes in row[len(panels) : width - bool(known)]:
            axes.remove()
        if known:
            draw_reliability(row[-1], known)
            row[-1].set_title(f"{model}: reliability", fontsize="small")
    if len(colors) > 1:
        shown = [
            Line2D([], [], marker="o", linestyle="", color=color, label=name)
            for name, color in list(colors.items())[: len(PALETTE)]
        ]
        if len(colors) > len(PALETTE):
            shown[-1].set_label(f"{len(colors) - len(PALETTE) + 1} others")
        figure.legend(handles=shown, loc="outside upper center", ncols=len(shown), frameon=False)
    return save_figure(figure, path)


def plot_reliability(panels: Mapping[str, Mapping[str, Reliability]], path: Path) -> Path:
    """Draw reliability diagrams side by side: the share of errors within an interval over the expected share.

    Parameters
    ----------
    panels
        By title of the panel and name of the curve.
    path
        PNG, SVG or PDF, written atomically.
    """
    figure = Figure(figsize=(3.0 * len(panels) + 0.3, 4.2), layout="constrained")
    for axes, (title, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items()):
        draw_reliability(axes, curves)
        axes.set_title(title, fontsize="small")
    return save_figure(figure, path)


def draw_reliability(axes: Axes, curves: Mapping[str, Reliability]) -> None:
    """Draw one reliability diagram; above the diagonal deviations are too large, below it too small.

    Parameters
    ----------
    axes
        To draw on.
    curves
        By name.
    """
    axes.axline((0.0, 0.0), slope=1.0, color="black", linewidth=0.8)
    for (name, found), color in zip(curves.items(), PALETTE):
        label = f"{name} ({found.calibration_error:.2f})"
        axes.plot((0.0, *LEVELS, 1.0), (0.0, *found.observed, 1.0), color=color, linewidth=1.5, label=label)
    axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal", xlabel="expected share", ylabel="share of errors")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(
        frameon=False,
        fontsize="x-small",
        title="calibration error",
        title_fontsize="x-small",
        loc="upper center",
        bbox_to_anchor=(0.5, -0.16),
    )


@dataclass(frozen=True)
class _Panel:
    """Labels and predictions of one quantity, by frame, in one unit."""

    name: str
    unit: str
    labels: Sequence[np.ndarray]
    values: Sequence[np.ndarray]


def _frame_series(
    predicted: FramePredictions, reference: FramePredictions, groups: Sequence[str]
) -> list[_Panel]:
    counts = np.array([len(numbers) for numbers in reference.numbers])
    own, found = (1000 * p.energies / counts for p in (reference, predicted))
    zero, title = np.zeros(len(own)), "energies"
    if len(set(groups)) < len(groups) or len(groups) == 1:
        title = "energies less the mean label"
        for name in set(groups):
            mine = np.array([group == name for group in groups])
            zero[mine] = own[mine].mean()
    forces = [[frame.ravel() for frame in p.forces] for p in (reference, predicted)]
    panels = [
        _Panel(title, "meV/atom", (own - zero)[:, None], (found - zero)[:, None]),
        _Panel("force components", "eV/Å", *forces),
    ]
    own_stress, stress = stress_components(reference), stress_components(predicted)
    if any(map(len, own_stress)):
        stress = [values[: len(labels)] for values, labels in zip(stress, own_stress, strict=True)]
        panels.append(_Panel("stresses", "GPa", own_stress, stress))
    return panels


def _equal_axes(axes: Axes, panel: _Panel) -> None:
    labels, values = np.concatenate(panel.labels), np.concatenate(panel.values)
    low, high = min(labels.min(), values.min()), max(labels.max(), values.max())
    margin = 0.05 * (high - low) or 0.5
    axes.set(xlim=(low - margin, high + margin), ylim=(low - margin, high + margin), aspect="equal")
    axes.axline((low, low), slope=1.0, color="black", linewidth=0.8)
    axes.set(xlabel=f"label ({panel.unit})", ylabel=f"prediction ({panel.unit})")
    error = float(np.abs(values - labels).mean())
    axes.annotate(f"MAE {error:.3g} {panel.unit}", (0.04, 0.92), xycoords="axes fraction", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def _parity(axes: Axes, labels: np.ndarray, forces: np.ndarray, *, color: str | None) -> None:
    axes.scatter(labels, forces, s=5, linewidth=0, alpha=0.7, color=color)
    axes.axline((0.0, 0.0), slope=1.0, color="black", linewidth=0.8)
    axes.set_aspect("equal")
    error = 1000 * float(np.abs(forces - labels).mean())
    axes.annotate(f"MAE {error:.1f} meV/Å", (0.04, 0.92), xycoords="axes fraction", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
