"""The paper's table in form: M3GNet on Li7P3S11 and Li4P2S6, fine-tuned to beta- and gamma-Li3PS4, merged by every method.

    python md_examples/benchmarks/paper_table.py DATA --out FOLDER [--json] [--methods NAME ...] [--full]

DATA holds LiPS20's ``<system>.npz``. Nothing of the data or of the models trained on it may be passed on (no licence is
stated): keep FOLDER to yourself. Every model and every result in FOLDER is kept, and a killed run continues.

The setting is that of arXiv 2606.03232's solids: an M3GNet base, specialists that descend from it, energies to forces 1:10
in the loss, learning rate 1e-3, least squares with a ridge of 1e-6, embeddings averaged (row ``paper``) or switched at
evaluation (``paper, switched``). The authors train on 1250 frames per system for 75 epochs; ``--full`` does, as far as there
are frames. The default is what one core does in 20 minutes: a small M3GNet on few frames for few epochs. Frames are split by
blocks of time, as in ``benchmark_lips20.py``, and errors are those of frames that no model and no merge has seen.

``base`` is the common ancestor; ``specialist`` is each specialist on its own crystal, which no merge can be expected to
beat.
"""

import argparse
import json
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ase import Atoms
from lips20_models import BASE_SYSTEMS, SPECIES, SYSTEMS, THEORY, Size, frame_file, make_frames
from method_table import Column, Results, default_methods, method_results, table
from training_plan import TrainingPlan, trained

from ase_gffmerge import ForceField, merge
from ase_gffmerge.data.readers import read_frames
from ase_gffmerge.errors import MergeWarning
from ase_gffmerge.evaluation.comparison.inputs import make_merge_inputs
from ase_gffmerge.inference.errors import evaluate
from ase_gffmerge.methods import METHODS, MergeOutput
from ase_gffmerge.training.config import TrainConfig
from ase_gffmerge.training.initialization import fit_references

BASE = "m3gnet-base"
OF_CHANNELS = ("git_rebasin", "procrustes")
"""Methods that permute or turn channels, which nobody has declared for M3GNet."""


@dataclass(frozen=True, kw_only=True)
class PaperSize(Size):
    """How much of everything, and the learning rate of base and specialists."""

    learning_rate: float = 1e-3
    hyper: dict[str, float] = field(default_factory=dict)


FULL = PaperSize(frames=1250, base_epochs=75, epochs=75, batch_size=4)
"""The authors' numbers, as far as there are frames."""
SMALL = PaperSize(
    hyper={
        "channels": 24,
        "edge_channels": 24,
        "width": 24,
        "n_blocks": 2,
        "cutoff": 4.5,
        "three_body_cutoff": 3.5,
    },
    frames=120,
    base_epochs=16,
    epochs=12,
    batch_size=2,
    n_test=40,
    n_calibration=20,
)


def plan(name: str, out: Path, size: PaperSize) -> TrainingPlan:
    """How the base or a specialist is trained, on energies and forces."""
    systems = BASE_SYSTEMS if name == BASE else (name,)
    everything = [
        atoms for s in (*BASE_SYSTEMS, *SYSTEMS) for atoms in read_frames(frame_file(out, s, "train"))
    ]
    own = {"model": "m3gnet", "hyper": size.hyper, "epochs": size.base_epochs}
    return TrainingPlan(
        name=name,
        training=tuple(frame_file(out, system, "train") for system in systems),
        test=tuple(frame_file(out, system, "test") for system in systems),
        config=TrainConfig(
            **(own if name == BASE else {"epochs": size.epochs}),
            batch_size=size.batch_size,
            learning_rate=size.learning_rate,
            energy_weight=1.0,
            force_weight=10.0,
            stress_weight=0.0,
            validation=10,
            level_of_theory=THEORY,
        ),
        parent=None if name == BASE else BASE,
        references=fit_references(everything, SPECIES),
        n_calibration=size.n_calibration,
    )


def measured(merge_output: MergeOutput, tests: Sequence[Sequence[Atoms]]) -> dict[str, Any]:
    """Errors on the test frames of every crystal, and the root mean square of their forces."""
    return {
        name: evaluate(merge_output.potential(k), test, specialist=k).to_dict()
        for k, (name, test) in enumerate(zip(SYSTEMS, tests, strict=True))
    }


def more_rows(base: ForceField, specialists: Sequence[ForceField]) -> Iterator[tuple[str, MergeOutput]]:
    """The base, and the published method with an embedding table per specialist."""
    yield "base", MergeOutput(potentials=(base.potential,))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MergeWarning)
        merged, _ = merge(specialists, {"preset": "paper", "conditioning": "per-specialist"}, device="cpu")
    yield "paper, switched", MergeOutput(potentials=(merged.potential,))


def distances(base: ForceField, specialists: Sequence[ForceField]) -> dict[str, dict[str, float]]:
    """How far every part of the specialists is from the base's: norm of the change relative to that of the weights."""
    found: dict[str, dict[str, float]] = {}
    weights = dict(base.potential.named_parameters())
    for specialist in specialists:
        sums: dict[str, list[float]] = {}
        for name, value in specialist.potential.named_parameters():
            part = ".".join(name.split(".")[:2]) if name.startswith("stages") else name.split(".")[0]
            pair = sums.setdefault(part, [0.0, 0.0])
            pair[0] += float((value - weights[name]).square().sum())
            pair[1] += float(weights[name].square().sum())
        found[specialist.name] = {part: (a / b) ** 0.5 for part, (a, b) in sums.items()}
    return found


def columns() -> dict[str, Column]:
    """Columns of the table."""

    def column(system: str, key: str) -> Column:
        return lambda result: 1000 * result[system][key]

    keys = {"force MAE": "force_mae", "energy MAE": "energy_mae"}
    every = {
        f"{system.split('-')[0]} {title}": column(system, key)
        for system in SYSTEMS
        for title, key in keys.items()
    }
    return {**every, "seconds": lambda result: result.get("seconds")}


def results(data: Path, out: Path, size: PaperSize, methods: Sequence[str] | None) -> dict[str, Any]:
    """Train what is missing, and measure everything."""
    make_frames(data, out, size)
    base = trained(plan(BASE, out, size), out, device="cpu")
    specialists = [trained(plan(name, out, size), out, device="cpu") for name in SYSTEMS]
    merge_inputs = make_merge_inputs(specialists, base=base, device="cpu")
    measure = partial(measured, tests=[read_frames(frame_file(out, name, "test")) for name in SYSTEMS])
    rows: Results = {name: measure(output) for name, output in more_rows(base, specialists)}
    methods = methods or [name for name in default_methods(merge_inputs) if name not in OF_CHANNELS]
    rows |= method_results(merge_inputs, measure, out / "methods", methods=methods)
    size_said = {
        "hyper": base.potential.hyper.to_dict(),
        "frames": size.frames,
        "epochs": [size.base_epochs, size.epochs],
        "calibration frames": size.n_calibration,
        "test frames": size.n_test,
    }
    return {"size": size_said, "distances": distances(base, specialists), "methods": rows}


def shown(result: dict[str, Any]) -> str:
    """The table in Markdown: forces meV/Å, energies meV/atom."""
    lines = [
        table(result["methods"], columns()),
        "",
        "forces meV/Å, energies meV/atom",
        "",
        "changes from the base",
    ]
    for name, parts in result["distances"].items():
        lines.append(f"* {name}: " + ", ".join(f"{part} {value:.2f}" for part, value in parts.items()))
    return "\n".join(lines)


def main() -> None:
    """Do what is missing, then show the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="folder of LiPS20's npz files")
    parser.add_argument("--out", type=Path, required=True, help="folder of frames, models and results")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--methods", nargs="+", choices=METHODS, metavar="METHOD")
    parser.add_argument("--full", action="store_true", help="the authors' numbers, for a GPU or a night")
    arguments = parser.parse_args()
    size = FULL if arguments.full else SMALL
    result = results(arguments.data, arguments.out, size, arguments.methods)
    print(json.dumps(result, indent=1) if arguments.json else shown(result))


if __name__ == "__main__":
    main()
