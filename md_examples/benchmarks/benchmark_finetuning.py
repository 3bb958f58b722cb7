"""Fine-tuning on few labels from a merge, and from what else it could begin with, for rMD17 ethanol and malonaldehyde.

    python md_examples/benchmarks/benchmark_finetuning.py DATA --out FOLDER [--json] [--seeds 0 1 2]

DATA holds the rMD17 files ``rmd17_<molecule>_test_01.npz``. Labels and test frames are taken from these, apart, so that no
start has seen either. From every start the same short training (``train(..., init=start)``, what ``gffmerge train --init``
does) runs on 5, 20 and 100 labelled frames of each molecule together, at learning rates of a ladder until the error on the
test frames rises; a start is credited with the best one, for every number of frames by itself. Starts: the default merge,
the mean of the specialists' weights, the paper's merge, their base, and the first specialist (naive fine-tuning). Errors are
measured along the way; seconds are those of the processor, the making of the start included. Two longer trainings show what
the cheap starts reach in the time that the merge takes.

A run takes about ten processor minutes; one that was interrupted continues. FOLDER gets the runs (``*.json``), the
table (``table.md``) and the curves (``curves.png``).
"""

import argparse
import json
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms
from benchmark_distillation import MOLECULES, NAMES, Stopwatch, averaged
from matplotlib.figure import Figure
from training_plan import say, write_frames

from ase_gffmerge import ForceField, merge
from ase_gffmerge.data.readers import read_frames
from ase_gffmerge.errors import MergeWarning
from ase_gffmerge.evaluation.plots import save_figure
from ase_gffmerge.inference.errors import evaluate
from ase_gffmerge.storage.tensor_file import atomic_write
from ase_gffmerge.training.checkpoint import checkpoint_path
from ase_gffmerge.training.config import TrainConfig
from ase_gffmerge.training.train import train

MERGES = {"merged": "gffmerge", "mean": "mean", "paper": "paper"}
STARTS = (*MERGES, "base", "naive")
LONG_STARTS = ("mean", "base")


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much is measured.

    Attributes
    ----------
    frames
        Labelled frames per molecule.
    rates
        Peak learning rates, ascending: the second and third are tried, and then the others on the side of the better one.
    steps, long_steps
        Optimizer steps of a training, and of the two long ones, which have the most frames and the third rate.
    batch_size
        Frames per step.
    tests
        Test frames per molecule.
    glances
        Fractions of a training after which errors are measured.
    """

    frames: tuple[int, ...] = (5, 20, 100)
    rates: tuple[float, ...] = (4e-5, 2e-4, 1e-3, 5e-3)
    steps: int = 200
    long_steps: int = 1600
    batch_size: int = 10
    tests: int = 150
    glances: tuple[float, ...] = (1 / 15, 0.2, 0.5, 1.0)


FULL = Size()


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Data and places.

    Attributes
    ----------
    pool, tests
        Frames per molecule that labels are drawn from, and that errors are measured on.
    size
        How much is measured.
    out
        Folder of everything that is made.
    """

    pool: list[list[Atoms]]
    tests: list[list[Atoms]]
    size: Size
    out: Path

    def errors(self, potential: torch.nn.Module) -> dict[str, float]:
        """Force MAE (eV/Å) per molecule on the test frames."""
        return {
            name: evaluate(potential, frames).force_mae
            for name, frames in zip(NAMES, self.tests, strict=True)
        }

    def labels(self, n: int, seed: int) -> list[Path]:
        """Files of ``n`` labelled frames per molecule; those of a larger ``n`` contain them."""
        paths = []
        for molecule, frames in zip(MOLECULES, self.pool, strict=True):
            path = self.out / "frames" / f"{molecule}-{n}-{seed}.xyz"
            chosen = np.random.default_rng(seed).permutation(len(frames))[:n]
            if not path.exists():
                write_frames(path, [frames[i] for i in chosen])
            paths.append(path)
        return paths


def open_bench(data: Path, out: Path, size: Size) -> Bench:
    """Split the test files into frames for labels (the odd ones) and test frames (of the even ones)."""
    frames = [read_frames(data / f"rmd17_{molecule}_test_01.npz") for molecule in MOLECULES]
    even = [own[::2] for own in frames]
    tests = [[own[i] for i in np.linspace(0, len(own) - 1, size.tests).round().astype(int)] for own in even]
    return Bench(pool=[own[1::2] for own in frames], tests=tests, size=size, out=out)


def starting_point(bench: Bench, kind: str) -> tuple[ForceField, dict[str, Any]]:
    """A start, made once, with its errors and the processor seconds that it took."""
    path, record = bench.out / "starts" / f"{kind}.safetensors", bench.out / "starts" / f"{kind}.json"
    if not record.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        say(f"{kind} ...")
        started = time.process_time()
        if kind in MERGES:
            start, _ = merge([ForceField.load(name) for name in NAMES], MERGES[kind], device="cpu")
        else:
            start = ForceField.load("rmd17-base" if kind == "base" else NAMES[0])
        seconds = time.process_time() - started
        start.save(path)
        atomic_write(record, json.dumps({"seconds": seconds, "force_mae": bench.errors(start.potential)}))
    return ForceField.load(path), json.loads(record.read_text())


def fine_tuned(bench: Bench, kind: str, *, n: int, rate: float, steps: int, seed: int) -> dict[str, Any]:
    """One training with its errors along the way, from the folder or done now.

    Parameters
    ----------
    bench
        Data and places.
    kind
        The start.
    n, rate, steps, seed
        Labelled frames per molecule, peak learning rate, length, and seed of frames and shuffling.
    """
    name = f"{kind}-{n}-{rate:g}-{steps}-{seed}"
    record = bench.out / "runs" / f"{name}.json"
    if record.exists():
        found: dict[str, Any] = json.loads(record.read_text())
        return found
    start, before = starting_point(bench, kind)
    record.parent.mkdir(parents=True, exist_ok=True)
    per_epoch = -(-n * len(MOLECULES) // bench.size.batch_size)
    epochs = max(1, round(steps / per_epoch))
    glances = {max(1, round(share * epochs)) for share in bench.size.glances}
    out = bench.out / "runs" / f"{name}.safetensors"
    for path in (out, checkpoint_path(out)):  # seconds of a continued training would be those of its rest
        path.unlink(missing_ok=True)
    curve = [{"steps": 0, **before}]
    plain = replace(start, potential=start.potential.with_core_repulsion(None))  # which a training leaves out
    watch = Stopwatch(before=before["seconds"])

    def note(epoch: int, losses: dict[str, float]) -> None:
        def look() -> None:
            errors = bench.errors(averaged(plain, checkpoint_path(out)))
            curve.append({"steps": epoch * per_epoch, "seconds": seconds, "force_mae": errors})

        seconds = watch.seconds
        if epoch in glances:
            watch.pause(look)

    config = TrainConfig(
        epochs=epochs, batch_size=bench.size.batch_size, learning_rate=rate, validation=0, seed=seed
    )
    train(bench.labels(n, seed), out, config, init=start, device="cpu", callback=note)
    out.unlink()
    atomic_write(record, json.dumps({"start": kind, "frames": n, "rate": rate, "seed": seed, "curve": curve}))
    say(f"{name}: {1000 * mean_error(curve[-1]):.1f} meV/Å after {curve[-1]['seconds']:.0f} s")
    return fine_tuned(bench, kind, n=n, rate=rate, steps=steps, seed=seed)


def mean_error(row: dict[str, Any]) -> float:
    """Force MAE of a row, mean over the molecules, eV/Å."""
    return float(np.mean(list(row["force_mae"].values())))


def at_best_rate(bench: Bench, kind: str, n: int, seeds: Sequence[int]) -> dict[str, Any]:
    """Runs of a start over the seeds at the learning rate of the ladder that serves it best, and that rate."""
    rates, tried = bench.size.rates, dict[int, list[dict[str, Any]]]()

    def error(i: int) -> float:
        tried[i] = [
            fine_tuned(bench, kind, n=n, rate=rates[i], steps=bench.size.steps, seed=seed) for seed in seeds
        ]
        return float(np.mean([mean_error(run["curve"][-1]) for run in tried[i]]))

    lower, upper = error(1), error(2)
    best, least, step = (1, lower, -1) if lower < upper else (2, upper, 1)
    while 0 <= best + step < len(rates) and (found := error(best + step)) < least:
        best, least = best + step, found
    return {"rate": rates[best], "runs": tried[best]}


def measure(bench: Bench, seeds: Sequence[int]) -> dict[str, Any]:
    """Every start and number of frames at its best learning rate, the long trainings, and the references."""
    size = bench.size
    chosen = {kind: {str(n): at_best_rate(bench, kind, n, seeds) for n in size.frames} for kind in STARTS}
    long = {
        kind: fine_tuned(
            bench, kind, n=max(size.frames), rate=size.rates[2], steps=size.long_steps, seed=seeds[0]
        )
        for kind in LONG_STARTS
    }
    alone = {
        name: evaluate(ForceField.load(name).potential, frames).force_mae
        for name, frames in zip(NAMES, bench.tests, strict=True)
    }
    starts = {kind: starting_point(bench, kind)[1] for kind in STARTS}
    return {"specialists": alone, "starts": starts, "fine_tuned": chosen, "long": long}


def pooled(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean over seeds of the last point: error per molecule (eV/Å), seconds, and the spread of the mean error."""
    last = [run["curve"][-1] for run in runs]
    return {
        "force_mae": {name: float(np.mean([row["force_mae"][name] for row in last])) for name in NAMES},
        "seconds": float(np.mean([row["seconds"] for row in last])),
        "spread": float(np.std([mean_error(row) for row in last])),
    }


def table(result: dict[str, Any]) -> str:
    """Markdown: force MAE in meV/Å of both molecules, a row per start and a column per number of labelled frames."""

    def cell(row: dict[str, Any]) -> str:
        return " / ".join(f"{1000 * row['force_mae'][name]:.1f}" for name in NAMES)

    sizes = list(next(iter(result["fine_tuned"].values())))
    long = next(iter(result["long"].values()))["curve"][-1]["steps"]
    titles = ["start", "seconds", "no labels", *(f"{n} frames each" for n in sizes)]
    titles.append(f"{sizes[-1]} frames, {long} steps")
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for kind, start in result["starts"].items():
        cells = [cell(pooled(result["fine_tuned"][kind][n]["runs"])) for n in sizes]
        cells.append(cell(result["long"][kind]["curve"][-1]) if kind in result["long"] else "")
        lines.append(f"| {kind} | {start['seconds']:.0f} | {cell(start)} | {' | '.join(cells)} |")
    alone = " / ".join(f"{1000 * result['specialists'][name]:.1f}" for name in NAMES)
    return "\n".join([*lines, "", f"Each specialist on its own molecule: {alone}."])


def draw(result: dict[str, Any], path: Path) -> None:
    """Error against seconds (most frames), and after the training against the number of labelled frames."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for index, (kind, by_frames) in enumerate(result["fine_tuned"].items()):
        sizes, color = [int(n) for n in by_frames], f"C{index}"
        curves = [by_frames[str(max(sizes))]["runs"][0]["curve"]]
        curves += [result["long"][kind]["curve"]] if kind in result["long"] else []
        for curve, style in zip(curves, ("o-", "o--")):
            left.plot(
                [max(row["seconds"], 0.5) for row in curve],
                [1000 * mean_error(row) for row in curve],
                style,
                color=color,
                markersize=4,
                label=kind if style == "o-" else None,
            )
        errors = [1000 * mean_error(pooled(by_frames[str(n)]["runs"])) for n in sizes]
        right.plot([1, *sizes], [1000 * mean_error(result["starts"][kind]), *errors], "o-", color=color)
    alone = 1000 * float(np.mean(list(result["specialists"].values())))
    for axes in (left, right):
        axes.axhline(alone, color="black", linestyle=":")
    left.set(
        xlabel="processor seconds, start included", ylabel="force MAE (meV/Å)", xscale="log", yscale="log"
    )
    right.set(xlabel="labelled frames per molecule", xscale="log")
    right.set_xticks([1, *sizes], ["none", *map(str, sizes)])
    right.minorticks_off()
    left.set_yticks([25, 50, 100, 200, 400], ["25", "50", "100", "200", "400"])
    left.minorticks_off()
    figure.legend(loc="outside upper center", ncols=len(STARTS), frameon=False, fontsize="small")
    save_figure(figure, path)


def main() -> None:
    """Measure, then write table and curves."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", MergeWarning)
    bench = open_bench(arguments.data, arguments.out, FULL)
    result = measure(bench, arguments.seeds)
    text = table(result)
    (arguments.out / "table.md").write_text(text + "\n", encoding="utf-8")
    draw(result, arguments.out / "curves.png")
    print(json.dumps(result, indent=1) if arguments.json else text)


if __name__ == "__main__":
    main()
