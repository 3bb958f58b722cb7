"""Finished rows: kept at once, shown as a Markdown table and a plot."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ase_gffmerge.evaluation.plots import save_figure
from ase_gffmerge.storage.tensor_file import atomic_write
from research.bench import mean_force_mae

Row = dict[str, Any]


class Rows:
    """Rows of one folder, by trial name; rows of other weights, frames or versions are not found.

    Parameters
    ----------
    path
        The JSON file.
    identity
        What the rows depend on beside the trial.
    """

    def __init__(self, path: Path, identity: str):
        self.path, self.identity = path, identity

    @property
    def found(self) -> dict[str, Row]:
        """Finished rows, those of other processes with the same folder included."""
        return self._everything().get(self.identity, {})

    def keep(self, row: Row) -> None:
        """Add a row and write the file."""
        everything = self._everything()
        everything.setdefault(self.identity, {})[row["name"]] = row
        text = json.dumps(everything, indent=1)
        atomic_write(self.path, text)

    def _everything(self) -> dict[str, dict[str, Row]]:
        return json.loads(self.path.read_text()) if self.path.exists() else {}


def markdown(rows: Sequence[Row]) -> str:
    """Table by family, errors in meV/Å and meV/atom, one column per specialist."""
    if not rows:
        return "no trial has finished"
    names = list(rows[0]["force_mae"])
    header = [
        "family",
        "trial",
        *(f"{n} F" for n in names),
        *(f"{n} E" for n in names),
        "seconds",
        "inference",
    ]
    header += ["what it changes", "note"]
    lines = ["| " + " | ".join(header) + " |", "|---|---|" + "---:|" * (2 * len(names) + 2) + "---|---|"]
    for row in sorted(rows, key=lambda row: (row["family"], mean_force_mae(row))):
        cells = [row["family"], row["name"]]
        cells += [f"{row['force_mae'][n]:.1f}" for n in names] + [
            f"{row['energy_mae'][n]:.2f}" for n in names
        ]
        cost = row["inference"]
        cells += [f"{row['seconds']:.0f}", f"{cost:.2f}" if cost else "", row["changes"], row["note"]]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(rows: Sequence[Row], path: Path) -> Path:
    """Error against processor seconds, a colour per family."""
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.add_subplot()
    for family in sorted({row["family"] for row in rows}):
        own = [row for row in rows if row["family"] == family]
        points = [(row["seconds"], mean_force_mae(row)) for row in own]
        axes.scatter(*zip(*points, strict=True), s=28, label=family)
        for row, point in zip(own, points, strict=True):
            axes.annotate(row["name"], point, fontsize=6, xytext=(3, 2), textcoords="offset points")
    axes.set(xlabel="processor seconds of the merge", ylabel="mean force MAE (meV/Å)", xscale="log")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=5, frameon=False, fontsize="small")
    return save_figure(figure, path)
