"""Crystals: specialists for beta- and gamma-Li3PS4 from a base of Li7P3S11 and Li4P2S6, merged and compared.

    python md_examples/benchmarks/benchmark_lips20.py DATA --out FOLDER [--json] [--stage models|virials|table|md] [--small]

DATA holds LiPS20's ``<system>.npz``. Nothing of the data or of the models trained on it may be passed on (no licence is
stated): keep FOLDER to yourself. Every model in FOLDER is trained once and kept, and a killed training continues.

The frames are one trajectory per system, and neighbours in time are alike: they are split into blocks of time with a gap
(:func:`ase_gffmerge.data.frames.time_block_split`); training and calibration frames come from the training blocks, and all
errors are measured on the test blocks.

On CUDA, models are PaiNN with 64 channels, 3 blocks and 5 Å, on all frames of the training blocks. On a CPU, or with
``--small``, they have 32 channels, 3 blocks and 4.5 Å and see 200 frames per system (about 40 minutes on one core).

The base learns energies and forces alone, so that its stress tests the virial labels (stage ``virials``); the
specialists learn the stress as well. What the small base says, on the test blocks of all four systems: from frame to
frame, labels follow -dE/d(strain) of the model with correlations of 0.95 to 0.99 and slopes of 0.98 to 1.05. So sign
(W = -dE/d(strain), ASE's stress is -W/V) and unit (eV) are right as :mod:`ase_gffmerge.data.formats` reads them. What the
model leaves of the labels does not follow the momenta (slopes below 0.1, not 1; velocities from frames that are one step
apart, at 1600 to 1800 K): the labels hold no kinetic part. The means differ by 2 to 3 GPa, which a model of short range
that saw no stress cannot know.
"""

import argparse
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ase import Atoms, units
from crystal_dynamics import side_by_side
from lips20_models import BASE, BASE_SYSTEMS, FULL, SMALL, SYSTEMS, frame_file, make_frames, models
from method_table import Column, default_methods, method_results, table
from stress_accuracy import kinetic_check, stress_mae, virial_check
from training_plan import model_path, say

from ase_gffmerge import ForceField, merge
from ase_gffmerge.data.readers import read_frames
from ase_gffmerge.errors import MergeWarning
from ase_gffmerge.evaluation.comparison.inputs import make_merge_inputs
from ase_gffmerge.inference.errors import evaluate
from ase_gffmerge.methods import METHODS, MergeOutput
from ase_gffmerge.runtime.devices import resolve_device

STAGES = ("models", "virials", "table", "md")
AIMD_TIMESTEP = 0.5
"""fs, of the trajectories that the frames were drawn from."""
N_PAIRS = 120
"""Pairs of frames one step apart that the virials' kinetic part is looked for in."""


def measured(merge_output: MergeOutput, tests: Sequence[Sequence[Atoms]]) -> dict[str, Any]:
    """Errors on the test frames of every crystal: forces, energy per atom, and stress (eV/Å^3)."""
    return {
        name: {
            **evaluate(merge_output.potential(k), test, specialist=k).to_dict(),
            "stress_mae": stress_mae(merge_output.potential(k), test, specialist=k),
        }
        for k, (name, test) in enumerate(zip(SYSTEMS, tests, strict=True))
    }


def test_frames(out: Path, system: str) -> list[Atoms]:
    """Frames of the test blocks."""
    return read_frames(frame_file(out, system, "test"))


def compared(
    out: Path, specialists: list[ForceField], methods: Sequence[str] | None, device: str
) -> dict[str, Any]:
    """Errors of the specialists and of all methods, and where the default merge spends its time."""
    merge_inputs = make_merge_inputs(specialists, base=ForceField.load(model_path(out, BASE)), device=device)
    tests = [test_frames(out, name) for name in SYSTEMS]
    results = method_results(
        merge_inputs,
        lambda merge_output: measured(merge_output, tests),
        out / "methods",
        methods=methods or default_methods(merge_inputs),
    )
    return {"methods": results, "phases": merge_phases(merged(out, specialists, device))}


def merged(out: Path, specialists: list[ForceField], device: str) -> ForceField:
    """The default merge, made once."""
    path = model_path(out, "merged")
    if path.exists():
        old = ForceField.load(path)
        if old.merged and set(old.merged.fingerprints) == {s.fingerprint for s in specialists}:
            return old
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MergeWarning)
        new, _ = merge(specialists, device=device)
    new.save(path)
    return new


def merge_phases(specialist: ForceField) -> dict[str, float]:
    """Seconds of every phase of a merge."""
    assert specialist.merged is not None
    return dict(specialist.merged.report["seconds"])


def dynamics(
    data: Path, out: Path, specialists: list[ForceField], device: str, *, steps: int
) -> dict[str, Any]:
    """Runs of every crystal with its specialist and with the merged potential, from its first frame."""
    target = resolve_device(device)
    shared = merged(out, specialists, device).potential.to(device=target)
    result: dict[str, Any] = {}
    for system, specialist in zip(SYSTEMS, specialists, strict=True):
        say(f"dynamics of {system}")
        start = read_frames(data / f"{system}.npz", index="0")[0]
        own = specialist.potential.to(device=target)
        result[system] = side_by_side(start, specialist=own, merged=shared, steps=steps)
    return result


def columns() -> dict[str, Column]:
    """Columns of the table."""

    def column(system: str, key: str, unit: float) -> Column:
        return lambda result: unit * result[system][key]

    keys = {
        "force MAE": ("force_mae", 1000),
        "RMSE": ("force_rmse", 1000),
        "energy": ("energy_mae", 1000),
        "stress": ("stress_mae", 1 / units.GPa),
    }
    every = {
        f"{system.split('-')[0]} {title}": column(system, *key)
        for system in SYSTEMS
        for title, key in keys.items()
    }
    return {**every, "seconds": lambda result: result.get("seconds")}


def shown(result: dict[str, Any]) -> str:
    """Everything that was measured, in Markdown."""
    lines = ["Virials: labels against the base, which never saw one"]
    lines += [f"* {system}: {rounded(check)}" for system, check in result["virials"].items()]
    lines += ["", "What the base leaves of the labels against the momenta"]
    lines += [f"* {system}: {rounded(check)}" for system, check in result["momenta"].items()]
    if "table" in result:
        phases = rounded(result["table"]["phases"])
        lines += [
            "",
            table(result["table"]["methods"], columns()),
            "",
            "forces meV/Å, energy meV/atom, stress GPa",
        ]
        lines += [f"the default merge spends seconds on: {phases}"]
    for crystal, runs in result.get("dynamics", {}).items():
        lines += [f"* {crystal}, {temperature}: {rounded(run)}" for temperature, run in runs.items()]
    return "\n".join(lines)


def rounded(value: Any) -> Any:
    """Nested numbers with three digits, for reading."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return float(f"{value:.3g}") if isinstance(value, float) else value


def main() -> None:
    """Do what is missing, then show the table."""
    arguments = parsed()
    out, device = arguments.out, arguments.device
    size = SMALL if arguments.small or resolve_device(device).type == "cpu" else FULL
    make_frames(arguments.data, out, size)
    specialists = models(out, size, device)
    base = ForceField.load(model_path(out, BASE)).potential
    stages = STAGES[: STAGES.index(arguments.stage) + 1] if arguments.stage else STAGES
    result: dict[str, Any] = {"hyper": size.hyper}
    if "virials" in stages:
        result["virials"] = {
            system: virial_check(base, test_frames(out, system)) for system in (*BASE_SYSTEMS, *SYSTEMS)
        }
        result["momenta"] = {
            system: kinetic_check(
                base, read_frames(arguments.data / f"{system}.npz"), timestep=AIMD_TIMESTEP, n=N_PAIRS
            )
            for system in SYSTEMS
        }
    if "table" in stages:
        result["table"] = compared(out, specialists, arguments.methods, device)
    if "md" in stages:
        result["dynamics"] = dynamics(arguments.data, out, specialists, device, steps=size.steps)
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
    parser.add_argument("--methods", nargs="+", choices=METHODS, metavar="METHOD")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--small", action="store_true", help="the small models, also on CUDA")
    return parser.parse_args()


if __name__ == "__main__":
    main()
