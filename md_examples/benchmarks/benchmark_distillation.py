"""Measure label-free distillation against joint training on labels, for rMD17 ethanol and malonaldehyde.

    python md_examples/benchmarks/benchmark_distillation.py DATA_FOLDER --out FOLDER [--json]

DATA_FOLDER holds the rMD17 files ``rmd17_<molecule>_{train,test}_01.npz``. Everything is measured in seconds of processor
time on one thread, without the time that the tests take: joint training from the base (70 epochs on 2000 labelled frames),
and distillation from three starts (the closed-form merge, the mean of the weights, the base), for several lengths and for
several numbers of unlabelled frames per specialist. Seconds of the merged start include its merge. A run takes
about an hour; one that was interrupted continues when the same command is given again. FOLDER gets the measurements
(``*.json``), the table (``table.md``) and the learning curves (``curves.png``).
"""

import argparse
import json
import time
import warnings
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms
from matplotlib.figure import Figure
from training_plan import say

from ase_gffmerge import ForceField
from ase_gffmerge.data.frames import bare
from ase_gffmerge.data.readers import read_frames
from ase_gffmerge.errors import MergeWarning
from ase_gffmerge.evaluation.plots import save_figure
from ase_gffmerge.inference.errors import evaluate
from ase_gffmerge.merging.recipe import DistillOptions
from ase_gffmerge.models import Potential
from ase_gffmerge.storage.tensor_file import atomic_write, read_file
from ase_gffmerge.training.distill import distill
from ase_gffmerge.training.train import FINE_TUNING, train_jointly
from ase_gffmerge.workflows.merge import merge

MOLECULES = ("ethanol", "malonaldehyde")
NAMES = tuple(f"rmd17-{molecule}" for molecule in MOLECULES)
STARTS = ("merged", "mean", "base")


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much is measured.

    Attributes
    ----------
    labelled, tests, glances
        Labelled training frames, test frames, and test frames of the points along a curve, per molecule.
    epochs
        Of joint training.
    shares
        Lengths of the distillations, as fractions of the default's.
    frames, frames_share
        Unlabelled frames per specialist, and the length of these distillations.
    """

    labelled: int = 1000
    tests: int = 1000
    glances: int = 100
    epochs: int = FINE_TUNING.epochs
    shares: tuple[float, ...] = (0.125, 0.25, 0.5, 1.0)
    frames: tuple[int, ...] = (25, 100, 400)
    frames_share: float = 0.25


FULL = Size()


@dataclass
class Stopwatch:
    """Seconds of processor time, which can stand still."""

    before: float = 0.0
    started: float = field(default_factory=time.process_time)

    @property
    def seconds(self) -> float:
        """Time so far."""
        return self.before + time.process_time() - self.started

    def pause(self, work: Callable[[], Any]) -> Any:
        """Do something that does not count."""
        self.before = self.seconds
        self.started = time.process_time()
        result = work()
        self.started = time.process_time()
        return result


@dataclass(frozen=True)
class Bench:
    """Specialists, their base, and data.

    Attributes
    ----------
    specialists, base
        Bundled models.
    training, tests
        Labelled frames per molecule.
    size
        How much is measured.
    out
        Folder of the measurements.
    """

    specialists: list[ForceField]
    base: ForceField
    training: list[list[Atoms]]
    tests: list[list[Atoms]]
    size: Size
    out: Path

    def errors(self, potential: Potential, *, n: int | None = None) -> dict[str, Any]:
        """Force MAE (eV/Å) and energy MAE (eV/atom) per molecule, on all test frames or on ``n`` of them."""
        result: dict[str, Any] = {"force_mae": {}, "energy_mae": {}}
        for name, frames in zip(NAMES, self.tests, strict=True):
            chosen = (
                frames if n is None else [frames[i] for i in np.linspace(0, len(frames) - 1, n).astype(int)]
            )
            measured = evaluate(potential, chosen)
            result["force_mae"][name] = measured.force_mae
            result["energy_mae"][name] = measured.energy_mae
        return result

    def measured(self, name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Result of ``work`` from the folder, or done now."""
        path = self.out / f"{name}.json"
        if not path.exists():
            result = work()
            atomic_write(path, json.dumps(result, indent=1))
        result = json.loads(path.read_text())
        force = "  ".join(f"{k} {1000 * v:.1f}" for k, v in result["force_mae"].items())
        say(f"{name}: {force} meV/Å after {result['seconds']:.0f} s")
        return result


def open_bench(data: Path, out: Path, size: Size) -> Bench:
    """Read everything."""

    def read(part: str, n: int) -> list[list[Atoms]]:
        return [read_frames(data / f"rmd17_{molecule}_{part}_01.npz")[:n] for molecule in MOLECULES]

    out.mkdir(parents=True, exist_ok=True)
    return Bench(
        specialists=[ForceField.load(name) for name in NAMES],
        base=ForceField.load("rmd17-base"),
        training=read("train", size.labelled),
        tests=read("test", size.tests),
        size=size,
        out=out,
    )


def joint(bench: Bench) -> dict[str, Any]:
    """Joint training on labels, with the errors after every epoch; continues from its checkpoint."""
    rows_path, checkpoint = bench.out / "joint-epochs.json", bench.out / "joint.checkpoint.safetensors"
    rows: list[dict[str, Any]] = json.loads(rows_path.read_text()) if rows_path.exists() else []
    watch = Stopwatch(before=rows[-1]["seconds"] if rows else 0.0)

    def note(epoch: int) -> None:
        glance = bench.errors(averaged(bench.base, checkpoint), n=bench.size.glances)
        rows[epoch - 1 :] = [{"epoch": epoch, "seconds": watch.seconds, **glance}]
        atomic_write(rows_path, json.dumps(rows, indent=1))

    potential, _ = train_jointly(
        bench.base,
        bench.training,
        FINE_TUNING.model_copy(update={"epochs": bench.size.epochs}),
        checkpoint=checkpoint,
        device="cpu",
        callback=lambda epoch, losses: watch.pause(lambda: note(epoch)),
    )
    return {"seconds": rows[-1]["seconds"], **bench.errors(potential), "curve": rows}


AVERAGE = "average."
"""How names of averaged weights begin in a checkpoint."""


def averaged(base: ForceField, checkpoint: Path) -> Potential:
    """The moving average of the weights in a checkpoint of a training that began at ``base``."""
    _, tensors = read_file(checkpoint)
    potential = deepcopy(base.potential)
    potential.load_state_dict(
        {k.removeprefix(AVERAGE): v for k, v in tensors.items() if k.startswith(AVERAGE)}
    )
    return potential


def starting_point(kind: str, specialists: Sequence[ForceField], base: ForceField) -> ForceField:
    """What a distillation starts from."""
    if kind == "base":
        return base
    if kind == "mean":
        return merge(specialists, "mean", device="cpu")[0]
    return merge(specialists, "fast", device="cpu")[0]


def distillation(
    bench: Bench, kind: str, options: DistillOptions, n_frames: int | None = None
) -> dict[str, Any]:
    """One distillation with its errors before and after; ``n_frames`` training frames replace the calibration frames."""
    specialists = bench.specialists
    if n_frames is not None:
        sets = [[bare(atoms) for atoms in frames[:n_frames]] for frames in bench.training]
        specialists = [s.with_calibration(frames) for s, frames in zip(specialists, sets, strict=True)]
    watch = Stopwatch()
    start = starting_point(kind, specialists, bench.base)
    before = watch.pause(lambda: {"seconds": watch.seconds, **bench.errors(start.potential)})
    distilled, history = distill(start, specialists, options, device="cpu")
    return {
        "seconds": watch.seconds,
        **bench.errors(distilled.potential),
        "epochs": len(history.rows),
        "options": options.model_dump(),
        "start": before,
    }


def shortened(options: DistillOptions, share: float, n_given: int, n_usual: int) -> DistillOptions:
    """Options with ``share`` of the steps in one or more epochs, for another number of frames of one's own."""
    epochs = max(1, round(options.epochs * share))
    total = n_usual * (1 + options.copies) * options.epochs * share / epochs
    return options.model_copy(update={"epochs": epochs, "copies": max(0, round(total / n_given) - 1)})


def measure(bench: Bench, options: DistillOptions) -> dict[str, Any]:
    """All runs by name; finished ones are read from the folder."""
    usual = len(bench.specialists[0].calibration)
    runs: dict[str, Any] = {}
    for share in sorted(bench.size.shares, reverse=True):
        shorter = shortened(options, share, usual, usual)
        for kind in STARTS:
            name = f"{kind}-{share:g}"
            runs[name] = bench.measured(name, partial(distillation, bench, kind, shorter))
    runs["joint"] = bench.measured("joint", partial(joint, bench))
    for n in bench.size.frames:
        fewer = shortened(options, bench.size.frames_share, n, usual)
        for kind in STARTS:
            name = f"{kind}-{n}frames"
            runs[name] = bench.measured(name, partial(distillation, bench, kind, fewer, n))
    return runs


def summary(bench: Bench, runs: dict[str, Any]) -> dict[str, Any]:
    """The targets: error against that of joint training, share of its time, which start is ahead, and by how much."""
    longest = runs[f"merged-{max(bench.size.shares):g}"]
    reference = runs["joint"]
    ahead = {
        point: min(STARTS, key=lambda kind: mean_force_mae(runs[f"{kind}-{point}"]))
        for point in [
            *(f"{share:g}" for share in bench.size.shares),
            *(f"{n}frames" for n in bench.size.frames),
        ]
    }
    return {
        "specialist": bench.measured("specialists", partial(specialists_alone, bench))["force_mae"],
        "distilled": longest["force_mae"],
        "joint": reference["force_mae"],
        "ratio": {name: longest["force_mae"][name] / reference["force_mae"][name] for name in NAMES},
        "mean_ratio": mean_force_mae(longest) / mean_force_mae(reference),
        "time_share": longest["seconds"] / reference["seconds"],
        "ahead": ahead,
        "others_at_equal_seconds": {
            kind: at_equal_seconds(bench.size.shares, runs, kind) for kind in STARTS if kind != "merged"
        },
    }


def mean_force_mae(run: dict[str, Any]) -> float:
    """Mean over the molecules, eV/Å."""
    return float(np.mean(list(run["force_mae"].values())))


def at_equal_seconds(shares: Sequence[float], runs: dict[str, Any], kind: str) -> dict[str, float]:
    """Error of another start when the merged start arrives, over that of the latter, by the merged start's run.

    The other curve is interpolated between its own runs, logarithmic in both; what lies beyond them is left out.
    """
    points = sorted((r["seconds"], mean_force_mae(r)) for r in (runs[f"{kind}-{s:g}"] for s in shares))
    seconds, errors = np.log(np.array(points)).T
    result = {}
    for share in shares:
        merged = runs[f"merged-{share:g}"]
        if points[0][0] <= merged["seconds"] <= points[-1][0]:
            other = np.exp(np.interp(np.log(merged["seconds"]), seconds, errors))
            result[f"{share:g}"] = float(other) / mean_force_mae(merged)
    return result


def specialists_alone(bench: Bench) -> dict[str, Any]:
    """Every specialist on its own molecule."""
    own = {s.name: bench.errors(s.potential) for s in bench.specialists}
    return {
        "seconds": 0.0,
        **{kind: {name: own[name][kind][name] for name in NAMES} for kind in ("force_mae", "energy_mae")},
    }


def table(runs: dict[str, Any], alone: dict[str, float]) -> str:
    """Markdown: a line per run."""
    lines = [
        f"| run | seconds | {' | '.join(f'{name} (meV/Å)' for name in NAMES)} | energy (meV/atom) |",
        "|---|---|---|---|---|",
        f"| each specialist on its own | | {' | '.join(f'{1000 * alone[name]:.1f}' for name in NAMES)} | |",
    ]
    for name, run in runs.items():
        forces = " | ".join(f"{1000 * run['force_mae'][n]:.1f}" for n in NAMES)
        energies = " / ".join(f"{1000 * run['energy_mae'][n]:.2f}" for n in NAMES)
        lines.append(f"| {name} | {run['seconds']:.0f} | {forces} | {energies} |")
    return "\n".join(lines)


def draw(bench: Bench, runs: dict[str, Any], path: Path) -> None:
    """Error against seconds, and against the number of frames."""

    def mean(row: dict[str, Any]) -> float:
        return 1000 * mean_force_mae(row)

    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for kind in STARTS:
        points = [runs[f"{kind}-{share:g}"] for share in sorted(bench.size.shares)]
        started = points[0]["start"]
        seconds = [max(started["seconds"], 0.3), *(run["seconds"] for run in points)]
        left.plot(seconds, [mean(started), *map(mean, points)], marker="o", label=f"distilled from {kind}")
        right.plot(
            bench.size.frames, [mean(runs[f"{kind}-{n}frames"]) for n in bench.size.frames], marker="o"
        )
    curve = runs["joint"]["curve"]
    left.plot(
        [r["seconds"] for r in curve], list(map(mean, curve)), color="black", label="joint training, labels"
    )
    right.axhline(mean(runs["joint"]), color="black")
    left.set(xlabel="seconds (one thread)", ylabel="force MAE (meV/Å)", xscale="log", yscale="log")
    right.set(xlabel="unlabelled frames per specialist", xscale="log")
    figure.legend(loc="outside upper center", ncols=4, frameon=False, fontsize="small")
    save_figure(figure, path)


def main() -> None:
    """Measure, then write table and curves."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", MergeWarning)
    bench = open_bench(arguments.data, arguments.out, FULL)
    runs = measure(bench, DistillOptions(epochs=3))
    result = summary(bench, runs)
    text = table(runs, result["specialist"])
    (arguments.out / "table.md").write_text(text + "\n", encoding="utf-8")
    draw(bench, runs, arguments.out / "curves.png")
    print(json.dumps({**result, "runs": runs}, indent=1) if arguments.json else text)
    say(
        f"distilled: {result['mean_ratio']:.2f} times the force MAE of joint training in {result['time_share']:.2f} of its "
        f"time; ahead: {', '.join(f'{point} {kind}' for point, kind in result['ahead'].items())}"
    )


if __name__ == "__main__":
    main()
