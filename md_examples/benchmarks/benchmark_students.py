"""Measure compression in closed form and small students, for rMD17 ethanol and malonaldehyde.

    python md_examples/benchmarks/benchmark_students.py DATA_FOLDER --out FOLDER [--only PART ...] [--escaip FILE] [--json]

DATA_FOLDER holds the rMD17 files ``rmd17_<molecule>_test_01.npz``. Seconds are processor time on one thread.

``compression``: the bundled ethanol specialist with fewer channels and blocks, after every kind of solve.
``students``: 32 channels and 3 blocks taught from the compressed start, with node features too, and from random weights.
``strategies``: the same student from random weights, with every kind of feature, with rows of Hessians and on other frames,
and the fraction of the gap that each closes: between the student that learns energies and forces alone, and its teacher.
Frames of a second half are made of the calibration frames by the student of the first half: displaced to where it is worst
(up the gradient of its squared force error), or visited by its dynamics. Edges are those of the EScAIP model of ethanol in
FILE (``benchmark_escaip.py --only accuracy`` leaves one), which teaches PaiNN and EScAIP.
``pair``: the two bundled specialists, merged, compressed and distilled into one student.

Milliseconds per energy and forces are given for every size at 9 and 243 atoms. A run takes a quarter of an hour;
finished parts are kept in FOLDER (delete one to measure it again).
"""

import argparse
import json
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.build import molecule
from training_plan import say

from ase_gffmerge import ForceField, compress, distill, merge
from ase_gffmerge.data.frames import bare
from ase_gffmerge.data.readers import read_frames
from ase_gffmerge.errors import MergeWarning
from ase_gffmerge.graphs import batch_graphs, build_graph, predict
from ase_gffmerge.graphs.derivatives import hessian_products
from ase_gffmerge.inference.errors import evaluate
from ase_gffmerge.merging.augmentation import with_copies
from ase_gffmerge.merging.recipe import AugmentationOptions, DistillOptions
from ase_gffmerge.models import Potential
from ase_gffmerge.training.config import TrainConfig
from ase_gffmerge.training.initialization import random_potential
from ase_gffmerge.training.student import make_student

MOLECULES = ("ethanol", "malonaldehyde")
SIZES = ((64, 3), (48, 3), (32, 3), (64, 2), (32, 2))
RECIPES: dict[str, dict[str, Any]] = {
    "layers": {"preset": "closed-form", "readout": None, "messages": False},
    "layers and stages": {"preset": "closed-form", "readout": None},
    "layers, stages and readout": {"preset": "closed-form", "readout": {"width": 512}},
}
EPOCHS, FEATURE_WEIGHT = 10, 0.7
STRATEGY_EPOCHS = 6
"""Of every run of the part ``strategies``."""


Row = dict[str, Any]


def box(side: int) -> Atoms:
    """A periodic box of ``side`` ** 3 randomly turned ethanol molecules."""
    rng, edge = np.random.default_rng(0), 4.6
    atoms = Atoms(cell=side * edge * np.eye(3), pbc=True)
    for corner in np.indices((side,) * 3).reshape(3, -1).T:
        one = molecule("CH3CH2OH")
        one.rotate(rng.uniform(0, 360), rng.normal(size=3))
        one.positions += edge * corner
        atoms += one
    return atoms


def milliseconds(potential: Potential, atoms: Atoms, *, budget: float = 2.0) -> float:
    """Median processor time of energy and forces, neighbor list left out."""
    served = potential.float().for_inference()
    graph = build_graph(atoms, potential.hyper.cutoff, dtype=torch.float32)
    predict(served, graph)
    times: list[float] = []
    while sum(times) < budget:
        start = time.process_time()
        predict(served, graph)
        times.append(time.process_time() - start)
    return 1000 * float(np.median(times))


def cost(potential: Potential) -> dict[str, float]:
    """Milliseconds at two sizes, and the number of parameters."""
    return {
        "ms_9": milliseconds(potential, molecule("CH3CH2OH")),
        "ms_243": milliseconds(potential, box(3)),
        "parameters": sum(p.numel() for p in potential.parameters()),
    }


def errors(potential: Potential, tests: dict[str, list[Atoms]], names: Sequence[str]) -> dict[str, Any]:
    """Force MAE (meV/Å) and energy MAE (meV/atom) per molecule."""
    found = {name: evaluate(potential, tests[name]) for name in names}
    return {
        "force_mae": {name: 1000 * e.force_mae for name, e in found.items()},
        "energy_mae": {name: 1000 * e.energy_mae for name, e in found.items()},
    }


def compression(tests: dict[str, list[Atoms]]) -> list[dict[str, Any]]:
    """All sizes and recipes."""
    teacher = ForceField.load("rmd17-ethanol")
    rows = [{"run": "teacher", **errors(teacher.potential, tests, ["ethanol"]), **cost(teacher.potential)}]
    for channels, blocks in SIZES:
        for name, recipe in RECIPES.items():
            start = time.process_time()
            small, _ = compress(teacher, channels=channels, blocks=blocks, recipe=recipe)
            seconds = time.process_time() - start
            measured = errors(small.potential, tests, ["ethanol"]) | cost(small.potential)
            rows.append({"run": f"{channels}x{blocks}, {name}", "seconds": seconds, **measured})
            say(str(rows[-1]))
    return rows


def random_student(teacher: ForceField, architecture: str = "painn") -> ForceField:
    """32 x 3 with random weights."""
    hyper: dict[str, object] = {"channels": 32, "n_blocks": 3, "cutoff": teacher.cutoff}
    potential = random_potential(TrainConfig(model=architecture, hyper=hyper), teacher.species)
    potential.references.copy_(teacher.potential.references)
    return ForceField(name="random", potential=potential.eval(), calibration=teacher.calibration)


def taught(
    start: Callable[[], ForceField],
    teachers: Sequence[ForceField],
    options: DistillOptions,
    tests: dict[str, list[Atoms]],
    names: Sequence[str],
) -> dict[str, Any]:
    """Errors before and after a distillation, and seconds of both."""
    begin = time.process_time()
    student = start()
    seconds = time.process_time() - begin
    before = errors(student.potential, tests, names)
    begin = time.process_time()
    made, history = distill(student, teachers, options, device="cpu")
    row = {
        "start": before | {"seconds": seconds},
        "seconds": seconds + time.process_time() - begin,
        "epochs": len(history.rows),
        **errors(made.potential, tests, names),
    }
    say(str(row))
    return row


def students(tests: dict[str, list[Atoms]]) -> list[dict[str, Any]]:
    """Starts and strategies at equal epochs."""
    teacher = ForceField.load("rmd17-ethanol")

    def compressed() -> ForceField:
        return make_student(teacher, [teacher], architecture="painn", channels=32, blocks=3)

    runs = {
        "compressed, teacher's energies and forces": (compressed, 0.0),
        "compressed, node-to-node too": (compressed, 0.7),
        "random, teacher's energies and forces": (lambda: random_student(teacher), 0.0),
        "random, node-to-node too": (lambda: random_student(teacher), 0.7),
    }
    return [
        {
            "run": name,
            **taught(
                start,
                [teacher],
                DistillOptions(epochs=EPOCHS, patience=EPOCHS, feature_weight=weight),
                tests,
                ["ethanol"],
            ),
        }
        for name, (start, weight) in runs.items()
    ]


def adversarial(student: ForceField, teacher: ForceField) -> list[Atoms]:
    r"""Calibration frames, displaced up the gradient of the squared force error: :math:`-2 (H - H^*) (F - F^*)`."""
    moved = [bare(atoms) for atoms in teacher.calibration]
    for _ in range(ASCENTS):
        errors: list[torch.Tensor] = []
        batches = []
        for model in (student, teacher):
            graphs = [build_graph(a, model.cutoff, dtype=model.potential.dtype) for a in moved]
            batches.append((model.potential, batch_graphs(graphs)))
            errors.append(predict(*batches[-1]).forces)
        error = errors[0] - errors[1].to(errors[0].dtype)
        own, other = (hessian_products(model, batch, error.to(model.dtype)) for model, batch in batches)
        uphill = (other.to(own.dtype) - own).split([len(atoms) for atoms in moved])
        for atoms, step in zip(moved, uphill, strict=True):
            atoms.positions += ASCENT * (step / step.square().mean().sqrt()).double().numpy()
    return moved


def visited(student: ForceField, teacher: ForceField) -> list[Atoms]:
    """What the student's dynamics at 500 K reaches within 50 fs from the calibration frames, where it stays whole."""
    options = AugmentationOptions(interval=50.0)
    starts = [bare(atoms) for atoms in teacher.calibration]
    return with_copies(student, starts, options, n_copies=1)[len(starts) :]


def in_halves(
    second: Callable[[ForceField, ForceField], Sequence[Atoms]],
    start: ForceField,
    teacher: ForceField,
    tests: dict[str, list[Atoms]],
) -> Row:
    """Half of the epochs, then the other half on frames that the student chose, too; as many frames in both."""
    begin = time.process_time()
    half = DistillOptions(epochs=STRATEGY_EPOCHS // 2, patience=STRATEGY_EPOCHS)
    student, _ = distill(start, [teacher], half, device="cpu")
    student = replace(student, merged=None)
    frames = second(student, teacher)
    copies = (half.copies + 1) * len(teacher.calibration) // (len(teacher.calibration) + len(frames)) - 1
    options = half.model_copy(update={"copies": copies, "seed": 1})
    made, _ = distill(student, [teacher], options, frames=[frames], device="cpu")
    row = {"seconds": time.process_time() - begin, **errors(made.potential, tests, ["ethanol"])}
    say(str(row))
    return row


ASCENTS, ASCENT = 5, 0.02
"""Steps of an adversarial displacement, and the root mean square of each component of a step, Å."""
SECOND_HALVES: dict[str, Callable[[ForceField, ForceField], Sequence[Atoms]]] = {
    "in halves": lambda student, teacher: (),
    "adversarial frames in the second half": adversarial,
    "frames of the student's dynamics in the second half": visited,
}
STRATEGIES: dict[str, dict[str, Any]] = {
    "energies and forces": {},
    "node-to-node": {"feature_match": "nodes", "feature_weight": FEATURE_WEIGHT},
    "vector-to-vector": {"feature_match": "vectors", "feature_weight": FEATURE_WEIGHT},
    "edge-to-node": {"feature_match": "edges-to-nodes", "feature_weight": FEATURE_WEIGHT},
    "edge-to-edge": {"feature_match": "edges", "feature_weight": FEATURE_WEIGHT},
    "rows of Hessians": {"hessian_weight": 0.1},
    "rattled by 0.06 Å instead of dynamics": {"temperature": 0.0, "displacement": 0.06},
}
KINDS = {
    ("painn", "painn"): (
        "energies and forces",
        "node-to-node",
        "vector-to-vector",
        "rows of Hessians",
        "rattled by 0.06 Å instead of dynamics",
        *SECOND_HALVES,
    ),
    ("escaip", "painn"): ("energies and forces", "node-to-node", "edge-to-node", "rows of Hessians"),
    ("escaip", "escaip"): ("energies and forces", "node-to-node", "edge-to-edge"),
}
"""Strategies by the architectures of teacher and student."""


def strategies(tests: dict[str, list[Atoms]], escaip: Path | None = None) -> list[Row]:
    """Every strategy that a pair of architectures allows; the first one is what the gap is measured from."""
    teachers = {"painn": ForceField.load("rmd17-ethanol")}
    if escaip:
        teachers["escaip"] = ForceField.load(escaip)
    rows: list[Row] = []
    for (kind, architecture), names in KINDS.items():
        if kind not in teachers:
            continue
        teacher = teachers[kind]
        own = errors(teacher.potential, tests, ["ethanol"])
        plain: Row | None = None
        for name in names:
            start = partial(random_student, teacher, architecture)
            if name in SECOND_HALVES:
                row = in_halves(SECOND_HALVES[name], start(), teacher, tests)
            else:
                options = DistillOptions(epochs=STRATEGY_EPOCHS, patience=STRATEGY_EPOCHS, **STRATEGIES[name])
                row = taught(start, [teacher], options, tests, ["ethanol"])
            plain = plain or row
            closed = {
                key: (plain[key]["ethanol"] - row[key]["ethanol"])
                / (plain[key]["ethanol"] - own[key]["ethanol"])
                for key in own
            }
            rows.append({"run": f"{kind} to {architecture}, {name}", **row, "gap_closed": closed})
            say(f"{rows[-1]['run']}: {closed}")
    return rows


def pair(tests: dict[str, list[Atoms]]) -> list[dict[str, Any]]:
    """Two specialists into one small force field."""
    specialists = [ForceField.load(f"rmd17-{name}") for name in MOLECULES]
    options = DistillOptions(epochs=EPOCHS, patience=EPOCHS, feature_weight=0.0)

    def start() -> ForceField:
        merged, _ = merge(specialists, "fast", device="cpu")
        return make_student(merged, specialists, architecture="painn", channels=32, blocks=3)

    alone = [errors(s.potential, tests, [n]) for s, n in zip(specialists, MOLECULES, strict=True)]
    own = {key: {n: a[key][n] for n, a in zip(MOLECULES, alone, strict=True)} for key in alone[0]}
    return [
        {"run": "specialists", **own},
        {"run": "32x3", **taught(start, specialists, options, tests, MOLECULES)},
    ]


PARTS = {"compression": compression, "students": students, "strategies": strategies, "pair": pair}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: a line per run."""
    lines = [
        "| run | seconds | force MAE (meV/Å) | energy MAE (meV/atom) | ms at 9 / 243 atoms | gap closed, forces / energy |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        force = " / ".join(f"{value:.1f}" for value in row["force_mae"].values())
        energy = " / ".join(f"{value:.2f}" for value in row["energy_mae"].values())
        if "start" in row:
            force = (
                " / ".join(f"{value:.1f}" for value in row["start"]["force_mae"].values()) + f" -> {force}"
            )
        speed = f"{row['ms_9']:.1f} / {row['ms_243']:.0f}" if "ms_9" in row else ""
        seconds = f"{row['seconds']:.0f}" if "seconds" in row else ""
        gap = " / ".join(f"{value:.0%}" for value in row.get("gap_closed", {}).values())
        lines.append(f"| {row['run']} | {seconds} | {force} | {energy} | {speed} | {gap} |")
    return "\n".join(lines)


def main() -> None:
    """Measure what is not in the folder yet, then print all of it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--tests", type=int, default=500, help="test frames per molecule")
    parser.add_argument(
        "--escaip", type=Path, help="EScAIP model of ethanol, a teacher of the part strategies"
    )
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", MergeWarning)
    arguments.out.mkdir(parents=True, exist_ok=True)
    tests = {
        name: read_frames(arguments.data / f"rmd17_{name}_test_01.npz")[: arguments.tests]
        for name in MOLECULES
    }
    results = {}
    for name in arguments.only:
        path = arguments.out / f"{name}.json"
        if not path.exists():
            part = partial(strategies, escaip=arguments.escaip) if name == "strategies" else PARTS[name]
            path.write_text(json.dumps(part(tests), indent=1))
        results[name] = json.loads(path.read_text())
    print(json.dumps(results, indent=1) if arguments.json else "\n\n".join(map(table, results.values())))


if __name__ == "__main__":
    main()
