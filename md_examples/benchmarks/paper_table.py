"""The paper's table in form: M3GNet on Li7P3S11 and Li4P2S6, fine-tuned to beta- and gamma-Li3PS4, merged by every method.

    python md_examples/benchmarks/paper_table.py DATA --out FOLDER [--json] [--methods NAME ...] [--full]

DATA holds LiPS20's ``<system>.npz``. Nothing of the data or of the models trained on it may be passed on (no licence is
stated): keep FOLDER to yourself. Every model and every result in FOLDER is kept, and a killed run continues.

The setting is that of arXiv 2606.03232's solids: an M3GNet base, specialists that descend from it, energies to forces 1:10
in the loss, learning rate 1e-3, least squares with a ridge of 1e-6, embeddings averaged (row ``paper``) or switched at
evaluation (``paper, switched``). The authors train on 1250 frames per system for 75 epochs; ``--full`` does, as far as there
are frames. The default is far smaller, for one core: a small M3GNet, few frames for few epochs, one frame a
step and larger learning rates, with which it learns in so few steps. Frames are split by
blocks of time, as in ``benchmark_lips20.py``, and errors are those of frames that no model and no merge has seen.

``base`` is the common ancestor; ``specialist`` is each specialist on its own crystal, which no merge can be expected to
beat.

``--labels N ...`` adds what the paper says of merges as a start: readout and last block alone are fine-tuned on N labelled
frames of each crystal that no model has seen, from the merges, the mean and the base, at the better of two learning rates;
``finetuning.png`` shows the errors of both crystals' test frames.
"""

import argparse
import json
import warnings
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms
from lips20_models import BASE_SYSTEMS, SPECIES, SYSTEMS, THEORY, Size, evenly, frame_file, make_frames
from matplotlib.figure import Figure
from method_table import Column, Results, default_methods, method_results, table
from training_plan import TrainingPlan, say, trained, write_frames

from ase_gffmerge import ForceField, merge
from ase_gffmerge.data.frames import time_block_split
from ase_gffmerge.data.readers import read_frames
from ase_gffmerge.errors import MergeWarning
from ase_gffmerge.evaluation.comparison.inputs import make_merge_inputs
from ase_gffmerge.evaluation.plots import save_figure
from ase_gffmerge.inference.errors import evaluate
from ase_gffmerge.methods import METHODS, MergeOutput
from ase_gffmerge.storage.tensor_file import atomic_write
from ase_gffmerge.training.config import TrainConfig
from ase_gffmerge.training.initialization import fit_references
from ase_gffmerge.training.loop import fit
from ase_gffmerge.training.loss import labelled_graphs, validate

BASE = "m3gnet-base"
STARTS = ("paper", "gffmerge", "mean", "base")
"""What is fine-tuned: merges by recipes of these names, and the base."""
OF_CHANNELS = ("git_rebasin", "procrustes")
"""Methods that permute or turn channels, which nobody has declared for M3GNet."""


@dataclass(frozen=True, kw_only=True)
class PaperSize(Size):
    """How much of everything: learning rates of specialists and base, and rates, steps and test frames of fine-tuning."""

    learning_rate: float = 1e-3
    base_learning_rate: float = 1e-3
    fine_rates: tuple[float, ...] = (3e-4, 3e-3)
    fine_steps: int = 60
    fine_tests: int = 10
    hyper: dict[str, float] = field(default_factory=dict)


FULL = PaperSize(frames=1250, base_epochs=75, epochs=75, batch_size=4)
"""The authors' numbers, as far as there are frames."""
SMALL = PaperSize(
    hyper={
        "channels": 24,
        "edge_channels": 24,
        "width": 24,
        "n_blocks": 2,
        "cutoff": 5.0,
        "three_body_cutoff": 4.0,
    },
    frames=400,
    base_epochs=3,
    epochs=5,
    batch_size=1,
    learning_rate=3e-3,
    base_learning_rate=8e-3,
    n_test=30,
    n_calibration=12,
)


def plan(name: str, out: Path, size: PaperSize) -> TrainingPlan:
    """How the base or a specialist is trained, on energies and forces."""
    systems = BASE_SYSTEMS if name == BASE else (name,)
    everything = [
        atoms for s in (*BASE_SYSTEMS, *SYSTEMS) for atoms in read_frames(frame_file(out, s, "train"))
    ]
    own = {"model": "m3gnet", "hyper": size.hyper, "epochs": size.base_epochs}
    return TrainingPlan(
        name=name,
        training=tuple(frame_file(out, system, "train") for system in systems),
        test=tuple(frame_file(out, system, "test") for system in systems),
        config=TrainConfig(
            **(own if name == BASE else {"epochs": size.epochs}),
            batch_size=size.batch_size,
            learning_rate=size.base_learning_rate if name == BASE else size.learning_rate,
            energy_weight=1.0,
            force_weight=10.0,
            stress_weight=0.0,
            validation=10,
            level_of_theory=THEORY,
        ),
        parent=None if name == BASE else BASE,
        references=fit_references(everything, SPECIES),
        n_calibration=size.n_calibration,
    )


def measured(merge_output: MergeOutput, tests: Sequence[Sequence[Atoms]]) -> dict[str, Any]:
    """Errors on the test frames of every crystal, and the root mean square of their forces."""
    return {
        name: evaluate(merge_output.potential(k), test, specialist=k).to_dict()
        for k, (name, test) in enumerate(zip(SYSTEMS, tests, strict=True))
    }


def more_rows(base: ForceField, specialists: Sequence[ForceField]) -> Iterator[tuple[str, MergeOutput]]:
    """The base, and the published method with an embedding table per specialist."""
    yield "base", MergeOutput(potentials=(base.potential,))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MergeWarning)
        merged, _ = merge(specialists, {"preset": "paper", "conditioning": "per-specialist"}, device="cpu")
    yield "paper, switched", MergeOutput(potentials=(merged.potential,))


def distances(base: ForceField, specialists: Sequence[ForceField]) -> dict[str, dict[str, float]]:
    """How far every part of the specialists is from the base's: norm of the change relative to that of the weights."""
    found: dict[str, dict[str, float]] = {}
    weights = dict(base.potential.named_parameters())
    for specialist in specialists:
        sums: dict[str, list[float]] = {}
        for name, value in specialist.potential.named_parameters():
            part = ".".join(name.split(".")[:2]) if name.startswith("stages") else name.split(".")[0]
            pair = sums.setdefault(part, [0.0, 0.0])
            pair[0] += float((value - weights[name]).square().sum())
            pair[1] += float(weights[name].square().sum())
        found[specialist.name] = {part: (a / b) ** 0.5 for part, (a, b) in sums.items()}
    return found


def label_file(data: Path, out: Path, size: PaperSize, system: str, n: int) -> Path:
    """File of ``n`` frames of the training blocks that are not in the training file."""
    path = frame_file(out, system, f"labels-{n}")
    if not path.exists():
        frames = read_frames(data / f"{system}.npz")
        split = time_block_split(len(frames), n_blocks=size.n_blocks, gap=size.gap, fractions=(0.7, 0.0, 0.3))
        unseen = np.setdiff1d(split.train, evenly(split.train, size.frames))
        if len(unseen) < n:
            raise SystemExit(
                f"{system} has {len(unseen)} frames that no model has seen; give --labels of at most that"
            )
        write_frames(path, [frames[i] for i in evenly(unseen, n)])
    return path


def starting_point(kind: str, base: ForceField, specialists: Sequence[ForceField], out: Path) -> ForceField:
    """A merge that is made once, or the base."""
    path = out / "starts" / f"{kind}.safetensors"
    if kind == "base":
        return base
    if not path.exists():
        say(f"start {kind} ...")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", MergeWarning)
            merged, _ = merge(specialists, kind, device="cpu")
        path.parent.mkdir(parents=True, exist_ok=True)
        merged.save(path)
    return ForceField.load(path)


def fine_tuned(
    start: ForceField,
    labels: Sequence[Atoms],
    tests: Sequence[Atoms],
    size: PaperSize,
    *,
    rate: float,
) -> list[dict[str, float]]:
    """Errors (eV/Å) on the test frames while readout and last block learn the labels, by the number of steps.

    Parameters
    ----------
    start
        What is fine-tuned, and left as it is.
    labels, tests
        Frames.
    size
        Number of steps, frames per step.
    rate
        Peak of the one-cycle schedule.
    """
    potential = deepcopy(start.potential.with_core_repulsion(None)).train().requires_grad_(False)
    learned = [*potential.stages[-2:], potential.readout]  # of M3GNet: three-body terms and convolution
    parameters = [value for part in learned for value in part.requires_grad_(True).parameters()]
    per_epoch = -(-len(labels) // size.batch_size)
    config = TrainConfig(
        epochs=max(1, round(size.fine_steps / per_epoch)),
        batch_size=size.batch_size,
        learning_rate=rate,
        energy_weight=1.0,
        force_weight=10.0,
        stress_weight=0.0,
        ema_decay=0.9,
    )
    held_out = labelled_graphs(tests, potential)
    before = validate(potential, held_out, size.batch_size)
    _, history = fit(
        potential,
        labelled_graphs(labels, potential),
        held_out,
        config,
        optimizer=torch.optim.Adam(parameters),
    )
    rows = [before, *history.rows]
    return [{"steps": i * per_epoch, "force_mae": row["force_mae"]} for i, row in enumerate(rows)]


def fine_tuning(
    data: Path, out: Path, size: PaperSize, numbers: Sequence[int], models: Sequence[ForceField]
) -> dict[str, dict[str, list[dict[str, float]]]]:
    """Curves by start and number of labels, at the better rate; ``models`` are the base and the specialists.

    Parameters
    ----------
    data, out
        Folders of the frames and of what is made.
    size
        How much of everything.
    numbers
        Labelled frames of each crystal.
    models
        The base, then the specialists.
    """
    base, *specialists = models
    tests = [
        read_frames(frame_file(out, name, "test"))[:: max(1, size.n_test // size.fine_tests)]
        for name in SYSTEMS
    ]
    found: dict[str, dict[str, list[dict[str, float]]]] = {}
    for kind in STARTS:
        start = starting_point(kind, base, specialists, out)
        for n in numbers:
            record = out / "finetuning" / f"{kind}-{n}.json"
            if not record.exists():
                labels = [
                    atoms for name in SYSTEMS for atoms in read_frames(label_file(data, out, size, name, n))
                ]
                curves = [
                    fine_tuned(start, labels, list(chain(*tests)), size, rate=rate)
                    for rate in size.fine_rates
                ]
                record.parent.mkdir(parents=True, exist_ok=True)
                atomic_write(record, json.dumps(min(curves, key=lambda curve: curve[-1]["force_mae"])))
                say(f"fine-tuning {kind} on {n} + {n} frames")
            found.setdefault(kind, {})[str(n)] = json.loads(record.read_text())
    return found


def draw(curves: dict[str, dict[str, list[dict[str, float]]]], path: Path) -> None:
    """Force error against steps, with a medium number of labels, and against the number of labels."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    numbers = sorted(next(iter(curves.values())), key=int)
    number = numbers[len(numbers) // 2]
    for kind, by_number in curves.items():
        medium = by_number[number]
        left.plot(
            [row["steps"] for row in medium],
            [1000 * row["force_mae"] for row in medium],
            "o-",
            label=kind,
            markersize=3,
        )
        right.plot(
            [0, *map(int, by_number)],
            [1000 * medium[0]["force_mae"], *(1000 * curve[-1]["force_mae"] for curve in by_number.values())],
            "o-",
        )
    left.set(xlabel=f"steps, with {number} labelled frames of each crystal", ylabel="force MAE (meV/Å)")
    right.set(xlabel="labelled frames of each crystal")
    left.legend(frameon=False)
    save_figure(figure, path)


def columns() -> dict[str, Column]:
    """Columns of the table."""

    def column(system: str, key: str) -> Column:
        return lambda result: 1000 * result[system][key]

    keys = {"force MAE": "force_mae", "energy MAE": "energy_mae"}
    every = {
        f"{system.split('-')[0]} {title}": column(system, key)
        for system in SYSTEMS
        for title, key in keys.items()
    }
    return {**every, "seconds": lambda result: result.get("seconds")}


def results(
    data: Path, out: Path, size: PaperSize, methods: Sequence[str] | None, numbers: Sequence[int]
) -> dict[str, Any]:
    """Train what is missing, and measure everything.

    Parameters
    ----------
    data, out
        Folders of the frames and of what is made.
    size
        How much of everything.
    methods
        Names in the registry; default: all that need no training.
    numbers
        Labelled frames of each crystal that merges are fine-tuned on.
    """
    make_frames(data, out, size)
    base = trained(plan(BASE, out, size), out, device="cpu")
    specialists = [trained(plan(name, out, size), out, device="cpu") for name in SYSTEMS]
    merge_inputs = make_merge_inputs(specialists, base=base, device="cpu")
    measure = partial(measured, tests=[read_frames(frame_file(out, name, "test")) for name in SYSTEMS])
    rows: Results = {name: measure(output) for name, output in more_rows(base, specialists)}
    methods = methods or [name for name in default_methods(merge_inputs) if name not in OF_CHANNELS]
    rows |= method_results(merge_inputs, measure, out / "methods", methods=methods)
    size_said = {
        "hyper": base.potential.hyper.to_dict(),
        "frames": size.frames,
        "epochs": [size.base_epochs, size.epochs],
        "calibration frames": size.n_calibration,
        "test frames": size.n_test,
    }
    curves = fine_tuning(data, out, size, numbers, [base, *specialists]) if numbers else {}
    if curves:
        draw(curves, out / "finetuning.png")
    return {
        "size": size_said,
        "distances": distances(base, specialists),
        "methods": rows,
        "fine-tuning": curves,
    }


def shown(result: dict[str, Any]) -> str:
    """The table in Markdown: forces meV/Å, energies meV/atom."""
    lines = [
        table(result["methods"], columns()),
        "",
        "forces meV/Å, energies meV/atom",
        "",
        "changes from the base",
    ]
    for name, parts in result["distances"].items():
        lines.append(f"* {name}: " + ", ".join(f"{part} {value:.2f}" for part, value in parts.items()))
    for kind, by_number in result["fine-tuning"].items():
        ends = ", ".join(f"{n}: {1000 * curve[-1]['force_mae']:.0f}" for n, curve in by_number.items())
        first = next(iter(by_number.values()))[0]["force_mae"]
        lines.append(
            f"* fine-tuned from {kind}, labels: force MAE of both crystals: 0: {1000 * first:.0f}, {ends}"
        )
    return "\n".join(lines)


def main() -> None:
    """Do what is missing, then show the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="folder of LiPS20's npz files")
    parser.add_argument("--out", type=Path, required=True, help="folder of frames, models and results")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--methods", nargs="+", choices=METHODS, metavar="METHOD")
    parser.add_argument("--full", action="store_true", help="the authors' numbers, for a GPU or a night")
    parser.add_argument(
        "--labels", nargs="+", type=int, default=[], metavar="N", help="frames to fine-tune on"
    )
    arguments = parser.parse_args()
    size = FULL if arguments.full else SMALL
    result = results(arguments.data, arguments.out, size, arguments.methods, arguments.labels)
    print(json.dumps(result, indent=1) if arguments.json else shown(result))


if __name__ == "__main__":
    main()
