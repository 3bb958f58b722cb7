"""A dimer that nobody trained on: ethanol and malonaldehyde in contact, judged by the theory the specialists learnt.

    python md_examples/benchmarks/benchmark_mixed_dimer.py --out FOLDER [--json] [--methods M ...]
        [--stage frames|models|dimer|table]

Everything is made on the spot with GFN2-xTB (needs ``tblite``), every file in FOLDER is made once and kept, and a killed
training continues from its last epoch.

* ``frames``: Langevin dynamics at 500 K of acetic acid, acetaldehyde and dimethyl ether (the base's molecules) and of
  ethanol and malonaldehyde (the specialists'), a frame every 10 fs; test frames come from a later stretch.
* ``models``: a PaiNN base (64 channels, 3 blocks), and a specialist fine-tuned from it for either molecule. No training
  frame holds two molecules.
* ``dimer``: dynamics of both molecules together at 300 K from several hydrogen-bonded orientations; frames in contact.
* ``table``: errors of every method on the molecules' own test frames and on the dimer.

Frames, models and dimers take about 40 minutes on one core, the table a few more.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ase import Atoms
from ase.build import molecule
from dimer_accuracy import DimerFrames, dimer_errors, typical_size
from method_table import Column, default_methods, method_results, table
from training_plan import TrainingPlan, model_path, say, trained, write_frames
from xtb_frames import LEVEL_OF_THEORY, dimer_frames, labelled, relaxed, sampled

from ase_gffmerge import ForceField
from ase_gffmerge.data.readers import read_frames
from ase_gffmerge.evaluation.comparison.inputs import make_merge_inputs
from ase_gffmerge.forcefield.force_field import bundled_test_frames
from ase_gffmerge.inference.errors import evaluate
from ase_gffmerge.methods import METHODS, MergeOutput
from ase_gffmerge.training.config import TrainConfig

BASE = "base"
BASE_MOLECULES = {"acetic-acid": "CH3COOH", "acetaldehyde": "CH3CHO", "dimethyl-ether": "CH3OCH3"}
MOLECULES = ("ethanol", "malonaldehyde")
STAGES = ("frames", "models", "dimer", "table")


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much of everything.

    Attributes
    ----------
    base_frames, frames, test_frames
        Frames per molecule of the base, per molecule of the specialists, and to test on.
    interval, dimer_interval
        Steps of 0.5 fs between two frames.
    equilibration
        Steps before a stretch of dynamics is sampled.
    orientations, dimer_frames
        Orientations that the dimer starts from, and frames of each.
    hyper
        Hyper-parameters of the base; default: PaiNN's.
    base_epochs, epochs
        Epochs of the base and of the specialists.
    validation
        Frames per molecule held out for the loss curve.
    """

    base_frames: int = 800
    frames: int = 1000
    test_frames: int = 200
    interval: int = 20
    dimer_interval: int = 200
    equilibration: int = 2000
    orientations: int = 12
    dimer_frames: int = 13
    hyper: Mapping[str, float] = field(default_factory=dict)
    base_epochs: int = 18
    epochs: int = 32
    validation: int = 40


FULL = Size()


def frame_file(out: Path, system: str, part: str) -> Path:
    """File of labelled frames."""
    return out / "frames" / f"{system}-{part}.extxyz"


def starting_geometry(name: str) -> Atoms:
    """A molecule of the base, or of a specialist."""
    return (
        molecule(BASE_MOLECULES[name]) if name in BASE_MOLECULES else bundled_test_frames(f"rmd17-{name}")[0]
    )


def make_frames(out: Path, size: Size) -> None:
    """Sample every molecule: frames to train on, then frames to test on."""
    for seed, name in enumerate((*BASE_MOLECULES, *MOLECULES)):
        parts = {
            "train": size.base_frames if name in BASE_MOLECULES else size.frames,
            "test": size.test_frames,
        }
        if all(frame_file(out, name, part).exists() for part in parts):
            continue
        say(f"sampling {name}")
        atoms = relaxed(starting_geometry(name), steps=200)
        for part, n in parts.items():
            frames = sampled(
                atoms,
                n,
                interval=size.interval,
                temperature=500,
                seed=2 * seed + (part == "test"),
                equilibration=size.equilibration,
            )
            write_frames(frame_file(out, name, part), frames)


def plan(name: str, out: Path, size: Size) -> TrainingPlan:
    """How the base or a specialist is trained."""
    molecules = tuple(BASE_MOLECULES) if name == BASE else (name,)
    common = {"batch_size": 5, "validation": size.validation, "level_of_theory": LEVEL_OF_THEORY}
    return TrainingPlan(
        name=name,
        training=tuple(frame_file(out, molecule, "train") for molecule in molecules),
        test=tuple(frame_file(out, molecule, "test") for molecule in molecules),
        config=TrainConfig(hyper=dict(size.hyper), epochs=size.base_epochs, learning_rate=2e-3, **common)
        if name == BASE
        else TrainConfig(epochs=size.epochs, learning_rate=2e-4, **common),
        parent=None if name == BASE else BASE,
    )


def models(out: Path, size: Size, device: str) -> list[ForceField]:
    """The specialists, trained from their base if they are not there."""
    trained(plan(BASE, out, size), out, device=device)
    return [trained(plan(name, out, size), out, device=device) for name in MOLECULES]


def make_dimers(out: Path, size: Size) -> list[Atoms]:
    """Frames of the dimer, ethanol's atoms first."""
    path = frame_file(out, "dimer", "test")
    if not path.exists():
        say("sampling the dimer")
        first, second = (relaxed(starting_geometry(name), steps=200) for name in MOLECULES)
        frames = dimer_frames(
            first,
            second,
            orientations=size.orientations,
            frames_each=size.dimer_frames,
            interval=size.dimer_interval,
            temperature=300,
            equilibration=size.equilibration // 2,
        )
        write_frames(path, frames)
    return read_frames(path)


def dimer_parts(dimers: list[Atoms], n_first: int) -> DimerFrames:
    """The dimers, and their molecules alone with labels of their own."""
    return DimerFrames(
        dimers=dimers,
        first=[labelled(atoms[:n_first]) for atoms in dimers],
        second=[labelled(atoms[n_first:]) for atoms in dimers],
    )


def measured(merge_output: MergeOutput, tests: list[list[Atoms]], frames: DimerFrames) -> dict[str, Any]:
    """Errors on the molecules' own test frames and, of a single potential, on the dimer."""
    own = [evaluate(merge_output.potential(k), test, specialist=k) for k, test in enumerate(tests)]
    result: dict[str, Any] = {"own": {name: e.to_dict() for name, e in zip(MOLECULES, own)}}
    if len(merge_output.potentials) == 1 and merge_output.potentials[0].hyper.n_embeddings == 1:
        result["dimer"] = dimer_errors(frames.predict(merge_output.potentials[0]), frames.labels())
    return result


def compared(out: Path, specialists: list[ForceField], methods: Sequence[str] | None) -> dict[str, Any]:
    """Errors of the specialists and of all methods."""
    merge_inputs = make_merge_inputs(specialists, base=ForceField.load(model_path(out, BASE)), device="cpu")
    tests = [read_frames(frame_file(out, name, "test")) for name in MOLECULES]
    frames = dimer_parts(read_frames(frame_file(out, "dimer", "test")), len(tests[0][0]))
    results = method_results(
        merge_inputs,
        lambda merge_output: measured(merge_output, tests, frames),
        out / "methods",
        methods=methods or default_methods(merge_inputs),
    )
    apart = frames.without_interaction(*(s.potential for s in merge_inputs.specialists))
    results["specialist"]["dimer"] = dimer_errors(apart, frames.labels())
    return {"n_dimers": len(frames.dimers), "typical": typical_size(frames.labels()), "methods": results}


def columns() -> dict[str, Column]:
    """Columns of the table, in meV and Å."""

    def of_dimer(key: str) -> Column:
        return lambda result: 1000 * result["dimer"][key] if "dimer" in result else None

    def own(name: str) -> Column:
        return lambda result: 1000 * result["own"][name]["force_mae"]

    return {
        **{f"{name} force MAE": own(name) for name in MOLECULES},
        "dimer force MAE": of_dimer("force_mae"),
        "RMSE": of_dimer("force_rmse"),
        "within molecules": of_dimer("molecular_mae"),
        "between": of_dimer("interaction_force_mae"),
        "net force": of_dimer("net_force_mae"),
        "interaction energy MAE": of_dimer("interaction_energy_mae"),
        "bias": of_dimer("interaction_energy_bias"),
    }


def shown(result: dict[str, Any]) -> str:
    """The table in Markdown, with what its columns mean."""
    return "\n".join(
        (
            table(result["methods"], columns()),
            f"\nmeV and Å; {result['n_dimers']} dimers. Labels: "
            + ", ".join(f"{key} {1000 * value:.0f}" for key, value in result["typical"].items()),
            "In the row 'specialist' every molecule is left to its own specialist, as if the other were not there.",
        )
    )


def main() -> None:
    """Do what is missing, then show the table."""
    arguments = parsed()
    make_frames(arguments.out, FULL)
    if arguments.stage == "frames":
        return
    specialists = models(arguments.out, FULL, arguments.device)
    if arguments.stage == "models":
        return
    make_dimers(arguments.out, FULL)
    if arguments.stage == "dimer":
        return
    result = compared(arguments.out, specialists, arguments.methods)
    print(json.dumps(result, indent=1) if arguments.json else shown(result))


def parsed() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of frames, models and results")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--stage", choices=STAGES, help="stop after this stage")
    parser.add_argument("--methods", nargs="+", choices=METHODS, metavar="METHOD")
    parser.add_argument("--device", default="auto", help="where models are trained")
    return parser.parse_args()


if __name__ == "__main__":
    main()
