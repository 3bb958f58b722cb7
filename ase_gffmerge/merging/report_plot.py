"""The merge report as a figure and as one self-contained web page."""

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ase_gffmerge.merging.report import GOOD, USABLE, LayerReport, MergeReport, Parity

COLOURS = {"mean": "#b8b8b8", "merged": "#1f6f8b", "message": "#d1793b", "readout": "#7a5195"}


def save_figure(report: MergeReport, path: str | Path) -> Path:
    """Write parity plots and per-layer residuals as PNG, SVG or PDF."""
    report_figure(report).savefig(path, dpi=130, bbox_inches="tight")
    return Path(path)


def save_html(report: MergeReport, path: str | Path) -> Path:
    """Write one web page that needs no other file."""
    Path(path).write_text(report_html(report), encoding="utf-8")
    return Path(path)


def report_figure(report: MergeReport) -> Figure:
    """Parity of forces for every specialist, and residuals of every solve before and after."""
    n = len(report.parity)
    figure = Figure(figsize=(4.2 * max(n, 2), 8.2 if report.layers else 4.4), layout="constrained")
    rows = figure.subfigures(2 if report.layers else 1, 1, squeeze=False)[:, 0]
    axes = rows[0].subplots(1, max(n, 1), squeeze=False)[0]
    for axis, sample in zip(axes, report.parity):
        _parity_panel(axis, report, sample)
    if report.layers:
        _residual_panel(rows[1].subplots(), report)
    figure.suptitle(f"{' + '.join(report.specialists)}: {report.verdict}", fontsize=12)
    return figure


def _parity_panel(axis: Axes, report: MergeReport, sample: Parity) -> None:
    errors = {d.model: d.force_mae for d in report.disagreements if d.specialist == sample.specialist}
    for model, values in (("mean", sample.mean), ("merged", sample.merged)):
        if not values:
            continue
        label = f"{model}: MAE {1000 * errors[model]:.1f} meV/Å"
        axis.scatter(sample.reference, values, s=5, color=COLOURS[model], label=label, rasterized=True)
    limits = min(sample.reference), max(sample.reference)
    axis.plot(limits, limits, color="black", lw=0.8)
    axis.set(title=sample.specialist, xlabel="specialist's force (eV/Å)", ylabel="model's force (eV/Å)")
    axis.legend(fontsize=8, loc="upper left", frameon=False)


def _residual_panel(axis: Axes, report: MergeReport) -> None:
    names = [f"{row.name} ({row.kind})" if row.kind != "layer" else row.name for row in report.layers]
    positions = range(len(names))
    after = [COLOURS["merged" if row.kind == "layer" else row.kind] for row in report.layers]
    for x, row, colour in zip(positions, report.layers, after):
        before, now = max(row.residual_before, 1e-12), max(row.residual_after, 1e-12)
        axis.plot([x, x], [before, now], color="#dddddd", zorder=1)
        axis.scatter([x], [before], color=COLOURS["mean"], s=22, zorder=2)
        axis.scatter([x], [now], color=colour, s=22, zorder=3)
    axis.set_yscale("log")
    axis.set_xticks(list(positions), names, rotation=70, ha="right", fontsize=7)
    axis.set(ylabel="relative squared residual", title="grey: before; colour: after the solve")
    axis.spines[["top", "right"]].set_visible(False)


def report_html(report: MergeReport) -> str:
    """One page with verdict, figure and tables; needs no other file and no network."""
    title = html.escape(f"Merge of {', '.join(report.specialists)}")
    disagreements = _table(
        ("specialist", "model", "force MAE (meV/Å)", "force RMSE (meV/Å)", "energy MAE (meV/atom)"),
        [
            (d.specialist, d.model, *(f"{1000 * v:.2f}" for v in (d.force_mae, d.force_rmse, d.energy_mae)))
            for d in report.disagreements
        ],
    )
    layers = _table(
        (
            "layer",
            "kind",
            "rows",
            "columns",
            "effective rank",
            "ridge",
            "residual before",
            "residual after",
        ),
        [(r.name, r.kind, r.rows, r.size, _rank(r), f"{r.ridge:.2e}", *_residuals(r)) for r in report.layers],
    )
    names = html.escape(", ".join(report.averaged))
    averaged = f"<p>Averaged, as no solve covers them: {names}.</p>" if names else ""
    seconds = _table(("phase", "seconds"), [(k, f"{v:.2f}") for k, v in report.seconds.items()])
    return (
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{title}</title><style>{_STYLE}</style>"
        f"</head><body><h1>{title}</h1>{_verdict(report)}{_picture(report)}"
        f"<h2>Disagreement on calibration frames</h2>{disagreements}<h2>Solves</h2>{layers}{averaged}<h2>Time</h2>{seconds}"
        "</body></html>"
    )


def report_card(report: MergeReport) -> str:
    """A part of a web page, for notebooks: specialists, elements, verdict and figure."""
    names = html.escape(" + ".join(report.specialists))
    known = f"<p>Elements: {html.escape(', '.join(report.elements))}</p>" if report.elements else ""
    return f"<div><h4>Merge of {names}</h4>{known}{_verdict(report)}{_picture(report)}</div>"


def _verdict(report: MergeReport) -> str:
    return (
        f"<p class='verdict'>{report.verdict}</p><p>Largest relative force disagreement "
        f"{100 * report.relative_disagreement:.1f} % (good below {100 * GOOD:.0f} %, usable after distillation below "
        f"{100 * USABLE:.0f} %).</p>"
    )


def _picture(report: MergeReport) -> str:
    image = io.BytesIO()
    report_figure(report).savefig(image, format="png", dpi=120)
    data = base64.b64encode(image.getvalue()).decode()
    return f"<img alt='parity and residuals' src='data:image/png;base64,{data}'>"


_STYLE = (
    "body{font:15px system-ui,sans-serif;margin:2rem auto;max-width:72rem;padding:0 1rem;color:#222}"
    "img{max-width:100%}table{border-collapse:collapse;margin:.5rem 0}td,th{padding:.25rem .7rem;text-align:right;"
    "border-bottom:1px solid #ddd}td:first-child,th:first-child{text-align:left}.verdict{font-size:1.4rem;font-weight:600}"
)


def _rank(row: LayerReport) -> str:
    return "" if row.effective_rank is None else f"{row.effective_rank:.1f}"


def _residuals(row: LayerReport) -> tuple[str, str]:
    return f"{row.residual_before:.2e}", f"{row.residual_after:.2e}"


def _table(header: tuple[str, ...], rows: Sequence[Sequence[object]]) -> str:
    head = "".join(f"<th>{html.escape(str(cell))}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(str(c))}</td>" for c in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
