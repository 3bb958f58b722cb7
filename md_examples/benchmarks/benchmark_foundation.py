"""A foundation model fine-tuned to a crystal and to a molecule, and merged: what is gained, and what is forgotten.

    python md_examples/benchmarks/benchmark_foundation.py chgnet --data RMD17 LIPS20 --out FOLDER [--json] [--rows ROW ...]

MODEL is ``chgnet`` (CHGNet 0.3.0, ``pip install chgnet``) or ``7net-0`` (SevenNet-0, ``pip install sevenn``). RMD17 and
LIPS20 are the folders of the two data sets; of the first, ethanol is used, of the second beta-Li3PS4. Nothing of LiPS20 or
of models trained on it may be passed on (no licence is stated): keep FOLDER to yourself. Models and rows in FOLDER are made
once and kept; a killed run goes on. Every row is made in a process of its own, whose processor time and memory are told.

Errors are against the labels of test frames. What was forgotten is the difference of the forces from those of the
foundation model, on the compounds that a merge with ``keep_base`` is shown, displaced anew (seen), and on others (new).
"""

import argparse
import json
import multiprocessing
import resource
import time
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from foundation_models import (
    CRYSTAL,
    JOINT,
    MOLECULE,
    SIZES,
    SYSTEMS,
    base_model,
    frame_file,
    make_frames,
    specialist,
)
from foundation_probes import contacts, dynamics, forgetting, new_compounds, probe_frames
from method_table import Column, table
from training_plan import model_path, say

from ase_gffmerge import ForceField, merge
from ase_gffmerge.data.readers import read_frames
from ase_gffmerge.errors import MergeWarning
from ase_gffmerge.evaluation.comparison.inputs import make_merge_inputs
from ase_gffmerge.inference.errors import evaluate
from ase_gffmerge.inference.predict import predict_frames
from ase_gffmerge.merging.recipe import MERGE_VERSION, load_recipe
from ase_gffmerge.methods import METHODS
from ase_gffmerge.models import Potential

MERGES: dict[str, Any] = {
    "mean": "mean",
    "paper": "paper",
    "fast": "fast",
    "gffmerge": "gffmerge",
    "fast, keep_base": {"preset": "fast", "keep_base": True},
    "gffmerge, keep_base": {"preset": "gffmerge", "keep_base": True},
    "gffmerge, keep_base 150": {"preset": "gffmerge", "keep_base": 150},
    "gffmerge, keep_base 200": {"preset": "gffmerge", "keep_base": 200},
    "closed-form": "closed-form",
    "closed-form, keep_base": {"preset": "closed-form", "keep_base": True},
}
"""Recipes by row; ``True`` stands for the size's number of structures of the base. Solves alone (``fast``) and the default
hold a plain readout, as the vendors' formats do."""
ARITHMETIC = "task arithmetic"
ROWS = (
    "base",
    *SYSTEMS,
    "mean",
    ARITHMETIC,
    "paper",
    "fast",
    "gffmerge",
    "fast, keep_base",
    "gffmerge, keep_base",
    JOINT,
)
"""What is measured without ``--rows``; the wide readout takes longer."""
EVERY = (*ROWS, *[name for name in MERGES if name not in ROWS])


def made(row: str, model: str, out: Path) -> Potential:
    """The potential of a row."""
    size = SIZES[model]
    if row in ("base", *SYSTEMS, JOINT):
        return (base_model(out, size) if row == "base" else specialist(row, out, size)).potential
    specialists, base = [specialist(name, out, size) for name in SYSTEMS], base_model(out, size)
    if row == ARITHMETIC:
        inputs = make_merge_inputs(specialists, base=base, device="cpu")
        return METHODS["task_arithmetic"].run(inputs, lambda *_: None).potentials[0]
    recipe = MERGES[row]
    if isinstance(recipe, Mapping) and recipe.get("keep_base") is True:
        recipe = {**recipe, "keep_base": size.base_frames}
    path = model_path(out, f"{file_name(row)}-{MERGE_VERSION}")
    if not path.exists() or not is_merge(ForceField.load(path), recipe, specialists):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", MergeWarning)
            merged, _ = merge(
                specialists,
                recipe,
                base=base,
                device="cpu",
                progress=lambda x, what: say(f"{row} {x:4.0%} {what}"),
            )
        merged.save(path)
        cost_file(row, out).unlink(missing_ok=True)
    return ForceField.load(path).potential


def is_merge(found: ForceField, recipe: Any, specialists: Sequence[ForceField]) -> bool:
    """Whether a file holds the merge of these specialists by this recipe."""
    record = found.merged
    return (
        record is not None
        and record.recipe == load_recipe(recipe).model_dump(mode="json")
        and record.fingerprints == tuple(s.fingerprint for s in specialists)
    )


def file_name(row: str) -> str:
    """A row's name without commas and blanks."""
    return row.replace(", ", "-").replace(" ", "-")


def cost_file(row: str, out: Path) -> Path:
    """File that keeps processor time and memory of making a row's potential, which is not made again."""
    return out / "costs" / f"{file_name(row)}.json"


def measured(row: str, model: str, out: Path) -> dict[str, Any]:
    """Everything that the table shows of a row; to be called in a fresh process, for the sake of ``peak_gb``."""
    size = SIZES[model]
    started = time.process_time()
    potential = made(row, model, out)
    cost = cost_file(row, out)
    if not cost.exists():
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        cost.parent.mkdir(parents=True, exist_ok=True)
        cost.write_text(json.dumps({"seconds": time.process_time() - started, "peak_gb": peak}))
    result: dict[str, Any] = json.loads(cost.read_text())
    tests = [read_frames(frame_file(out, system, "test")) for system in SYSTEMS]
    for system, frames in zip(SYSTEMS, tests, strict=True):
        result[system] = evaluate(potential, frames).to_dict()
    base = base_model(out, size)
    for name, frames in probe_frames(base.species, size.base_frames).items():
        result[name] = forgetting(potential, frames, predict_frames(base.potential, frames))
    result["contacts"] = contacts(potential)
    result["dynamics"] = dynamics(potential, tests[0][0], tests[1][0], size.steps)
    return result


def rows(names: list[str], model: str, out: Path) -> dict[str, dict[str, Any]]:
    """Rows that are in the folder, and those that are missing."""
    found: dict[str, dict[str, Any]] = {}
    spawned = multiprocessing.get_context("spawn")
    for name in names:
        path = out / "rows" / f"{file_name(name)}.json"
        identity = {
            "merge_version": MERGE_VERSION if name in MERGES else None,
            "size": repr(SIZES[model]),
            "new": list(new_compounds()),
        }
        if not path.exists() or json.loads(path.read_text())["identity"] != identity:
            say(f"{name} ...")
            with ProcessPoolExecutor(1, mp_context=spawned) as pool:
                row = pool.submit(measured, name, model, out).result()
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"identity": identity, "row": row}, indent=1))
        found[name] = json.loads(path.read_text())["row"]
    return found


def columns(found: Mapping[str, Mapping[str, Any]]) -> dict[str, Column]:
    """Columns of the table; forces in meV/Å."""

    def force(system: str) -> Column:
        return lambda row: 1000 * row[system]["force_mae"]

    def ratio(system: str) -> Column:
        own = found.get(system)
        return lambda row: row[system]["force_mae"] / own[system]["force_mae"] if own else None

    def forgotten(kind: str, what: str) -> Column:
        return lambda row: 1000 * row[kind][what]

    return {
        "crystal": force(CRYSTAL),
        "ratio": ratio(CRYSTAL),
        "molecule": force(MOLECULE),
        "ratio ": ratio(MOLECULE),
        "seen": forgotten("seen", "mean"),
        "seen, median": forgotten("seen", "median"),
        "seen, worst": forgotten("seen", "worst"),
        "new": forgotten("new", "mean"),
        "new, median": forgotten("new", "median"),
        "new, worst": forgotten("new", "worst"),
        "dimers that rise": lambda row: row["contacts"]["dimers_rise"],
        "cells that rise": lambda row: row["contacts"]["cells_rise"],
        "NVT that holds": lambda row: float(np.mean([s is None for s in row["dynamics"].values()])),
        "processor s": lambda row: row["seconds"],
        "peak GB": lambda row: row["peak_gb"],
    }


def main() -> None:
    """Make what is missing, then show the table."""
    options = parsed()
    size, out = SIZES[options.model], options.out
    out.mkdir(parents=True, exist_ok=True)
    make_frames(*options.data, out, size)
    for name in (*SYSTEMS, *([JOINT] if JOINT in options.rows else [])):
        specialist(name, out, size)
    found = rows(options.rows, options.model, out)
    print(json.dumps(found, indent=1) if options.json else table(found, columns(found)))


def parsed() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", choices=SIZES)
    parser.add_argument("--data", nargs=2, type=Path, required=True, metavar=("RMD17", "LIPS20"))
    parser.add_argument("--out", type=Path, required=True, help="folder of frames, models and rows")
    parser.add_argument("--rows", nargs="+", choices=EVERY, default=list(ROWS), metavar="ROW")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
