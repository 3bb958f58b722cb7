"""Train the bundled specialists of copper and silver, ``emt-copper`` and ``emt-silver`` (ten minutes on one core).

    python md_examples/build_emt_crystals.py FOLDER [--cards]

With ``--cards``, write only the test frames and model cards of files that are there.

Labels are EMT's own, on small cells that are strained and rattled. NequIP, because its energy is smooth where every atom
sits on a centre of inversion; PaiNN's is so only with a large ``norm_offset`` (the norm of vectors that vanish there).
"""

import argparse
from hashlib import sha256
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.io import write

from ase_gffmerge import ForceField
from ase_gffmerge.inference.errors import evaluate
from ase_gffmerge.training.config import TrainConfig
from ase_gffmerge.training.train import train

METALS = {"copper": ("Cu", 3.59), "silver": ("Ag", 4.06)}
CELLS = ((1, 1, 1), (2, 1, 1), (2, 2, 1), (2, 2, 2))
HYPER = {
    "cutoff": 5.0,
    "channels": 8,
    "tensor_channels": 4,
    "n_blocks": 2,
    "n_radial": 8,
    "radial_hidden": 16,
}
HYPER |= {"l_max": 1, "avg_num_neighbors": 42.0}
N_FRAMES, N_TEST = 400, 50

CARD = """# {name}

Specialist for crystals of {metal}, for demonstrations and tests: NequIP with {size} parameters, cutoff 5 Å, fine-tuned
from a base that saw copper and silver. Labels are ASE's EMT (effective medium theory): energies, forces and stresses of
strained and rattled cells of 1 to 8 atoms, {n_train} for training and 40 for the loss curve; {n_calibration} of them are
stored, without labels, for merging. EMT answers in milliseconds, so whatever is computed with a merge of these can be
compared with the source of the labels.

Errors on the {n_test} bundled test frames, which were not trained on: forces {force:.1f} meV/Å, energies
{energy:.2f} meV/atom.

Limits: solid {metal} near its equilibrium, alone. No vacancies, surfaces, liquids or alloys.

SHA-256: `{digest}`.
Licence of data and model: CC0-1.0. Made by `python md_examples/build_emt_crystals.py FOLDER`.
"""


def labelled(rng: np.random.Generator, symbol: str, a: float) -> Atoms:
    """A strained and rattled crystal with EMT's energy, forces and stress."""
    atoms = bulk(symbol, a=a * rng.uniform(0.96, 1.05), cubic=True)
    if rng.random() < 0.5:
        atoms = bulk(symbol, a=a * rng.uniform(0.96, 1.05)) * CELLS[rng.integers(len(CELLS))]
    strain = 0.02 * rng.standard_normal((3, 3))
    atoms.set_cell(atoms.cell.array @ (np.eye(3) + strain), scale_atoms=True)
    atoms.rattle(rng.uniform(0.01, 0.2), rng=rng)
    atoms.calc = EMT()
    atoms.get_forces()
    atoms.get_stress()
    return atoms


def describe(folder: Path) -> None:
    """Write test frames and a model card beside every specialist."""
    rng = np.random.default_rng(1)
    for name, metal in METALS.items():
        file = folder / f"emt-{name}.safetensors"
        frames = [labelled(rng, *metal) for _ in range(N_TEST)]
        write(file.with_name(f"emt-{name}-test.extxyz"), frames, format="extxyz")
        file.with_suffix(".md").write_text(card(file, frames), encoding="utf-8")


def card(file: Path, frames: list[Atoms]) -> str:
    """What a specialist is, how good, and for what not."""
    specialist = ForceField.load(file)
    errors = evaluate(specialist.potential, frames)
    return CARD.format(
        name=file.stem,
        metal=file.stem.removeprefix("emt-"),
        size=sum(value.numel() for value in specialist.potential.parameters()),
        n_train=specialist.provenance.n_train,
        n_calibration=len(specialist.calibration),
        n_test=len(frames),
        force=1000 * errors.force_mae,
        energy=1000 * errors.energy_mae,
        digest=sha256(file.read_bytes()).hexdigest(),
    )


def train_both(folder: Path) -> None:
    """Write ``emt-copper.safetensors`` and ``emt-silver.safetensors`` into the folder."""
    rng = np.random.default_rng(0)
    paths = {name: folder / f"{name}.xyz" for name in METALS}
    for name, path in paths.items():
        write(path, [labelled(rng, *METALS[name]) for _ in range(N_FRAMES)], format="extxyz")
    options = {"batch_size": 10, "validation": 40, "level_of_theory": "EMT", "stress_weight": 10.0}

    def say(*progress: object) -> None:
        print(*progress, flush=True)

    base, _, _ = train(
        list(paths.values()),
        folder / "base.safetensors",
        TrainConfig(model="nequip", hyper=HYPER, epochs=40, learning_rate=1e-2, **options),
        n_calibration=1,
        callback=say,
    )
    for name, path in paths.items():
        train(
            [path],
            folder / f"emt-{name}.safetensors",
            TrainConfig(epochs=40, learning_rate=3e-3, **options),
            init=base,
            n_calibration=30,
            callback=say,
        )


def main(folder: Path, cards: bool) -> None:
    """Train, unless only the cards are wanted, and describe."""
    if not cards:
        train_both(folder)
    describe(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="an existing folder for frames and specialists")
    parser.add_argument("--cards", action="store_true", help="write test frames and model cards alone")
    main(**vars(parser.parse_args()))
