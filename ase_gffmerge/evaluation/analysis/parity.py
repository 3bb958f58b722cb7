"""Parity plot: force components of several models against the labels."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ase_gffmerge.evaluation.analysis.plots import save_figure

COLOURS = {"specialist": "#222222", "gffmerge": "#2a8fb0", "paper": "#d1793b", "mean": "#b8b8b8"}


def plot_parity(
    reference: Mapping[str, np.ndarray], predicted: Mapping[str, Mapping[str, np.ndarray]], path: Path
) -> Path:
    """Draw one panel per molecule, the model with the largest error at the back, and write a PNG.

    Parameters
    ----------
    reference
        Labels by molecule, flat, in eV/Å.
    predicted
        The same by model and molecule.
    path
        The PNG file, written atomically.
    """
    figure = Figure(figsize=(4.6 * len(reference), 4.8), layout="constrained")
    for axes, (name, labels) in zip(figure.subplots(1, len(reference), squeeze=False)[0], reference.items()):
        _panel(axes, name, labels, {model: forces[name] for model, forces in predicted.items()})
    return save_figure(figure, path)


def _panel(axes: Axes, name: str, labels: np.ndarray, predicted: Mapping[str, np.ndarray]) -> None:
    errors = {model: float(np.abs(forces - labels).mean()) for model, forces in predicted.items()}
    for model in sorted(errors, key=errors.__getitem__, reverse=True):
        label = f"{model}: MAE {1000 * errors[model]:.1f} meV/Å"
        axes.scatter(
            labels, predicted[model], s=5, linewidth=0, alpha=0.7, color=COLOURS.get(model), label=label
        )
    limits = labels.min(), labels.max()
    axes.plot(limits, limits, color="black", linewidth=0.8)
    axes.set(title=name, xlabel="labelled force (eV/Å)", ylabel="predicted force (eV/Å)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, loc="upper left", frameon=False, markerscale=3)
