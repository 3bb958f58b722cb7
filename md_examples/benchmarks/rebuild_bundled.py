"""Rebuild the bundled specialists, their test frames and their model cards.

Run ``gffmerge data fetch rmd17 --file "*_01.npz" --dir DATA`` and then ``python rebuild_bundled.py DATA``. A killed run
continues from its last epoch; finished models are kept (delete a file to train it again).
``--stage cards`` writes test frames and cards from the models as they are; ``--stage more --out FOLDER`` trains specialists
of the other molecules, which benchmarks of larger mixtures need and which are not bundled; ``--stage seen`` enters into the
models in FOLDER the frames that their trainings saw, for models made before the files kept them (weights stay as they are).
"""

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from ase import Atoms
from ase.io import write
from model_card import Plan, model_card, published_hash, sha256
from training_plan import TrainingPlan, parent_model, trained

import ase_gffmerge
from ase_gffmerge.data.frames import hash_frames
from ase_gffmerge.data.readers import read_frames
from ase_gffmerge.forcefield.force_field import ForceField
from ase_gffmerge.inference.errors import evaluate
from ase_gffmerge.training.config import TrainConfig
from ase_gffmerge.training.train import seen_frames, split_frames

BASE = "rmd17-base"
PLANS = {
    BASE: Plan(molecules=("aspirin", "salicylic", "toluene", "uracil"), epochs=32, learning_rate=2e-3),
    "rmd17-ethanol": Plan(molecules=("ethanol",), epochs=70, learning_rate=2e-4, parent=BASE),
    "rmd17-malonaldehyde": Plan(molecules=("malonaldehyde",), epochs=70, learning_rate=2e-4, parent=BASE),
    "rmd17-aspirin": Plan(molecules=("aspirin",), epochs=30, learning_rate=2e-4, parent=BASE),
    "rmd17-toluene": Plan(molecules=("toluene",), epochs=30, learning_rate=2e-4, parent=BASE),
    "rmd17-uracil": Plan(molecules=("uracil",), epochs=30, learning_rate=2e-4, parent=BASE),
    "rmd17-salicylic": Plan(molecules=("salicylic",), epochs=30, learning_rate=2e-4, parent=BASE),
}
STAGES = {
    "base": (BASE,),
    "specialists": ("rmd17-ethanol", "rmd17-malonaldehyde"),
    "cards": (),
    "seen": (),
    "more": ("rmd17-aspirin", "rmd17-toluene", "rmd17-uracil", "rmd17-salicylic"),
}
BUNDLED = ("base", "specialists", "cards")
N_CALIBRATION = 100
N_TEST_FRAMES = 50
LEVEL_OF_THEORY = "PBE/def2-SVP"
NORM_OFFSET = 1e-8
"""The bundled models are older than the larger offset of new ones."""


def main() -> None:
    """Train what is missing, then write test frames and cards."""
    options = arguments()
    torch.set_num_threads(options.threads)
    for stage in [options.stage] if options.stage else BUNDLED:
        for name in STAGES[stage]:
            train_model(name, options.data, options.out)
        if stage == "seen":
            for name in filter(lambda name: (options.out / f"{name}.safetensors").exists(), PLANS):
                enter_seen_frames(name, options.data, options.out)
        if stage == "cards":
            for name in (*STAGES["base"], *STAGES["specialists"]):
                write_card(name, options.data, options.out)


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path, help="folder of the rMD17 npz files of split 01")
    bundled = Path(ase_gffmerge.__file__).parent / "bundled"
    parser.add_argument("--out", type=Path, default=bundled, help="folder of the bundled files")
    parser.add_argument("--stage", choices=STAGES, help="only this stage [default: all]")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    return parser.parse_args()


def data_file(data: Path, molecule: str, part: str) -> Path:
    """Path of a file of rMD17, after its SHA-256 was compared with the manifest."""
    path = data / f"rmd17_{molecule}_{part}_01.npz"
    if sha256(path) != published_hash(path.name):
        raise SystemExit(f"{path} is not the published file; fetch it again with gffmerge data fetch rmd17")
    return path


def train_model(name: str, data: Path, out: Path) -> None:
    """Train one model unless it exists."""
    plan = PLANS[name]
    trained(
        TrainingPlan(
            name=name,
            training=tuple(data_file(data, molecule, "train") for molecule in plan.molecules),
            test=tuple(data_file(data, molecule, "test") for molecule in plan.molecules),
            config=config_of(plan),
            parent=plan.parent,
            n_calibration=N_CALIBRATION,
        ),
        out,
    )


def config_of(plan: Plan) -> TrainConfig:
    """Training options of a plan."""
    return TrainConfig(
        epochs=plan.epochs,
        batch_size=plan.batch_size,
        learning_rate=plan.learning_rate,
        validation=plan.validation,
        seed=plan.seed,
        level_of_theory=LEVEL_OF_THEORY,
        hyper={} if plan.parent else {"norm_offset": NORM_OFFSET},
    )


def enter_seen_frames(name: str, data: Path, out: Path) -> None:
    """Record the frames of a finished training and of its ancestors' in the file; refuses frames of another training."""
    plan, path = PLANS[name], out / f"{name}.safetensors"
    specialist = ForceField.load(path)
    training, validation, _ = split_frames(
        [data_file(data, molecule, "train") for molecule in plan.molecules], config_of(plan)
    )
    if hash_frames(training) != specialist.provenance.data_hash:
        raise SystemExit(f"{path} was trained on other frames than the plan says; train it again")
    seen = seen_frames([*training, *validation], init=parent_model(plan.parent, out))
    replace(specialist, provenance=replace(specialist.provenance, seen_frames=seen)).save(path)
    print(f"{path} has seen {len(seen)} frames, its ancestors' among them")


def load_named(name: str, out: Path) -> ForceField:
    """Load a bundled model; one that was trained under another name is stored under its own."""
    path = out / f"{name}.safetensors"
    specialist = ForceField.load(path)
    if specialist.name != name:
        specialist = replace(specialist, name=name)
        specialist.save(path)
    return specialist


def write_test_frames(name: str, data: Path, out: Path) -> list[Atoms]:
    """Write evenly spaced test frames of the model's molecules, in eV and Å."""
    molecules = PLANS[name].molecules
    chosen: list[Atoms] = []
    for molecule, part in zip(molecules, np.array_split(np.arange(N_TEST_FRAMES), len(molecules))):
        frames = read_frames(data_file(data, molecule, "test"))
        for index in np.linspace(0, len(frames) - 1, len(part)).round().astype(int).tolist():
            frames[index].info.update(molecule=molecule, frame=index)
            chosen.append(frames[index])
    write(out / f"{name}-test.extxyz", chosen, format="extxyz")
    return chosen


def write_card(name: str, data: Path, out: Path) -> None:
    """Measure the model on its test frames and write its card; refuses a model that was made in another way."""
    plan, specialist = PLANS[name], load_named(name, out)
    parent = parent_model(plan.parent, out)
    origin = specialist.provenance
    made, planned = (
        (origin.epochs, origin.seed, origin.lineage),
        (plan.epochs, plan.seed, (parent.fingerprint,) if parent else ()),
    )
    if made != planned:
        raise SystemExit(f"{name} was made with (epochs, seed, ancestors) {made}, the plan says {planned}")
    frames = {
        f"{molecule}, all 1000 test frames": read_frames(data_file(data, molecule, "test"))
        for molecule in plan.molecules
    }
    bundled = write_test_frames(name, data, out)
    frames[f"the {len(bundled)} bundled test frames"] = bundled
    measured = {what: evaluate(specialist.potential, labelled) for what, labelled in frames.items()}
    text = model_card(specialist, plan, measured, file_hash=sha256(out / f"{name}.safetensors"))
    (out / f"{name}.md").write_text(text, encoding="utf-8")
    print(text, flush=True)


if __name__ == "__main__":
    main()
