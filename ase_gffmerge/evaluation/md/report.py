"""An evaluation by dynamics as a table (a row per quantity, a column per model) and as one figure."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ase_gffmerge.evaluation.analysis import Distribution, spectral_overlap
from ase_gffmerge.evaluation.analysis.observables import SQUARE_CM_PER_S
from ase_gffmerge.evaluation.md.evaluate import MDEvaluation
from ase_gffmerge.evaluation.md.observables import ModelDynamics, mean_diffusion
from ase_gffmerge.evaluation.plots import PALETTE, save_figure
from ase_gffmerge.evaluation.table import Column, Table
from ase_gffmerge.inference.errors import Errors

Row = tuple[str, ...]


def dynamics_table(evaluation: MDEvaluation) -> Table:
    """A row per quantity, with its unit, and a column per model; the footnote says what was run, and what stopped."""
    models = evaluation.models
    rows: list[Row] = [
        *_errors(evaluation),
        ("stable time of seeds, mean (ps)", *(f"{np.mean(m.stability_times):.2f}" for m in models)),
        ("seeds that held", *(f"{sum(run.complete for run in m.nvt)} of {len(m.nvt)}" for m in models)),
        ("mean temperature (K)", *(f"{m.temperature:.0f}" if m.temperature else "-" for m in models)),
        ("temperature of the reference (K)", *(_reference_temperature(evaluation, m) for m in models)),
        *_distributions(evaluation),
        ("vibrations: overlap with the first", *(_overlap(m, models[0]) for m in models)),
        ("NVE drift (meV/atom/ps)", *(_drift(m) for m in models)),
    ]
    elements = sorted({element for model in models for element in model.diffusion})
    rows += [(f"diffusion of {e} (10⁻⁶ cm²/s)", *(_diffusion_of(m, e) for m in models)) for e in elements]
    columns = (Column(evaluation.formula, words=True), *(Column(model.label) for model in models))
    return Table(columns=columns, rows=tuple(rows), footnotes=(_conditions(evaluation),))


def _errors(evaluation: MDEvaluation) -> list[Row]:
    def row(name: str, value: str) -> Row:
        return name, *(_error(evaluation.errors[m.label], value) for m in evaluation.models)

    if not evaluation.errors:
        return []
    return [row("force MAE (meV/Å)", "force_mae"), row("energy MAE (meV/atom)", "energy_mae")]


def _error(errors: Errors, name: str) -> str:
    return f"{1000 * getattr(errors, name):.1f}"


def _reference_temperature(evaluation: MDEvaluation, model: ModelDynamics) -> str:
    found = evaluation.reference_temperatures.get(model.label)
    return "-" if found is None else f"{found:.0f}"


def _distributions(evaluation: MDEvaluation) -> list[Row]:
    maes = [evaluation.distribution_maes(model) for model in evaluation.models]
    table: list[Row] = []
    for name in evaluation.reference:
        title = "h(r) MAE" if name == "h" else f"g(r) MAE {name} (Å)"
        if name in evaluation.reference_noise:
            title += f", noise {evaluation.reference_noise[name]:.3f}"
        table.append((title, *(f"{mae[name]:.3f}" if name in mae else "-" for mae in maes)))
    return table


def _overlap(model: ModelDynamics, first: ModelDynamics) -> str:
    if model.spectrum is None or first.spectrum is None:
        return "-"
    if model is not first:
        return f"{spectral_overlap(model.spectrum, first.spectrum):.3f}"
    return "-" if model.spectral_noise is None else f"{model.spectral_noise:.3f} (seeds)"


def _drift(model: ModelDynamics) -> str:
    drifts = 1000 * np.array(model.drifts)
    if len(drifts) == 0:
        return "-"
    spread = f" ± {drifts.std(ddof=1):.3f}" if len(drifts) > 1 else ""
    return f"{drifts.mean():+.3f}{spread}"


def _diffusion_of(model: ModelDynamics, element: str) -> str:
    if element not in model.diffusion:
        return "-"
    value, error = (1e6 * SQUARE_CM_PER_S * x for x in mean_diffusion(model.diffusion[element]))
    return f"{value:.2f} ± {error:.2f}"


def _conditions(evaluation: MDEvaluation) -> str:
    """Say what was run, and what stopped."""
    p = evaluation.protocol
    stops = [
        f"{m.label}: {run.stopped}" for m in evaluation.models for run in (*m.nvt, *m.nve) if run.stopped
    ]
    return (
        f"{p.seeds} seeds, NVT {p.length('nvt'):g} ps and NVE {p.length('nve'):g} ps at {p.temperature:g} K, step "
        f"{p.timestep:g} fs; {evaluation.n_reference} reference frames; "
        + (f"stopped: {_counted(stops)}." if stops else "nothing broke.")
    )


def _counted(stops: Sequence[str]) -> str:
    return "; ".join(stops[:4]) + (f"; and {len(stops) - 4} more" if len(stops) > 4 else "")


REFERENCE = "#222222"
COLUMNS = 3
SMOOTHING = 0.02
"""Running means are over this fraction of a run."""

Panel = Callable[[Axes], None]
Styled = Sequence[tuple[ModelDynamics, str]]


def plot_dynamics(evaluation: MDEvaluation, path: Path) -> Path:
    """Draw every panel with all models in it, and write a PNG atomically."""
    models = [(m, PALETTE[k % len(PALETTE)]) for k, m in enumerate(evaluation.models)]
    panels = _panels(evaluation, models)
    rows = -(-len(panels) // COLUMNS)
    figure = Figure(figsize=(4.4 * COLUMNS, 3.3 * rows + 0.4), layout="constrained")
    grid = figure.subplots(rows, COLUMNS, squeeze=False).ravel()
    for axes, panel in zip(grid, panels, strict=False):
        panel(axes)
        axes.spines[["top", "right"]].set_visible(False)
        if not axes.has_data():
            axes.text(0.5, 0.5, "no run survived", ha="center", va="center", transform=axes.transAxes)
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
                axes.plot(run.times / 1000, _smooth(run.temperatures), color=colour, lw=0.8, alpha=0.6)
    if axes.lines:
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
                change = 1000 * (run.total_energies - run.total_energies.mean()) / run.n_atoms
                axes.plot(run.times / 1000, _smooth(change), color=colour, linewidth=0.9, alpha=0.7)
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
