"""An evaluation by dynamics as a table: one row per quantity, one column per model."""

from collections.abc import Sequence

import numpy as np

from ase_gffmerge.evaluation.analysis import spectral_overlap
from ase_gffmerge.evaluation.analysis.diffusion import SQUARE_CM_PER_S
from ase_gffmerge.evaluation.md.evaluate import MDEvaluation
from ase_gffmerge.evaluation.md.observables import ModelDynamics, mean_diffusion
from ase_gffmerge.inference.metrics import Errors

Row = list[str]


def header(evaluation: MDEvaluation) -> Row:
    """Column titles."""
    return [evaluation.formula, *(model.label for model in evaluation.models)]


def rows(evaluation: MDEvaluation) -> list[Row]:
    """Names of the quantities with units, and their values for every model."""
    models = evaluation.models
    table = [
        *_errors(evaluation),
        ["stable time of seeds, mean (ps)", *(f"{np.mean(m.stability_times):.2f}" for m in models)],
        ["seeds that held", *(f"{sum(run.held for run in m.nvt)} of {len(m.nvt)}" for m in models)],
        ["mean temperature (K)", *(f"{m.temperature:.0f}" if m.temperature else "-" for m in models)],
        ["temperature of the reference (K)", *(_reference_temperature(evaluation, m) for m in models)],
        *_distributions(evaluation),
        ["vibrations: overlap with the first", *(_overlap(m, models[0]) for m in models)],
        ["NVE drift (meV/atom/ps)", *(_drift(m) for m in models)],
    ]
    elements = sorted({element for model in models for element in model.diffusion})
    return table + [
        [f"diffusion of {e} (10⁻⁶ cm²/s)", *(_diffusion_of(m, e) for m in models)] for e in elements
    ]


def _errors(evaluation: MDEvaluation) -> list[Row]:
    def row(name: str, value: str) -> Row:
        return [name, *(_error(evaluation.errors[m.label], value) for m in evaluation.models)]

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
    table = []
    for name in evaluation.reference:
        title = "h(r) MAE" if name == "h" else f"g(r) MAE {name} (Å)"
        if name in evaluation.reference_noise:
            title += f", noise {evaluation.reference_noise[name]:.3f}"
        table.append([title, *(f"{mae[name]:.3f}" if name in mae else "-" for mae in maes)])
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


def conditions(evaluation: MDEvaluation) -> str:
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
