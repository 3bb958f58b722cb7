"""The demo's results as one table: cells for the terminal, Markdown for the folder."""

from ase_gffmerge.evaluation.comparison.demo import DEFAULT, TEMPERATURES, TIMESTEP, DemoResult


def header(result: DemoResult) -> list[str]:
    """Column titles with units."""
    errors = [f"{name.removeprefix('rmd17-')} force MAE (meV/Å)" for name in result.names]
    return ["model", *errors, "seconds to merge", "NVE drift (meV/atom)", "steps/s"]


def rows(result: DemoResult) -> list[list[str]]:
    """One row per model; dynamics are those of the default merge, one number per molecule."""
    return [
        [
            model,
            *(f"{1000 * errors[name]:.1f}" for name in result.names),
            _seconds(result, model),
            *(_dynamics(result) if model == DEFAULT else ["", ""]),
        ]
        for model, errors in result.comparison.force_mae.items()
    ]


def _seconds(result: DemoResult, model: str) -> str:
    seconds = result.comparison.seconds.get(model)
    if seconds is None:
        return ""
    return f"{seconds:.2f}" + (" (cached)" if model == DEFAULT and result.cache_hit else "")


def _dynamics(result: DemoResult) -> list[str]:
    drifts = [1000 * run.drift_per_atom for run in result.runs["nve"].values()]
    return [
        " / ".join(f"{drift:+.3f}" for drift in drifts),
        " / ".join(f"{speed:.0f}" for speed in result.steps_per_second.values()),
    ]


def conditions(result: DemoResult) -> str:
    """Say what was run, and whether a bond broke."""
    said = [
        f"{ensemble.upper()} {run.steps * run.timestep / 1000:g} ps at {TEMPERATURES[ensemble]:g} K"
        for ensemble, runs in result.runs.items()
        for run in [next(iter(runs.values()))]
    ]
    broken = [
        f"{name} ({ensemble})"
        for ensemble, runs in result.runs.items()
        for name, run in runs.items()
        if run.broken_bonds
    ]
    bonds = f"bonds broke in {', '.join(broken)}" if broken else "no bond broke"
    return f"{', '.join(said)}, step {TIMESTEP:g} fs, one calculator for all molecules; {bonds}."


def markdown(result: DemoResult) -> str:
    """Write table and conditions as a Markdown document."""
    lines = [header(result), ["---"] * len(header(result)), *rows(result)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    title = f"# Merge of {' and '.join(result.names)}"
    return f"{title}\n\n{table}\n\n{conditions(result)}\n\n![forces of the models and labels](parity.png)\n"
