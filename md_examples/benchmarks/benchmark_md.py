"""Is the dynamics of the merged potential as stable and as true as the specialists'? Side by side, at 500 K.

    python md_examples/benchmarks/benchmark_md.py [DATA_FOLDER] [--json] [--ps 20 --seeds 5 --temperature 500] [--out FOLDER]
        [--recipe RECIPE] [--stage own]

For ethanol and malonaldehyde: the bundled specialist and the merge of both, from the same structures with the same seeds.
First the merge's own short trajectories (eight replicas of 1 ps per molecule): how far it disagrees there with the
specialist, beside the specialist's error on test frames. Then NVT (Langevin) of ``--ps`` each, and NVE of half that time;
float32 networks. Reference of the distances of atoms are the bundled test frames, or all frames of
``rmd17_<molecule>_test_01.npz`` in DATA_FOLDER. The full length takes half an hour on one core; interrupted, it goes on
from the finished batches in FOLDER.
"""

import argparse
import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from ase import Atoms

from ase_gffmerge import ForceField, GFFMergeCalculator
from ase_gffmerge.data.readers import read_frames
from ase_gffmerge.errors import MergeWarning
from ase_gffmerge.evaluation.md.evaluate import MDEvaluation, evaluate_dynamics
from ase_gffmerge.evaluation.md.report import dynamics_table, plot_dynamics
from ase_gffmerge.evaluation.md.runs import Contestant, Protocol
from ase_gffmerge.forcefield.force_field import bundled_test_frames
from ase_gffmerge.inference.errors import evaluate
from ase_gffmerge.merging.recipe import TrajectoryOptions
from ase_gffmerge.workflows.active_learning import run_rollouts

MOLECULES = ("ethanol", "malonaldehyde")
NAMES = tuple(f"rmd17-{molecule}" for molecule in MOLECULES)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def reference_frames(molecule: str, data: Path | None) -> list[Atoms]:
    """Labelled test frames."""
    if data is None:
        return bundled_test_frames(f"rmd17-{molecule}")
    return read_frames(data / f"rmd17_{molecule}_test_01.npz")


def own_trajectories(
    merged: ForceField,
    specialists: Sequence[ForceField],
    tests: Sequence[Sequence[Atoms]],
    options: TrajectoryOptions,
) -> dict[str, Any]:
    """Force MAE (eV/Å) of the merged potential against each specialist where it went, and of both on labelled frames."""
    found = {}
    for specialist, test, own in zip(
        specialists, tests, run_rollouts(merged, specialists, options, seed=1), strict=True
    ):
        found[specialist.name] = {
            **own.to_dict(),
            "specialist_on_tests": evaluate(specialist.potential, test).force_mae,
            "merged_on_tests": evaluate(merged.potential, test).force_mae,
        }
        say(f"{specialist.name}: on its own trajectories {found[specialist.name]}")
    return found


def compare_dynamics(
    molecule: str, merged: ForceField, *, protocol: Protocol, data: Path | None, out: Path
) -> MDEvaluation:
    """Specialist and merged potential on one molecule."""
    frames = bundled_test_frames(f"rmd17-{molecule}")
    reference = reference_frames(molecule, data)
    specialist = ForceField.load(f"rmd17-{molecule}", dtype=torch.float32)
    models = [
        Contestant(label="specialist", force_field=specialist),
        Contestant(label="merged", force_field=merged),
    ]
    told = [0]

    def progress(fraction: float, text: str) -> None:
        if int(20 * fraction) > told[0]:
            told[0] = int(20 * fraction)
            say(f"{molecule} {100 * fraction:3.0f} %  {text}")

    return evaluate_dynamics(
        models,
        frames,
        protocol=protocol,
        reference=reference,
        errors={m.label: evaluate(m.force_field.potential, reference) for m in models},
        folder=out / "runs",
        progress=progress,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, nargs="?")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--ps", type=float, default=20.0)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--temperature", type=float, default=500.0)
    parser.add_argument("--out", type=Path, default=Path("benchmark-md"))
    parser.add_argument("--recipe", default="gffmerge", help="a recipe's name or file")
    parser.add_argument("--stage", choices=["own"], help="stop after the merge's own short trajectories")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", MergeWarning)
    protocol = Protocol(temperature=arguments.temperature, picoseconds=arguments.ps, seeds=arguments.seeds)
    merged = GFFMergeCalculator(NAMES, recipe=arguments.recipe, device="cpu", dtype="float32").force_field
    specialists = [ForceField.load(name, dtype=torch.float32) for name in NAMES]
    tests = [reference_frames(molecule, arguments.data) for molecule in MOLECULES]
    result: dict[str, Any] = {
        "own_trajectories": own_trajectories(
            merged, specialists, tests, TrajectoryOptions(temperature=arguments.temperature)
        )
    }
    for molecule in MOLECULES if arguments.stage is None else ():
        evaluation = compare_dynamics(
            molecule, merged, protocol=protocol, data=arguments.data, out=arguments.out
        )
        say(dynamics_table(evaluation).to_text())
        plot_dynamics(evaluation, arguments.out / f"{molecule}.png")
        result[molecule] = evaluation.to_dict()
    if arguments.json:
        print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
