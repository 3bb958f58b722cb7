"""CHGNet fine-tuned to beta- and gamma-Li3PS4 (LiPS20), merged, and compared with joint fine-tuning.

    python md_examples/benchmarks/benchmark_chgnet.py DATA --out FOLDER [--json] [--stage models|table|distill|speed|md]

DATA holds LiPS20's ``<system>.npz``. Nothing of the data or of the models trained on it may be passed on (no licence is
stated): keep FOLDER to yourself. Needs ``pip install chgnet`` for the pretrained weights. Every model in FOLDER is made
once and kept, and a killed training continues. Fine-tuning takes about fifty minutes on one core, everything else as much.

Frames are split by blocks of time as in ``benchmark_lips20.py``; errors are measured on the test blocks. Times are
processor seconds of one run.
"""

import argparse
import json
import time
import warnings
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
from ase import units
from ase.io import read
from ase.md import thermalize_momenta
from ase.md.verlet import VelocityVerlet
from benchmark_lips20 import columns, measured, rounded, test_frames
from chgnet_models import BASE, FINE_TUNING, JOINT, models, plan
from crystal_dynamics import side_by_side
from lips20_models import SYSTEMS, frame_file, make_frames
from method_table import method_results, table
from reference_recipe import reference_recipe
from training_plan import model_path, say

from ase_gffmerge import ForceField, GFFMergeCalculator, merge
from ase_gffmerge.data.readers import read_frames
from ase_gffmerge.errors import MergeWarning
from ase_gffmerge.evaluation.comparison.inputs import make_merge_inputs
from ase_gffmerge.integrations.load import export
from ase_gffmerge.merging.recipe import MERGE_VERSION, DistillOptions, Recipe
from ase_gffmerge.methods import MergeOutput
from ase_gffmerge.models import Potential
from ase_gffmerge.training.config import TrainConfig
from ase_gffmerge.training.train import train_jointly

STAGES = ("models", "table", "distill", "speed", "md")
METHODS = ("mean", "task_arithmetic", "paper")
MERGES: dict[str, Any] = {
    "closed form, plain readout": {"preset": "closed-form", "readout": None},
    "closed-form": "closed-form",
    "gffmerge": "gffmerge",
}
"""Recipes: solves with the plain readout, which CHGNet's own format can hold, with the wide one, and the default."""
DISTILLATION = DistillOptions(epochs=1, batch_size=2, copies=0, learning_rate=5e-4, stress_weight=20.0)
"""Short: once over the calibration frames and their displaced twins."""
TIMED_FRAMES = 8
"""Frames per crystal of what is timed: joint training, to tell what all frames take, and statistics and solves."""


def errors(potential: Potential, out: Path) -> dict[str, Any]:
    """Errors on the test frames of both crystals."""
    tests = [test_frames(out, system) for system in SYSTEMS]
    return measured(MergeOutput(potentials=(potential,)), tests)


def compared(out: Path, specialists: list[ForceField], joint: ForceField) -> dict[str, Any]:
    """Errors of specialists, base, joint fine-tuning, and of the methods that need no training."""
    base = ForceField.load(model_path(out, BASE))
    merge_inputs = make_merge_inputs(specialists, base=base, device="cpu")
    tests = [test_frames(out, system) for system in SYSTEMS]
    rows = method_results(
        merge_inputs, lambda merge_output: measured(merge_output, tests), out / "methods", methods=METHODS
    )
    for name in MERGES:
        merged, seconds = merged_once(out, specialists, name)
        rows[name] = {**errors(merged.potential, out), "seconds": seconds}
    return {"base": errors(base.potential, out), **rows, "joint": errors(joint.potential, out)}


def joint_seconds(out: Path) -> float:
    """Processor seconds of the whole joint fine-tuning, from one epoch over a few frames."""
    labelled = [read_frames(frame_file(out, system, "train"))[:TIMED_FRAMES] for system in SYSTEMS]
    config = plan(JOINT, out, FINE_TUNING).config
    short = TrainConfig(**{**config.model_dump(), "epochs": 1, "validation": 0})
    started = time.process_time()
    train_jointly(ForceField.load(model_path(out, BASE)), labelled, short, device="cpu")
    per_frame = (time.process_time() - started) / (len(SYSTEMS) * TIMED_FRAMES)
    return per_frame * len(SYSTEMS) * FINE_TUNING.frames * config.epochs


def distilled(out: Path, specialists: list[ForceField]) -> dict[str, Any]:
    """Errors of the label-free distillation, its processor seconds and those of joint fine-tuning."""
    path, record = model_path(out, "distilled"), out / "distilled.json"
    if not record.exists():
        recipe = Recipe(refine=DISTILLATION, messages=False)  # whose correction held-out frames refuse here
        started = time.process_time()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", MergeWarning)
            merged, _ = merge(
                specialists, recipe, device="cpu", progress=lambda x, what: say(f"{x:4.0%} {what}")
            )
        seconds = time.process_time() - started
        merged.save(path)
        result = {**errors(merged.potential, out), "seconds": seconds, "joint_seconds": joint_seconds(out)}
        record.write_text(json.dumps(result))
    found: dict[str, Any] = json.loads(record.read_text())
    return found


def speed(out: Path, specialists: list[ForceField], *, rounds: int = 5, steps: int = 4) -> dict[str, float]:
    """Seconds per step of dynamics, by CHGNet's own calculator and by ours in turns, and of statistics and solves."""
    from chgnet.model import CHGNetCalculator

    vendor_file = export(specialists[0], out / "beta.pth.tar")
    with redirect_stdout(StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        calculators = {
            "chgnet": CHGNetCalculator.from_file(str(vendor_file), use_device="cpu"),
            "ours": GFFMergeCalculator(specialists[0], device="cpu"),
            "merged": GFFMergeCalculator(merged_once(out, specialists, "gffmerge")[0], device="cpu"),
        }
    start = read(frame_file(out, SYSTEMS[0], "test"), index=0)
    seconds: dict[str, list[float]] = {name: [] for name in calculators}
    runs = {name: _run(start, calculator) for name, calculator in calculators.items()}
    for _ in range(rounds):
        for name, run in runs.items():
            started = time.process_time()
            run.run(steps)
            seconds[name].append((time.process_time() - started) / steps)
    medians = {f"{name}_s_per_step": float(np.median(found)) for name, found in seconds.items()}
    few = [
        replace(specialist, calibration=specialist.calibration[:TIMED_FRAMES]) for specialist in specialists
    ]
    _, reference = reference_recipe(few)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MergeWarning)
        _, report = merge(few, "paper", device="cpu")
    return {**medians, "reference_recipe_s": reference, "paper_preset_s": report.seconds["layers"]}


def _run(start: Any, calculator: Any) -> VelocityVerlet:
    atoms = start.copy()
    atoms.calc = calculator
    thermalize_momenta(atoms, 600, rng=np.random.default_rng(0))
    run = VelocityVerlet(atoms, timestep=1.0 * units.fs)
    run.run(1)
    return run


def merged_once(out: Path, specialists: list[ForceField], name: str) -> tuple[ForceField, float]:
    """One of the merges, made once, and its processor seconds."""
    path = model_path(out, f"{name.replace(' ', '-')}-{MERGE_VERSION}")
    record = path.with_suffix(".json")
    if not record.exists():
        say(f"{name} ...")
        started = time.process_time()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", MergeWarning)
            merged, _ = merge(specialists, MERGES[name], device="cpu")
        seconds = time.process_time() - started
        merged.save(path)
        record.write_text(json.dumps({"seconds": seconds}))
    return ForceField.load(path), json.loads(record.read_text())["seconds"]


def dynamics(
    out: Path, specialists: Sequence[ForceField], merged: ForceField, *, steps: int
) -> dict[str, Any]:
    """Runs of both crystals with specialist and merged potential, from their first test frame."""
    result = {}
    for system, specialist in zip(SYSTEMS, specialists, strict=True):
        say(f"dynamics of {system}")
        start = test_frames(out, system)[0]
        result[system] = side_by_side(
            start, specialist=specialist.potential, merged=merged.potential, steps=steps
        )
    return result


def shown(result: dict[str, Any]) -> str:
    """Everything that was measured, in Markdown."""
    lines = []
    if "table" in result:
        rows = result["table"] | ({"distill": result["distill"]} if "distill" in result else {})
        lines += [table(rows, columns()), "", "forces meV/Å, energy meV/atom, stress GPa"]
    lines += [f"* {name}: {rounded(result[name])}" for name in ("speed", "dynamics") if name in result]
    return "\n".join(lines)


def main() -> None:
    """Do what is missing, then show the table."""
    arguments = parsed()
    out = arguments.out
    make_frames(arguments.data, out, FINE_TUNING)
    specialists, joint = models(out, FINE_TUNING, "cpu")
    stages = STAGES[: STAGES.index(arguments.stage) + 1] if arguments.stage else STAGES
    result: dict[str, Any] = {}
    if "table" in stages:
        result["table"] = compared(out, specialists, joint)
    if "distill" in stages:
        result["distill"] = distilled(out, specialists)
    if "speed" in stages:
        result["speed"] = speed(out, specialists)
    if "md" in stages:
        result["dynamics"] = dynamics(
            out, specialists, merged_once(out, specialists, "gffmerge")[0], steps=arguments.steps
        )
    print(json.dumps(result, indent=1) if arguments.json else shown(result))


def parsed() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="folder of LiPS20's npz files")
    parser.add_argument("--out", type=Path, required=True, help="folder of frames, models and results")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--stage", choices=STAGES, help="stop after this stage")
    parser.add_argument("--steps", type=int, default=500, help="length of the runs of dynamics")
    return parser.parse_args()


if __name__ == "__main__":
    main()
