"""A quick calculator that tells what it evaluated, and kills its process on request; scripts that are killed themselves."""

import os
import signal
import time
from functools import partial
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.build import molecule
from ase.calculators.calculator import Calculator, all_changes

MADE, SEEN, KILLED = "made", "seen", "killed"
"""Files in the calculator's folder: a line with the process per calculator, one with index and process per evaluation."""


def tell(path: Path, line: str) -> None:
    """Append a line in one piece."""
    with path.open("ab", buffering=0) as handle:
        handle.write(f"{line}\n".encode())


class Counting(Calculator):
    """Springs between all atoms, for structures that have an index (``info["index"]``).

    Parameters
    ----------
    folder
        Where it tells what it does.
    fatal
        At this structure the process is killed: once, or every time.
    pause
        Seconds that every evaluation takes.
    """

    implemented_properties = ("energy", "forces")

    def __init__(self, folder: Path, *, fatal: int | None = None, always: bool = False, pause: float = 0.0):
        super().__init__(folder=str(folder), fatal=fatal)
        self.folder, self.fatal, self.always, self.pause = Path(folder), fatal, always, pause
        tell(self.folder / MADE, str(os.getpid()))

    def calculate(self, atoms=None, properties=("energy",), system_changes=tuple(all_changes)):
        super().calculate(atoms, properties, system_changes)
        index = atoms.info["index"]
        if index == self.fatal and (self.always or not (self.folder / KILLED).exists()):
            tell(self.folder / KILLED, str(os.getpid()))
            os.kill(os.getpid(), signal.SIGKILL)
        if atoms.info.get("refused"):
            raise ValueError("refused")
        time.sleep(self.pause)
        vectors = atoms.positions[:, None] - atoms.positions
        self.results = {"energy": float((vectors**2).sum() / 4), "forces": -vectors.sum(axis=1)}
        tell(self.folder / SEEN, f"{index} {os.getpid()}")


def seen(folder: Path) -> list[int]:
    """Indices of the structures that were evaluated, sorted."""
    path = folder / SEEN
    return sorted(int(line.split()[0]) for line in path.read_text().splitlines()) if path.exists() else []


def molecules(n: int) -> list[Atoms]:
    """Displaced molecules with an index."""
    rng, found = np.random.default_rng(0), []
    for index in range(n):
        atoms = molecule("CH3CH2OH")
        atoms.positions += 0.05 * rng.standard_normal(atoms.positions.shape)
        atoms.info["index"] = index
        found.append(atoms)
    return found


def maker(folder: Path, **options):
    """Function that makes a calculator."""
    return partial(Counting, folder, **options)
