"""One figure for an evaluation by dynamics: distributions, vibrations, temperature, energy, diffusion."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ase_gffmerge.evaluation.analysis import Distribution
from ase_gffmerge.evaluation.analysis.plots import save_figure
from ase_gffmerge.evaluation.md.evaluate import MDEvaluation
from ase_gffmerge.evaluation.md.observables import ModelDynamics

COLOURS = ("#d1793b", "#2a8fb0", "#5b8c3a", "#8a5a9e", "#b03a48", "#6b6b6b")
REFERENCE = "#222222"
COLUMNS = 3
SMOOTHING = 0.02
"""Running means are over this fraction of a run."""

Panel = Callable[[Axes], None]
Styled = Sequence[tuple[ModelDynamics, str]]


def plot_dynamics(evaluation: MDEvaluation, path: Path) -> Path:
    """Draw every panel with all models in it, and write a PNG atomically."""
    models = [(m, COLOURS[k % len(COLOURS)]) for k, m in enumerate(evaluation.models)]
    panels = _panels(evaluation, models)
    rows = -(-len(panels) // COLUMNS)
    figure = Figure(figsize=(4.4 * COLUMNS, 3.3 * rows + 0.4), layout="constrained")
    grid = figure.subplots(rows, COLUMNS, squeeze=False).ravel()
    for axes, panel in zip(grid, panels, strict=False):
        panel(axes)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid[len(panels) :]:
        axes.remove()
    handles = [grid[0].plot([], [], color=REFERENCE, label="reference")[0]]
    handles += [grid[0].plot([], [], color=colour, label=model.label)[0] for model, colour in models]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False)
    return save_figure(figure, path)


def _panels(evaluation: MDEvaluation, models: Styled) -> list[Panel]:
    temperature = evaluation.protocol.temperature
    panels: list[Panel] = [
        lambda axes, name=name, truth=truth: _distribution(axes, name, truth, models)  # type: ignore[misc]
        for name, truth in evaluation.reference.items()
    ]
    panels += [
        lambda axes: _spectra(axes, models),
        lambda axes: _temperatures(axes, models, temperature),
        lambda axes: _energies(axes, models),
        lambda axes: _stability(axes, models, evaluation.protocol.length("nvt")),
    ]
    elements = sorted({element for model, _ in models for element in model.diffusion})
    panels += [lambda axes, element=element: _displacements(axes, element, models) for element in elements]  # type: ignore[misc]
    return panels


def _distribution(axes: Axes, name: str, truth: Distribution, models: Styled) -> None:
    axes.fill_between(truth.centres, truth.values, step="mid", color=REFERENCE, alpha=0.15, linewidth=0)
    axes.step(truth.centres, truth.values, where="mid", color=REFERENCE, linewidth=0.8)
    for model, colour in models:
        if name in model.distributions:
            axes.plot(
                truth.centres, model.distributions[name].values, color=colour, linewidth=1.2, alpha=0.85
            )
    title = "distances of atoms" if name == "h" else f"radial distribution {name}"
    axes.set(title=title, xlabel="r (Å)", ylabel="h(r) (1/Å)" if name == "h" else "g(r)", ylim=(0, None))


def _spectra(axes: Axes, models: Styled) -> None:
    for model, colour in models:
        if model.spectrum:
            axes.plot(model.spectrum.wavenumbers, 1000 * model.spectrum.density, color=colour, linewidth=1.2)
    axes.set(
        title="vibrations (NVE)",
        xlabel="wavenumber (cm⁻¹)",
        ylabel="density of states (10⁻³ cm)",
        xlim=(0, 4000),
        ylim=(0, None),
    )


def _temperatures(axes: Axes, models: Styled, target: float) -> None:
    for model, colour in models:
        for run in model.nvt:
            if len(run.times) > 1:
                axes.plot(run.times, _smooth(run.temperatures), color=colour, lw=0.8, alpha=0.6)
    axes.axhline(target, color=REFERENCE, linewidth=0.8)
    axes.set(
        title=f"temperature (NVT), mean of {100 * SMOOTHING:g} %",
        xlabel="time (ps)",
        ylabel="temperature (K)",
    )


def _smooth(values: np.ndarray) -> np.ndarray:
    """Running mean over the values before; over fewer at the start."""
    width = max(round(SMOOTHING * len(values)), 1)
    padded = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - width, 0)
    return (padded[ends] - padded[starts]) / (ends - starts)


def _energies(axes: Axes, models: Styled) -> None:
    for model, colour in models:
        for run in model.nve:
            if len(run.times):
                change = 1000 * (run.total_energies - run.total_energies.mean()) / len(run.numbers)
                axes.plot(run.times, _smooth(change), color=colour, linewidth=0.9, alpha=0.7)
    axes.set(
        title=f"energy conservation (NVE), mean of {100 * SMOOTHING:g} %",
        xlabel="time (ps)",
        ylabel="total energy (meV/atom)",
    )


def _stability(axes: Axes, models: Styled, length: float) -> None:
    for row, (model, colour) in enumerate(models):
        times = model.stability_times
        axes.barh(row + 0.8 * np.arange(len(times)) / len(times), times, 0.7 / len(times), color=colour)
    axes.axvline(length, color=REFERENCE, linewidth=0.8)
    axes.set(title="stable time of every seed (NVT)", xlabel="time (ps)", yticks=[])
    axes.invert_yaxis()


def _displacements(axes: Axes, element: str, models: Styled) -> None:
    for model, colour in models:
        for run in model.diffusion.get(element, ()):
            half = len(run.lags) // 2
            axes.plot(run.lags[:half], run.displacements[:half], color=colour, linewidth=0.9, alpha=0.7)
            axes.axvspan(*run.fit, color=REFERENCE, alpha=0.04, linewidth=0)
    axes.set(title=f"displacement of {element}", xlabel="lag (ps)", ylabel="mean squared displacement (Å²)")
