"""Plot of the cost of a step against the number of atoms."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from ase_gffmerge.evaluation.analysis.plots import save_figure
from ase_gffmerge.evaluation.benchmark.harness import Row


def plot_scaling(rows: Mapping[str, Sequence[Row]], path: Path) -> Path:
    """Draw milliseconds per MD step against atoms, from the scaling row, on logarithmic axes, and write a PNG."""
    times = {int(n): value for row in rows["scaling"] for n, value in row.milliseconds.items()}
    atoms = sorted(times)
    figure = Figure(figsize=(5, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.loglog(atoms, [times[n] for n in atoms], marker="o", markersize=4, label="measured")
    axes.loglog(atoms, [times[atoms[0]] * n / atoms[0] for n in atoms], "--", color="0.5", label="linear")
    axes.set(xlabel="atoms", ylabel="ms per MD step")
    axes.grid(visible=True, which="both", alpha=0.25, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return save_figure(figure, path)
