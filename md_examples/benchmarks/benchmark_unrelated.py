"""What aligning channels brings before force fields of independent initialisations are merged.

    python md_examples/benchmarks/benchmark_unrelated.py DATA --out FOLDER [--size large] [--seeds N] [--methods M ...]

DATA holds the rMD17 files of ethanol and malonaldehyde. For every seed two PaiNNs are trained, one on each molecule, from
initialisations of their own, and merged as they are and after their channels were brought into one order by their
activations (Git Re-Basin), which changes nothing of what they compute. Models and rows are kept in FOLDER.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
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
N_VALIDATION, N_TEST = 50, 100


@dataclass(frozen=True, kw_only=True)
class Size:
    """Of a PaiNN and its training: frames, epochs, and where models and rows lie in the folder."""

    channels: int
    n_blocks: int
    n_train: int
    epochs: int
    folder: str = ""


SIZES = {
    "small": Size(channels=32, n_blocks=2, n_train=200, epochs=30),
    "large": Size(channels=64, n_blocks=3, n_train=900, epochs=60, folder="large"),
}

Rows = dict[str, list[float]]
"""Force MAE in meV/Å on every molecule, by method."""


def main() -> None:
    """Train, merge, measure, print."""
    options = arguments()
    torch.set_num_threads(1)
    size = SIZES[options.size]
    out = options.out / size.folder
    out.mkdir(parents=True, exist_ok=True)
    found = [measured(seed, size, options.data, out, options.methods) for seed in range(options.seeds)]
    document = {name: [rows[name] for rows in found] for name in found[0] if all(name in r for r in found)}
    (out / "unrelated.json").write_text(json.dumps(document, indent=1))
    print(json.dumps(document, indent=1) if options.json else table(document))


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path, help="folder of the rMD17 files of split 01")
    parser.add_argument("--out", type=Path, required=True, help="folder for models and rows")
    parser.add_argument("--size", choices=SIZES, default="small", help="of the networks [default: small]")
    parser.add_argument("--seeds", type=int, default=3, help="pairs of initialisations [default: 3]")
    parser.add_argument("--methods", nargs="+", help="also these, before and after the alignment", default=[])
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    return parser.parse_args()


def specialist(molecule: str, seed: int, size: Size, data: Path, out: Path) -> ForceField:
    """A PaiNN with an initialisation of its own."""
    frames = out / f"{molecule}.xyz"
    if not frames.exists():
        write_frames(
            frames, read_frames(data / f"rmd17_{molecule}_train_01.npz")[: size.n_train + N_VALIDATION]
        )
    config = TrainConfig(
        epochs=size.epochs,
        validation=N_VALIDATION,
        seed=2 * seed + MOLECULES.index(molecule),
        hyper={"channels": size.channels, "n_blocks": size.n_blocks, "norm_offset": 1e-3},
        level_of_theory="PBE/def2-SVP",
    )
    return trained(TrainingPlan(name=f"{molecule}-{seed}", training=(frames,), config=config), out)


def measured(seed: int, size: Size, data: Path, out: Path, more: Sequence[str]) -> Rows:
    """Errors of the specialists and of every method before and after the alignment."""
    models = [specialist(molecule, seed, size, data, out) for molecule in MOLECULES]
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
