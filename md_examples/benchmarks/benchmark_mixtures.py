"""Every method on mixtures of 2, 4 and 6 specialists of rMD17, on a second pair, and on two that hardly differ.

    python md_examples/benchmarks/benchmark_mixtures.py DATA SPECIALISTS --out FOLDER [--json] [--methods M ...]

DATA holds the rMD17 files ``rmd17_<molecule>_test_01.npz``, SPECIALISTS the files that
``python md_examples/benchmarks/rebuild_bundled.py DATA --out SPECIALISTS --stage more`` makes (two are bundled).
Rows are kept in FOLDER, so that a killed run goes on; FOLDER gets one table and one plot per mixture and a summary.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from training_plan import say

from ase_gffmerge import ForceField
from ase_gffmerge.data.readers import read_frames
from ase_gffmerge.evaluation.comparison.compare import SPECIALIST, Comparison, compare_methods
from ase_gffmerge.evaluation.comparison.inputs import LabelledSet, make_merge_inputs
from ase_gffmerge.evaluation.comparison.measurement import RowStore
from ase_gffmerge.evaluation.comparison.report import markdown, plot_comparison
from ase_gffmerge.forcefield.force_field import BUNDLED
from ase_gffmerge.integrations.load import load_force_field

MIXTURES: Mapping[str, tuple[str, ...]] = {
    "K=2": ("ethanol", "malonaldehyde"),
    "K=4": ("ethanol", "malonaldehyde", "aspirin", "toluene"),
    "K=6": ("ethanol", "malonaldehyde", "aspirin", "toluene", "uracil", "salicylic"),
    "second pair": ("aspirin", "uracil"),
    "near-identical": ("ethanol", "ethanol~"),
}
"""Molecules of the specialists; one that ends with ``~`` is the same specialist with perturbed weights."""
DEFAULT = "gffmerge"
PERTURBATION = 1e-3
"""Of every weight of a perturbed specialist: standard deviation over the root mean square of its tensor."""


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Where molecules' specialists and test frames come from."""

    data: Path
    specialists: Path
    test_frames: int

    def specialist(self, molecule: str) -> ForceField:
        """The bundled specialist of a molecule, or the one in the folder; perturbed where the name ends with ``~``."""
        name = f"rmd17-{molecule.removesuffix('~')}"
        found = load_force_field(name if name in BUNDLED else self.specialists / f"{name}.safetensors")
        return perturbed(found) if molecule.endswith("~") else found

    def tests(self, molecule: str) -> LabelledSet:
        """Evenly spaced test frames of a molecule."""
        path = self.data / f"rmd17_{molecule.removesuffix('~')}_test_01.npz"
        frames = read_frames(path)
        chosen = np.linspace(0, len(frames) - 1, min(self.test_frames, len(frames))).round().astype(int)
        return LabelledSet(source=str(path), frames=tuple(frames[i] for i in chosen))


def perturbed(specialist: ForceField) -> ForceField:
    """A specialist with noise on all weights."""
    potential, generator = deepcopy(specialist.potential), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weights in potential.parameters():
            noise = torch.randn(weights.shape, generator=generator, dtype=weights.dtype)
            weights += PERTURBATION * weights.square().mean().sqrt() * noise
    return replace(specialist, name=f"{specialist.name}~", potential=potential)


def main() -> None:
    """Compare, write tables and plots, print the summary."""
    options = arguments()
    inputs = Inputs(data=options.data, specialists=options.specialists, test_frames=options.test_frames)
    options.out.mkdir(parents=True, exist_ok=True)
    compared = {
        name: compared_mixture(name, molecules, inputs, options.out, methods=options.methods)
        for name, molecules in chosen_mixtures(options).items()
    }
    document = {name: comparison.to_dict() for name, comparison in compared.items()}
    document["growth"] = growth(compared)
    (options.out / "mixtures.json").write_text(json.dumps(document, indent=1))
    if any(name.startswith("K=") for name in compared):
        plot_growth(compared, options.out / "growth.png")
    print(json.dumps(document, indent=1) if options.json else summary(compared))


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path, help="folder of the rMD17 files of split 01")
    parser.add_argument("specialists", type=Path, help="folder of the specialists that are not bundled")
    parser.add_argument("--out", type=Path, required=True, help="folder for rows, tables and plots")
    parser.add_argument("--test-frames", type=int, default=300, help="per molecule [default: 300]")
    parser.add_argument("--mixtures", nargs="+", choices=MIXTURES, default=list(MIXTURES))
    parser.add_argument("--molecules", nargs="+", help="one mixture of these in the place of --mixtures")
    parser.add_argument("--methods", nargs="+", help="default: all that need no training")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    return parser.parse_args()


def chosen_mixtures(options: argparse.Namespace) -> dict[str, tuple[str, ...]]:
    """Molecules by mixture."""
    if options.molecules:
        return {" + ".join(options.molecules): tuple(options.molecules)}
    return {name: MIXTURES[name] for name in options.mixtures}


def compared_mixture(
    name: str, molecules: Sequence[str], inputs: Inputs, out: Path, *, methods: Sequence[str] | None
) -> Comparison:
    """All methods on one mixture; its table and plot go to ``out``."""
    merge_inputs = make_merge_inputs([inputs.specialist(molecule) for molecule in molecules], device="cpu")
    tests = [inputs.tests(molecule) for molecule in molecules]
    comparison = compare_methods(
        merge_inputs,
        tests,
        methods,
        store=RowStore(out / "rows", merge_inputs, tests),
        progress=lambda fraction, text: say(f"{name} {100 * fraction:3.0f} %  {text}"),
    )
    stem = name.replace(" ", "-").replace("=", "")
    (out / f"{stem}.md").write_text(markdown(comparison), encoding="utf-8")
    plot_comparison(comparison, out / f"{stem}.png")
    return comparison


def ratios(comparison: Comparison, method: str) -> dict[str, float]:
    """Force MAE of a method over the specialist's own, by specialist."""
    errors = comparison.errors("force_mae")
    return {name: errors[method][name] / errors[SPECIALIST][name] for name in comparison.names}


def growth(compared: Mapping[str, Comparison]) -> dict[str, Any]:
    """Mean ratio of the default merge by mixture, over all specialists and over the two that all mixtures share."""
    result = {}
    for name, comparison in compared.items():
        if DEFAULT not in comparison.rows:
            continue
        by_name = ratios(comparison, DEFAULT)
        shared = [
            ratio for specialist, ratio in by_name.items() if specialist.split("-")[1] in MIXTURES["K=2"]
        ]
        result[name] = {
            "mean_ratio": float(np.mean(list(by_name.values()))),
            "mean_ratio_of_ethanol_and_malonaldehyde": float(np.mean(shared)) if shared else None,
        }
    return result


def plot_growth(compared: Mapping[str, Comparison], path: Path) -> None:
    """Plot the ratio to the specialists against the number of specialists, for every method that is one potential."""
    sizes = {name: comparison for name, comparison in compared.items() if name.startswith("K=")}
    figure = Figure(figsize=(7, 4.5))
    axes = figure.subplots()
    methods = [m for m in next(iter(sizes.values())).rows if m != SPECIALIST]
    for method in methods:
        points = [
            (len(comparison.names), float(np.mean(list(ratios(comparison, method).values()))))
            for comparison in sizes.values()
            if method in comparison.rows
        ]
        axes.plot(*zip(*points), "o-", label=method, linewidth=3 if method == DEFAULT else 1)
    axes.set(xlabel="specialists", ylabel="force MAE / specialist's own (mean)", yscale="log")
    axes.legend(fontsize=7, ncols=2)
    figure.savefig(path, dpi=130, bbox_inches="tight")


def summary(compared: Mapping[str, Comparison]) -> str:
    """Markdown: the mean ratio to the specialists' own force MAE, a row per method and a column per mixture."""
    methods = list(dict.fromkeys(m for c in compared.values() for m in c.rows if m != SPECIALIST))
    lines = ["| method | " + " | ".join(compared) + " |", "|---|" + "---:|" * len(compared)]
    for method in methods:
        cells = [
            f"{np.mean(list(ratios(c, method).values())):.2f}" if method in c.rows else "–"
            for c in compared.values()
        ]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
