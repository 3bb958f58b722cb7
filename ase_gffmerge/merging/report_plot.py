"""The merge report as a figure and as one self-contained web page."""

import base64
import html
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from ase_gffmerge.forcefield.force_field import ForceField
from ase_gffmerge.forcefield.provenance import MergeRecord
from ase_gffmerge.merging.recipe import PRESETS
from ase_gffmerge.merging.report import GOOD, USABLE, LayerReport, MergeReport, Parity, Verdict
from ase_gffmerge.storage.tensor_file import atomic_write

COLOURS = {"mean": "#b8b8b8", "merged": "#1f6f8b", "another specialist": "#d1793b"}
SIZES = {"mean": 18, "merged": 60, "another specialist": 28}
ORDER = {"mean": 5, "merged": 4, "another specialist": 3}
BANDS: dict[Verdict, str] = {
    "good": "#dcefe0",
    "usable after distillation": "#fdf3d0",
    "failed": "#f8dcd6",
}
"""Background of each verdict's range."""

SMALLEST, LARGEST = 1e-3, 1e2
"""Relative disagreements outside this range, and those that are no numbers, are drawn at its ends."""

AXES = {"forces": ("force (eV/Å)", 1.0), "energies": ("energy (meV/atom)", 1000.0)}
"""Name with unit, and the factor to that unit, of what a parity panel shows."""


def save_figure(report: MergeReport, path: str | Path) -> Path:
    """Write :func:`report_figure` as PNG, SVG or PDF."""
    report_figure(report).savefig(path, dpi=130, bbox_inches="tight")
    return Path(path)


def save_html(merged: ForceField, path: str | Path) -> Path:
    """Write the report of a merged force field as one web page that needs no other file.

    Raises
    ------
    ValueError
        For a force field that was not merged.
    """
    atomic_write(Path(path), report_html(merged))
    return Path(path)


def report_figure(report: MergeReport) -> Figure:
    """Parity with every specialist; below, how far it is from each, beside the mean and the others, and the verdicts."""
    n = max(len(report.parity), 1)
    figure = Figure(figsize=(max(3.6 * n, 7.5), 4.3 + _height(report)), layout="constrained")
    rows = figure.subfigures(2, 1, squeeze=False, height_ratios=[4.0, _height(report)])[:, 0]
    panels = rows[0].subplots(1, n, squeeze=False)[0]
    for axes, sample in zip(panels, report.parity):
        _parity_panel(axes, report, sample)
    if not report.parity:
        panels[0].text(0.5, 0.5, "no calibration frames", ha="center", va="center")
        panels[0].set_axis_off()
    _distance_panel(rows[1].subplots(), report)
    figure.suptitle(f"{' + '.join(report.specialists)}: {report.verdict}", fontsize=12)
    return figure


def _height(report: MergeReport) -> float:
    """Of the panel of distances, inches."""
    return 1.5 + 0.35 * len(_specialists(report))


def _specialists(report: MergeReport) -> list[str]:
    return list(dict.fromkeys(row.specialist for row in report.disagreements))


def _parity_panel(axes: Axes, report: MergeReport, sample: Parity) -> None:
    """Predictions of the mean and of the merged potential against the specialist's own, with equal axes."""
    rows = {d.model: d for d in report.disagreements if d.specialist == sample.specialist}
    (quantity, factor), reference = AXES[sample.quantity], np.array(sample.reference)
    for model, values in (("mean", sample.mean), ("merged", sample.merged)):
        if not values:
            continue
        if sample.quantity == "forces":
            error = f"MAE {1000 * rows[model].force_mae:.1f} meV/Å"
        else:
            error = f"RMSE {1000 * rows[model].energy_rmse:.2f} meV/atom"
        x, y = factor * reference, factor * np.array(values)
        axes.scatter(x, y, s=5, color=COLOURS[model], label=f"{model}: {error}", rasterized=True)
    everything = factor * np.concatenate([sample.reference, sample.mean, sample.merged])
    low, high = float(everything.min()), float(everything.max())
    margin = 0.05 * (high - low) or 0.5
    axes.set(xlim=(low - margin, high + margin), ylim=(low - margin, high + margin), aspect="equal")
    axes.axline((low, low), slope=1.0, color="black", lw=0.8)
    axes.set(xlabel=f"specialist's {quantity}", ylabel=f"model's {quantity}")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(5))
    axes.set_title(sample.specialist, fontsize=10)
    axes.legend(fontsize=8, loc="upper left", frameon=False)


def _distance_panel(axes: Axes, report: MergeReport) -> None:
    """Relative disagreement with every specialist: of the merged potential, of the mean, of the other specialists."""
    names = _specialists(report)
    for y, name in enumerate(names):
        for row in (d for d in report.disagreements if d.specialist == name):
            kind = row.model if row.model in COLOURS else "another specialist"
            axes.scatter(_drawn(row.relative[0]), y, s=SIZES[kind], color=COLOURS[kind], zorder=ORDER[kind])
    shown = [_drawn(d.relative[0]) for d in report.disagreements] + [_drawn(report.held_out or GOOD)]
    low, high = min(0.5 * GOOD, *shown) / 1.6, max(2 * USABLE, *shown) * 1.6
    edges = (low, GOOD, USABLE, high)
    for start, end, (verdict, color) in zip(edges, edges[1:], BANDS.items()):
        axes.axvspan(start, end, color=color, zorder=0)
        axes.text(
            (start * end) ** 0.5,
            -0.75,
            verdict.replace(" after", "\nafter"),
            ha="center",
            va="center",
            fontsize=8,
        )
    if report.held_out:
        axes.axvline(_drawn(report.held_out), color=COLOURS["merged"], ls="--", lw=1)
        axes.plot([], [], color=COLOURS["merged"], ls="--", lw=1, label="merged, held-out frames")
    for kind, color in COLOURS.items():
        axes.scatter([], [], color=color, s=SIZES[kind], label=kind)
    axes.set_xscale("log")
    axes.set(xlim=(low, high), ylim=(len(names) - 0.4, -1.2), yticks=range(len(names)), yticklabels=names)
    axes.set_xlabel("relative disagreement with a specialist on its calibration frames (%)")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.spines[["top", "right"]].set_visible(False)
    axes.figure.legend(loc="outside lower center", ncols=4, fontsize=8, frameon=False)


def _drawn(relative: float) -> float:
    return float(np.clip(np.nan_to_num(relative, nan=LARGEST), SMALLEST, LARGEST))


def report_html(merged: ForceField) -> str:
    """One page with verdict, what was merged, figure and tables; needs no other file and no network.

    Raises
    ------
    ValueError
        For a force field that was not merged.
    """
    record = merged.merged
    if record is None:
        raise ValueError(f"{merged.name!r} is no merge and has no report; merge specialists first")
    report = MergeReport.from_dict(record.report)
    title = _title(report)
    return (
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{title}</title><style>{_STYLE}</style>"
        f"</head><body><h1>{title}</h1>{_verdict(report)}{_facts(merged, record, report)}{_picture(report)}"
        f"<h2>Disagreement on calibration frames</h2>{_disagreements(report)}{_forgetting(report)}{_trials(report)}"
        f"{_folded('Least-squares problems', _solves(report))}"
        f"{_folded('Recipe', f'<pre>{html.escape(_yaml(record))}</pre>')}</body></html>"
    )


def report_card(report: MergeReport) -> str:
    """A part of a web page, for notebooks: specialists, elements, verdict and figure."""
    known = f"<p>Elements: {html.escape(', '.join(report.elements))}</p>" if report.elements else ""
    return f"<div><h4>{_title(report)}</h4>{known}{_verdict(report)}{_picture(report)}</div>"


def _title(report: MergeReport) -> str:
    return html.escape(f"{'Student' if report.is_student else 'Merge'} of {', '.join(report.specialists)}")


def _verdict(report: MergeReport) -> str:
    return (
        f"<p class='verdict' style='background:{BANDS[report.verdict]}'>{report.verdict}: "
        f"{html.escape(report.advice)}</p><p>In the worst case {html.escape(report.missed)} (good below "
        f"{100 * GOOD:.0f} %, usable after distillation below {100 * USABLE:.0f} %).</p>"
    )


def _facts(merged: ForceField, record: MergeRecord, report: MergeReport) -> str:
    """What was merged, how, when and with what, in two columns."""
    frames = {row.specialist: row.n_frames for row in report.disagreements if row.model == "merged"}
    facts = {
        "made": f"{report.date} with ase-gffmerge {report.version}" if report.date else "",
        "recipe": _recipe_name(record),
        "elements": ", ".join(report.elements),
        "level of theory": merged.level_of_theory,
        "calibration frames": ", ".join(f"{name} {n}" for name, n in frames.items() if n),
        "network": f"{merged.potential.architecture}, cutoff {merged.cutoff:g} Å, "
        f"{sum(p.numel() for p in merged.potential.parameters()):,} parameters",
        "seconds": f"{sum(report.seconds.values()):.1f} ("
        + ", ".join(f"{name} {value:.1f}" for name, value in report.seconds.items())
        + ")",
        "energy shifts (eV)": "; ".join(
            f"{name}: " + ", ".join(f"{symbol} {value:+.4f}" for symbol, value in shifts.items())
            for name, shifts in report.energy_shifts.items()
            if any(shifts.values())
        ),
    }
    return _table((), [(name, value) for name, value in facts.items() if value])


def _recipe_name(record: MergeRecord) -> str:
    """The preset that the recipe is, or which of its fields differ from the default."""
    for name, preset in PRESETS.items():
        if preset.model_dump(mode="json") == record.recipe:
            return name
    default = PRESETS["gffmerge"].model_dump(mode="json")
    return "its own: " + ", ".join(key for key, value in record.recipe.items() if default.get(key) != value)


def _yaml(record: MergeRecord) -> str:
    return yaml.safe_dump(dict(record.recipe), sort_keys=False)


def _disagreements(report: MergeReport) -> str:
    header = (
        "specialist",
        "model",
        "relative (%)",
        "of",
        "force MAE (meV/Å)",
        "force RMSE (meV/Å)",
        "energy MAE (meV/atom)",
        "stress RMSE (GPa)",
    )
    rows = []
    for d in report.disagreements:
        relative, quantity = d.relative
        errors = (f"{1000 * value:.2f}" for value in (d.force_mae, d.force_rmse, d.energy_mae))
        stress = "" if d.stress_rmse is None else f"{d.stress_rmse:.4f}"
        rows.append((d.specialist, d.model, f"{100 * relative:.2f}", quantity, *errors, stress))
    note = (
        "<p>Relative: root mean square error over the root mean square of the specialist's own forces; where those vanish "
        "by symmetry, of energies per atom (less a shift for each element) or stresses.</p>"
    )
    return _table(header, rows) + note


def _forgetting(report: MergeReport) -> str:
    """How far merged potential and specialists are from their base on compounds that were not in the merge."""
    if not report.forgetting:
        return ""
    header = ("force differences (meV/Å)", "mean", "median", "worst", "of", "relative (%)")
    rows = [
        (
            row.model,
            *(f"{1000 * value:.1f}" for value in (row.mean, row.median, row.worst)),
            row.worst_compound,
            f"{100 * row.relative:.2f}",
        )
        for row in report.forgetting
    ]
    first = report.forgetting[0]
    title = html.escape(f"From {first.base}, on {first.n_compounds} compounds that were not in the merge")
    return f"<h2>{title}</h2>{_table(header, rows)}"


def _trials(report: MergeReport) -> str:
    """Where the merge could have begun, and its steps, on held-out frames."""
    if not report.trials:
        return ""
    rows = [
        (trial.name, *(f"{100 * value:.2f}" for value in trial.disagreements), "kept" if trial.kept else "")
        for trial in report.trials
    ]
    header = ("relative error on held-out frames (%)", *report.specialists, "")
    return f"<h2>What was tried</h2>{_table(header, rows)}"


def _solves(report: MergeReport) -> str:
    header = (
        "layer",
        "kind",
        "rows",
        "columns",
        "effective rank",
        "ridge",
        "residual before",
        "residual after",
    )
    rows = [
        (r.name, r.kind, r.rows, r.size, _rank(r), f"{r.ridge:.2e}", *_residuals(r)) for r in report.layers
    ]
    names = html.escape(", ".join(report.averaged))
    averaged = f"<p>As in the starting point, as no solve covers them: {names}.</p>" if names else ""
    note = (
        "<p>Residual: squared error of the layer's outputs over their mean square, of the mean of the weights and of the "
        "solution. One that stays near its start says that this layer cannot serve all specialists at once.</p>"
    )
    return (note + _table(header, rows) if rows else "<p>None was solved.</p>") + averaged


def _folded(title: str, content: str) -> str:
    return f"<details><summary>{title}</summary>{content}</details>"


def _picture(report: MergeReport) -> str:
    image = io.BytesIO()
    report_figure(report).savefig(image, format="png", dpi=120)
    data = base64.b64encode(image.getvalue()).decode()
    return f"<img alt='parity, and distance from every specialist' src='data:image/png;base64,{data}'>"


_STYLE = (
    "body{font:15px system-ui,sans-serif;margin:2rem auto;max-width:72rem;padding:0 1rem;color:#222}"
    "img{max-width:100%}table{border-collapse:collapse;margin:.5rem 0}td,th{padding:.25rem .7rem;text-align:right;"
    "border-bottom:1px solid #ddd}td:first-child,th:first-child,td:nth-child(2):last-child{text-align:left}"
    ".verdict{font-size:1.3rem;font-weight:600;padding:.5rem .8rem}summary{cursor:pointer;font-weight:600;margin:1rem 0}"
)


def _rank(row: LayerReport) -> str:
    return "" if row.effective_rank is None else f"{row.effective_rank:.1f}"


def _residuals(row: LayerReport) -> tuple[str, str]:
    return f"{row.residual_before:.2e}", f"{row.residual_after:.2e}"


def _table(header: Iterable[str], rows: Sequence[Sequence[object]]) -> str:
    head = "".join(f"<th>{html.escape(str(cell))}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(str(c))}</td>" for c in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
