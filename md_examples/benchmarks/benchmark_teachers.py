"""Measure small PaiNN students of other architectures' force fields: a NequIP network, fine-tuned foundation models.

    python md_examples/benchmarks/benchmark_teachers.py DATA_FOLDER --out FOLDER [--only PART ...] [--json]

DATA_FOLDER holds the folder ``rmd17`` with ``rmd17_ethanol_{train,test}_01.npz``, and for foundation models ``lips20``.
Seconds are processor time on one thread; those of a student include all that its teacher computes.

``nequip``: a NequIP network (l = 2) trained on 950 frames of ethanol teaches PaiNN (32 channels, 3 blocks, random weights)
on 100 of these frames without their labels. Beside it, the same student trained for the same seconds on the labels of the
same 100 frames, and on those of all 950.
``chgnet``, ``7net-0``: the same for CHGNet 0.3.0 and SevenNet-0, fine-tuned for 24 epochs to 120 frames of ethanol, and
these 120 frames; their packages are needed (``pip install chgnet``, ``pip install sevenn``).
``md``: dynamics of the students that are there, 20 ps at 500 K with five seeds, and 10 ps at constant energy.

Finished parts and models are kept in FOLDER (delete one to measure it again).
"""

import argparse
import json
import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from ase import Atoms
from benchmark_students import milliseconds, random_student
from foundation_models import MOLECULE, SIZES, frame_file, make_frames, specialist
from training_plan import TrainingPlan, model_path, say, trained, write_frames

from ase_gffmerge import ForceField, distill
from ase_gffmerge.data.frames import bare, spread
from ase_gffmerge.data.readers import read_frames
from ase_gffmerge.errors import MergeWarning
from ase_gffmerge.evaluation.md.runs import Contestant, Protocol, run_models
from ase_gffmerge.inference.errors import evaluate
from ase_gffmerge.merging.recipe import DistillOptions
from ase_gffmerge.training.config import TrainConfig
from ase_gffmerge.training.train import train

FRAMES, TESTS, SHARED = 950, 500, 100
NEQUIP = TrainConfig(
    model="nequip", hyper={"channels": 32, "tensor_channels": 16, "n_blocks": 3}, epochs=24, validation=0
)
FOUNDATIONS = {
    name: replace(
        size, train=(size.train[0], 120), test=(size.test[0], 100), epochs=(6, 24), learning_rate=1e-3
    )
    for name, size in SIZES.items()
}
"""Teachers see more frames, and are fine-tuned longer, than the specialists that are merged."""
EPOCHS, TRIAL_EPOCHS, LEAST = 10, 4, 0.95
STUDENT: dict[str, object] = {"channels": 32, "n_blocks": 3, "cutoff": 5.0}
PROTOCOL = Protocol(temperature=500.0, picoseconds=20.0, seeds=5)

Row = dict[str, Any]


def measured(run: str, made: ForceField, tests: Sequence[Atoms], **more: float) -> Row:
    """Errors on labelled frames (meV/Å, meV/atom), and milliseconds per energy and forces of 9 atoms."""
    found = evaluate(made.potential, tests)
    row = {
        "run": run,
        **more,
        "force_mae": 1000 * found.force_mae,
        "energy_mae": 1000 * found.energy_mae,
        "ms_9": milliseconds(made.potential, tests[0]),
    }
    say(str(row))
    return row


def from_labels(frames: Sequence[Atoms], path: Path, seconds: float) -> tuple[ForceField, float]:
    """Student trained on labels for ``seconds``, or at most 5 % less, and what it took."""
    source = path.with_suffix(".extxyz")
    write_frames(source, frames)

    def run(epochs: int, out: Path) -> float:
        out.unlink(missing_ok=True)
        start = time.process_time()
        train([source], out, TrainConfig(hyper=STUDENT, epochs=epochs, validation=0), device="cpu")
        return time.process_time() - start

    epochs = TRIAL_EPOCHS
    spent = run(epochs, path)
    while spent < LEAST * seconds:
        epochs = math.ceil(epochs * seconds / spent)
        spent = run(epochs, path)
    return ForceField.load(path), spent


def compared(
    out: Path, teacher: ForceField, tests: Sequence[Atoms], labelled: dict[str, Sequence[Atoms]]
) -> list[Row]:
    """The teacher, its student, and the same student trained on labels; the first set of frames is the student's, too."""
    name, shared = teacher.name, next(iter(labelled.values()))
    teacher = teacher.with_calibration([bare(atoms) for atoms in shared])
    start = time.process_time()
    begun = replace(random_student(teacher), name=f"{name}-student")
    student, _ = distill(begun, [teacher], DistillOptions(epochs=EPOCHS, patience=EPOCHS), device="cpu")
    seconds = time.process_time() - start
    student.save(model_path(out, f"{name}-student"))
    rows = [
        measured(f"{name}, the teacher", teacher, tests),
        measured(f"student of {name}", student, tests, seconds=seconds),
    ]
    for what, frames in labelled.items():
        other, spent = from_labels(frames, model_path(out, f"{name}-labels-{len(frames)}"), seconds)
        rows.append(measured(f"the same student, {what}", other, tests, seconds=spent))
    return rows


def nequip(data: Path, out: Path) -> list[Row]:
    """NequIP as the teacher."""
    frames = read_frames(data / "rmd17" / "rmd17_ethanol_train_01.npz")[:FRAMES]
    source = out / "ethanol.extxyz"
    if not source.exists():
        write_frames(source, frames)
    teacher = trained(TrainingPlan(name="nequip", training=(source,), config=NEQUIP), out, device="cpu")
    tests = read_frames(data / "rmd17" / "rmd17_ethanol_test_01.npz")[:TESTS]
    shared = spread(frames, SHARED)
    return compared(
        out,
        teacher,
        tests,
        {f"labels of the same {SHARED} frames": shared, f"labels of all {FRAMES} frames": frames},
    )


def foundation(name: str, data: Path, out: Path) -> list[Row]:
    """A fine-tuned foundation model as the teacher."""
    folder, size = out / name, FOUNDATIONS[name]
    make_frames(data / "rmd17", data / "lips20", folder, size)
    teacher = replace(specialist(MOLECULE, folder, size), name=name)
    frames, tests = (read_frames(frame_file(folder, MOLECULE, part)) for part in ("train", "test"))
    return compared(out, teacher, tests, {f"labels of the same {len(frames)} frames": frames})


def md(data: Path, out: Path) -> list[Row]:
    """Stability of the students."""
    starts = spread(read_frames(data / "rmd17" / "rmd17_ethanol_test_01.npz"), PROTOCOL.seeds)
    rows: list[Row] = []
    for name in ("nequip", *FOUNDATIONS):
        path = model_path(out, f"{name}-student")
        if not path.exists():
            continue
        student = ForceField.load(path, dtype=torch.float32)
        runs = run_models([Contestant(label=name, force_field=student)], starts, PROTOCOL)[name]
        for ensemble, found in runs.items():
            whole = [run.stopped is None for run in found]
            rows.append(
                {
                    "run": f"student of {name}, {ensemble}",
                    "ps": PROTOCOL.length(ensemble),
                    "seeds": len(found),
                    "stable": sum(whole),
                }
            )
            say(str(rows[-1]))
    return rows


PARTS: dict[str, Callable[[Path, Path], list[Row]]] = {
    "nequip": nequip,
    **{name: partial(foundation, name) for name in FOUNDATIONS},
    "md": md,
}


def table(rows: Sequence[Row]) -> str:
    """Markdown: a column per key."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    shown = [
        [f"{v:.3g}" if isinstance(v, float) else str(v) for v in (row.get(k, "") for k in keys)]
        for row in rows
    ]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (keys, ["---"] * len(keys), *shown))


def main() -> None:
    """Measure what is not in the folder yet, then print all of it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", MergeWarning)
    arguments.out.mkdir(parents=True, exist_ok=True)
    results = {}
    for name in arguments.only:
        path = arguments.out / f"{name}.json"
        if not path.exists():
            path.write_text(json.dumps(PARTS[name](arguments.data, arguments.out), indent=1))
        results[name] = json.loads(path.read_text())
    print(json.dumps(results, indent=1) if arguments.json else "\n\n".join(map(table, results.values())))


if __name__ == "__main__":
    main()
