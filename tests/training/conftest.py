"""Small labelled frames: methanol and ethanol with EMT, copper with EMT and its stress."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.io import write

from helpers.toys import labelled

FrameFile = Callable[..., Path]


def rattled(start: Atoms, n: int, *, seed: int) -> list[Atoms]:
    rng = np.random.default_rng(seed)
    frames = []
    for _ in range(n):
        atoms = start.copy()
        atoms.rattle(0.05, rng=rng)
        if atoms.pbc.all():
            atoms.set_cell(atoms.cell.array @ (np.eye(3) + 0.02 * rng.normal(size=(3, 3))), scale_atoms=True)
        frames.append(labelled(atoms, stress=bool(atoms.pbc.all())))
    return frames


@pytest.fixture
def frame_file(tmp_path: Path) -> FrameFile:
    def make(name: str, n: int = 12, seed: int = 0) -> Path:
        start = bulk("Cu", cubic=True) if name == "Cu" else molecule(name)
        path = tmp_path / f"{name}-{n}-{seed}.xyz"
        write(path, rattled(start, n, seed=seed), format="extxyz")
        return path

    return make
