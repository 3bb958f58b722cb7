"""What aligning channels brings before force fields of independent initialisations are merged.

    python md_examples/benchmarks/benchmark_unrelated.py DATA --out FOLDER [--seeds N] [--methods M ...] [--json]

DATA holds the rMD17 files of ethanol and malonaldehyde. For every seed two small PaiNNs are trained, one on each molecule,
from initialisations of their own, and merged as they are and after their channels were brought into one order by their
activations (Git Re-Basin), which changes nothing of what they compute. Models and rows are kept in FOLDER.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from training_plan import TrainingPlan, say, trained, write_frames

from ase_gffmerge import ForceField
from ase_gffmerge.data.readers import read_frames
from ase_gffmerge.evaluation.comparison.compare import SPECIALIST, compare_methods
from ase_gffmerge.evaluation.comparison.inputs import LabelledSet, make_merge_inputs
from ase_gffmerge.evaluation.comparison.measurement import RowStore
from ase_gffmerge.methods.git_rebasin import in_one_order
from ase_gffmerge.training.config import TrainConfig

MOLECULES = ("ethanol", "malonaldehyde")
ALIGNED = ", channels in one order"
PLAIN, AFTER = ("mean", "procrustes", "paper", "closed-form"), ("mean", "paper", "closed-form")
"""Methods on the specialists as they are, and after the alignment, where the mean is Git Re-Basin."""
HYPER: dict[str, object] = {"channels": 32, "n_blocks": 2, "norm_offset": 1e-3}
N_TRAIN, N_VALIDATION, N_TEST, EPOCHS = 200, 50, 100, 30

Rows = dict[str, list[float]]
"""Force MAE in meV/Å on every molecule, by method."""


def main() -> None:
    """Train, merge, measure, print."""
    options = arguments()
    torch.set_num_threads(1)
    found = [measured(seed, options.data, options.out, options.methods) for seed in range(options.seeds)]
    document = {name: [rows[name] for rows in found] for name in found[0] if all(name in r for r in found)}
    (options.out / "unrelated.json").write_text(json.dumps(document, indent=1))
    print(json.dumps(document, indent=1) if options.json else table(document))


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path, help="folder of the rMD17 files of split 01")
    parser.add_argument("--out", type=Path, required=True, help="folder for models and rows")
    parser.add_argument("--seeds", type=int, default=3, help="pairs of initialisations [default: 3]")
    parser.add_argument("--methods", nargs="+", help="also these, before and after the alignment", default=[])
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    return parser.parse_args()


def specialist(molecule: str, seed: int, data: Path, out: Path) -> ForceField:
    """A small PaiNN with an initialisation of its own."""
    frames = out / f"{molecule}.xyz"
    if not frames.exists():
        write_frames(frames, read_frames(data / f"rmd17_{molecule}_train_01.npz")[: N_TRAIN + N_VALIDATION])
    config = TrainConfig(
        epochs=EPOCHS,
        validation=N_VALIDATION,
        seed=2 * seed + MOLECULES.index(molecule),
        hyper=HYPER,
        level_of_theory="PBE/def2-SVP",
    )
    return trained(TrainingPlan(name=f"{molecule}-{seed}", training=(frames,), config=config), out)


def measured(seed: int, data: Path, out: Path, more: Sequence[str]) -> Rows:
    """Errors of the specialists and of every method before and after the alignment."""
    models = [specialist(molecule, seed, data, out) for molecule in MOLECULES]
    tests = [tests_of(data, molecule) for molecule in MOLECULES]
    inputs = make_merge_inputs(models, device="cpu")
    moved, _ = in_one_order(inputs, lambda fraction, text: None)
    aligned = replace(inputs, specialists=tuple(moved))
    rows: Rows = {}
    for suffix, merge_inputs, methods in (
        ("", inputs, [*PLAIN, *more]),
        (ALIGNED, aligned, [*AFTER, *more]),
    ):
        store = RowStore(out / f"rows{'-aligned' if suffix else ''}", merge_inputs, tests)
        comparison = compare_methods(
            merge_inputs,
            tests,
            methods,
            store=store,
            progress=lambda fraction, text: say(f"{100 * fraction:3.0f} %  {text}"),
        )
        for name, errors in comparison.errors("force_mae").items():
            if name != SPECIALIST or not suffix:
                rows[name + suffix] = [1000 * errors[one] for one in comparison.names]
    return rows


def tests_of(data: Path, molecule: str) -> LabelledSet:
    """Evenly spaced test frames of a molecule."""
    path = data / f"rmd17_{molecule}_test_01.npz"
    frames = read_frames(path)
    chosen = np.linspace(0, len(frames) - 1, N_TEST).round().astype(int)
    return LabelledSet(source=str(path), frames=tuple(frames[i] for i in chosen))


def table(document: dict[str, list[list[float]]]) -> str:
    """Markdown: mean and standard deviation over the seeds of the force MAE on every molecule."""
    lines = [
        "| force MAE in meV/Å | " + " | ".join(MOLECULES) + " |",
        "|---|" + "---:|" * len(MOLECULES),
    ]
    for name, seeds in document.items():
        mean, spread = np.mean(seeds, axis=0), np.std(seeds, axis=0)
        lines.append(
            f"| {name} | "
            + " | ".join(f"{m:.0f} ± {s:.0f}" for m, s in zip(mean, spread, strict=True))
            + " |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
