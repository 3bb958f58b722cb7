"""Measure what the README claims: errors of the merge on all rMD17 test frames, seconds, and stable dynamics.

    python md_examples/benchmarks/benchmark_merge.py DATA_FOLDER [--json] [--md] [--nequip FOLDER] [--no-painn]

DATA_FOLDER holds the rMD17 files ``rmd17_<molecule>_{train,test}_01.npz``. Without ``--md`` and ``--nequip`` it takes about
five minutes on two cores; ``--md`` adds 10 ps of NVE (float64) and five times 10 ps of NVT at 500 K per molecule (about
20 minutes); ``--nequip`` trains a small NequIP base and two specialists in FOLDER (resumable) and compares merges of them,
``--no-painn`` leaves the bundled PaiNN pair out.
"""

import argparse
import json
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from ase import Atoms
from training_plan import TrainingPlan, say, trained

from ase_gffmerge import ForceField, GFFMergeCalculator, merge
from ase_gffmerge.data.readers import read_frames
from ase_gffmerge.dynamics.ase_md import run_md
from ase_gffmerge.dynamics.integrators import Conditions
from ase_gffmerge.errors import MergeWarning
from ase_gffmerge.inference.errors import evaluate
from ase_gffmerge.merging.recipe import load_recipe
from ase_gffmerge.training.config import TrainConfig

MOLECULES = ("ethanol", "malonaldehyde")
NAMES = tuple(f"rmd17-{molecule}" for molecule in MOLECULES)
RECIPES = ("mean", "paper", "fast", "closed-form", "gffmerge")
NEQUIP = {"channels": 32, "tensor_channels": 16, "n_blocks": 2, "l_max": 1, "cutoff": 4.0}


def force_maes(specialists: list[ForceField], tests: list[list[Atoms]]) -> dict[str, Any]:
    """Force MAE (eV/Å) and energy MAE (eV/atom) of specialists and merges, and seconds of every merge."""
    names = [specialist.name for specialist in specialists]
    result: dict[str, Any] = {"force_mae": {}, "energy_mae": {}, "merge_seconds": {}, "phases": {}}

    def add(label: str, potentials: list[Any]) -> None:
        errors = [evaluate(p, test, specialist=k) for k, (p, test) in enumerate(zip(potentials, tests))]
        result["force_mae"][label] = {name: e.force_mae for name, e in zip(names, errors)}
        result["energy_mae"][label] = {name: e.energy_mae for name, e in zip(names, errors)}
        say(f"{label:10s} " + "  ".join(f"{n} {1000 * e.force_mae:.1f} meV/Å" for n, e in zip(names, errors)))

    add("specialist", [specialist.potential for specialist in specialists])
    result["merge_processor_seconds"] = {}
    for recipe in RECIPES:
        start, busy = time.perf_counter(), time.process_time()
        merged, report = merge(specialists, recipe, device="cpu")
        result["merge_seconds"][recipe] = time.perf_counter() - start
        result["merge_processor_seconds"][recipe] = time.process_time() - busy
        result["phases"][recipe] = dict(report.seconds)
        add(recipe, [merged.potential] * len(names))
    return result


def cache_seconds() -> dict[str, float]:
    """Seconds to build the calculator without and with a cached merge, imports excluded."""
    with tempfile.TemporaryDirectory() as folder:
        times = []
        for _ in range(2):
            start = time.perf_counter()
            GFFMergeCalculator(NAMES, cache_dir=folder, device="cpu")
            times.append(time.perf_counter() - start)
    return {"miss": times[0], "hit": times[1]}


def evaluation_cost(test: list[Atoms]) -> dict[str, float]:
    """Milliseconds per calculator call for ethanol, specialist and merged in turn, and their ratio (medians)."""
    calculators = {
        "specialist": GFFMergeCalculator(NAMES[0], device="cpu"),
        "merged": GFFMergeCalculator(NAMES, device="cpu"),
    }
    times: dict[str, list[float]] = {name: [] for name in calculators}
    for frame in test[:200]:
        for name, calculator in calculators.items():
            start = time.perf_counter()
            calculator.calculate(frame.copy())
            times[name].append(1000 * (time.perf_counter() - start))
    median = {name: statistics.median(values[20:]) for name, values in times.items()}
    return {**median, "ratio": median["merged"] / median["specialist"]}


def per_specialist(name: str, specialists: list[ForceField], tests: list[list[Atoms]]) -> dict[str, float]:
    """Force MAE (eV/Å) of a recipe with per-specialist conditioning."""
    recipe = load_recipe(name, conditioning="per-specialist")
    merged, _ = merge(specialists, recipe, device="cpu")
    return {
        s.name: evaluate(merged.potential, test, specialist=k).force_mae
        for k, (s, test) in enumerate(zip(specialists, tests))
    }


def dynamics(tests: list[list[Atoms]]) -> dict[str, Any]:
    """NVE of 10 ps in float64 at 300 K, and five NVT runs of 10 ps at 500 K, with the merged potential."""
    result: dict[str, Any] = {"nve": {}, "nvt": {}}
    for name, test in zip(NAMES, tests):
        atoms = test[0].copy()
        atoms.calc = GFFMergeCalculator(NAMES, dtype="float64", device="cpu")
        run = run_md(atoms, Conditions(ensemble="nve", temperature=300, timestep=0.5), steps=20_000)
        result["nve"][name] = {
            "drift_per_atom": run.drift_per_atom,
            "slope_per_atom_per_ps": run.drift_slope_per_atom,
            "broken_bonds": len(run.broken_bonds),
            "steps_per_second": run.steps_per_second,
        }
        say(f"NVE {name}: {result['nve'][name]}")
        result["nvt"][name] = []
        for seed in range(5):
            atoms = test[0].copy()
            atoms.calc = GFFMergeCalculator(NAMES, device="cpu")
            run = run_md(
                atoms, Conditions(ensemble="nvt", temperature=500, timestep=0.5), steps=20_000, seed=seed
            )
            held = {"broken_bonds": len(run.broken_bonds), "mean_temperature": run.mean_temperature}
            result["nvt"][name].append(held)
            say(f"NVT {name} seed {seed}: {held}")
    return result


def painn_pair(tests: list[list[Atoms]]) -> dict[str, Any]:
    """Errors of the bundled pair, seconds to build the calculator, and cost per call."""
    specialists = [ForceField.load(name) for name in NAMES]
    found = force_maes(specialists, tests)
    for name in ("paper", "gffmerge"):
        found["force_mae"][f"{name}, per-specialist"] = per_specialist(name, specialists, tests)
    return {
        "painn": found,
        "calculator_seconds": cache_seconds(),
        "milliseconds_per_call": evaluation_cost(tests[0]),
    }


def nequip_pair(data: Path, folder: Path) -> list[ForceField]:
    """Train (or load) a small NequIP base and its two specialists, on the reference energies of the bundled base."""
    bundled = ForceField.load("rmd17-base")
    references = dict(zip(bundled.species, bundled.potential.references.tolist()))

    def plan(
        name: str, molecules: tuple[str, ...], options: dict[str, Any], parent: str | None = None
    ) -> TrainingPlan:
        return TrainingPlan(
            name=name,
            training=tuple(data / f"rmd17_{molecule}_train_01.npz" for molecule in molecules),
            config=TrainConfig(batch_size=5, level_of_theory="PBE/def2-SVP", **options),
            parent=parent,
            references=references,
        )

    base = {"model": "nequip", "hyper": NEQUIP, "epochs": 14, "learning_rate": 1e-2}
    trained(plan("nequip-base", ("toluene", "uracil", "salicylic"), base), folder, device="cpu")
    tuned = {"epochs": 30, "learning_rate": 2e-3}
    return [
        trained(plan(f"nequip-{molecule}", (molecule,), tuned, "nequip-base"), folder, device="cpu")
        for molecule in MOLECULES
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--md", action="store_true")
    parser.add_argument("--nequip", type=Path)
    parser.add_argument("--no-painn", action="store_true")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", MergeWarning)
    tests = [read_frames(arguments.data / f"rmd17_{molecule}_test_01.npz") for molecule in MOLECULES]
    result: dict[str, Any] = {"threads": torch.get_num_threads(), "torch": torch.__version__}
    if not arguments.no_painn:
        result |= painn_pair(tests)
    if arguments.nequip:
        result["nequip"] = force_maes(nequip_pair(arguments.data, arguments.nequip), tests)
    if arguments.md:
        result["dynamics"] = dynamics(tests)
    if arguments.json:
        print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
