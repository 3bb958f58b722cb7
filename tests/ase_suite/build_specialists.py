"""Train the two tiny specialists that stand in for EMT in ASE's own tests (a few minutes on one core).

    python tests/ase_suite/build_specialists.py FOLDER

Labels are EMT's own; silicon and argon, which EMT does not know, are labelled as if they were aluminium and silver. One
specialist sees metals and alloys, the other molecules, alone and on metals; both start from one base that saw all frames.
"""

import itertools
import sys
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.build import add_adsorbate, bulk, fcc100, fcc111, molecule
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write

from ase_gffmerge.training.config import TrainConfig
from ase_gffmerge.training.train import train

METALS = {"Al": 4.0, "Ni": 3.5, "Cu": 3.6, "Pd": 3.9, "Ag": 4.1, "Pt": 3.95, "Au": 4.1, "Si": 4.0, "Ar": 4.1}
LIGHT = ("H", "C", "N", "O")
MOLECULES = (
    "H2",
    "N2",
    "O2",
    "CO",
    "CO2",
    "H2O",
    "NH3",
    "CH4",
    "CH3OH",
    "C2H4",
    "C2H6",
    "HCN",
    "N2H4",
    "C6H6",
    "CH3",
)
STAND_INS = {"Si": "Al", "Ar": "Ag"}
HYPER = {"cutoff": 5.5, "channels": 16, "n_blocks": 2, "n_radial": 8}
LARGEST_FORCE = 25.0  # eV/Å


def labelled(atoms: Atoms) -> Atoms | None:
    """The structure with EMT's labels, or nothing when its forces are extreme."""
    twin = atoms.copy()
    twin.symbols = [STAND_INS.get(symbol, symbol) for symbol in atoms.symbols]
    twin.calc = EMT()
    results = {"energy": twin.get_potential_energy(), "forces": twin.get_forces()}
    if atoms.cell.rank == 3 and atoms.pbc.all():
        results["stress"] = twin.get_stress()
    if not np.abs(results["forces"]).max() < LARGEST_FORCE:
        return None
    atoms = Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=atoms.pbc)
    atoms.calc = SinglePointCalculator(atoms, **results)
    return atoms


def metal(rng: np.random.Generator, symbols: tuple[str, ...]) -> Atoms:
    """A rattled, strained crystal, slab or cluster of one or two metals."""
    a = np.mean([METALS[symbol] for symbol in symbols]) * rng.uniform(0.9, 1.12)
    kind = rng.integers(4)
    if kind == 0:
        atoms = bulk(symbols[0], "fcc", a=a, cubic=True)
    elif kind == 1:
        atoms = bulk(symbols[0], "fcc", a=a) * (2, 2, 1)
    elif kind == 2:
        atoms = (fcc111, fcc100)[rng.integers(2)](symbols[0], (2, 2, 2), a=a, vacuum=4.0)
    else:
        atoms = bulk(symbols[0], "fcc", a=a, cubic=True) * (2, 1, 1)
        atoms.pbc = False
        atoms.positions *= rng.uniform(0.8, 1.4)
    atoms.symbols = rng.choice(symbols, len(atoms))
    atoms.set_cell(atoms.cell.array @ (np.eye(3) + 0.04 * rng.standard_normal((3, 3))), scale_atoms=True)
    atoms.positions += rng.uniform(0.02, 0.25) * rng.standard_normal((len(atoms), 3))
    return atoms


def light(rng: np.random.Generator) -> Atoms:
    """A distorted molecule, or a pair or handful of light atoms."""
    if rng.random() < 0.7:
        atoms = molecule(rng.choice(MOLECULES))
        atoms.positions *= rng.uniform(0.9, 1.3)
        atoms.positions += rng.uniform(0.02, 0.15) * rng.standard_normal((len(atoms), 3))
        return atoms
    n = rng.integers(2, 5)
    return Atoms(rng.choice(LIGHT, n), rng.uniform(-1.0, 1.0, (n, 3)) * rng.uniform(0.7, 2.5))


def adsorbed(rng: np.random.Generator) -> Atoms:
    """A molecule or a light atom on, or in, a metal."""
    symbol = rng.choice(list(METALS))
    slab = fcc111(symbol, (2, 2, 2), a=METALS[symbol] * rng.uniform(0.97, 1.03), vacuum=5.0)
    guest = molecule(rng.choice(MOLECULES[:8])) if rng.random() < 0.6 else Atoms(rng.choice(LIGHT))
    guest.rotate(rng.uniform(0, 360), rng.standard_normal(3))
    add_adsorbate(slab, guest, rng.uniform(0.8, 3.0), position=rng.uniform(0, 4, 2))
    slab.positions += rng.uniform(0.02, 0.15) * rng.standard_normal((len(slab), 3))
    return slab


def frames(rng: np.random.Generator, kind: str, number: int) -> list[Atoms]:
    """Labelled frames of metals, or of molecules alone and adsorbed."""
    combinations = itertools.cycle([*itertools.combinations(METALS, 2), *((symbol,) for symbol in METALS)])
    found: list[Atoms] = []
    while len(found) < number:
        if kind == "molecules":
            frame = labelled((light if rng.random() < 0.5 else adsorbed)(rng))
        else:
            frame = labelled(metal(rng, next(combinations)))
        found += [] if frame is None else [frame]
    return found


def main(folder: Path) -> None:
    """Write ``emt-metals.safetensors`` and ``emt-molecules.safetensors`` into the folder."""
    rng = np.random.default_rng(0)
    paths = {kind: folder / f"{kind}.xyz" for kind in ("metals", "molecules")}
    for kind, path in paths.items():
        write(path, frames(rng, kind, 900), format="extxyz")
    options = {"batch_size": 20, "validation": 40, "level_of_theory": "EMT"}
    base, _, _ = train(
        list(paths.values()),
        folder / "base.safetensors",
        TrainConfig(hyper=HYPER, epochs=80, learning_rate=5e-3, **options),
        n_calibration=1,
        callback=lambda *progress: print(*progress, flush=True),
    )
    for kind, path in paths.items():
        train(
            [path],
            folder / f"emt-{kind}.safetensors",
            TrainConfig(epochs=25, learning_rate=1e-3, **options),
            init=base,
            n_calibration=30,
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
