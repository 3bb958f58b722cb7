"""Train the specialists of copper and silver that the examples of crystals merge (ten minutes on one core).

    python md_examples/build_emt_crystals.py FOLDER

Labels are EMT's own, on small cells that are strained and rattled. NequIP, because its energy is smooth where every atom
sits on a centre of inversion; PaiNN's is so only with a large ``norm_offset`` (the norm of vectors that vanish there).
"""

import argparse
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.io import write

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
N_FRAMES = 400


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


def main(folder: Path) -> None:
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


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="an existing folder for frames and specialists")
    main(**vars(parser.parse_args()))
