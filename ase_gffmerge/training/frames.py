"""Labelled frames for a training: reading, splitting, and their identity."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from ase import Atoms

from ase_gffmerge.data.readers import hash_frames, read_frames, require_labels
from ase_gffmerge.errors import FramesError
from ase_gffmerge.training.config import TrainConfig


def labelled_frames(path: Path) -> list[Atoms]:
    """Read frames that all carry energies (eV) and forces (eV/Å), or raise :class:`FramesError`."""
    frames = read_frames(path)
    require_labels(frames, path)
    return frames


def split_frames(sources: Sequence[Path], config: TrainConfig) -> tuple[list[Atoms], list[Atoms]]:
    """Hold ``config.validation`` frames of every file out of training, chosen by the seed."""
    training: list[Atoms] = []
    validation: list[Atoms] = []
    for path in sources:
        frames = labelled_frames(path)
        if len(frames) <= config.validation:
            raise FramesError(
                f"{path} has {len(frames)} frames, which leaves none beside {config.validation} for "
                "validation; give more frames or set `validation` lower in the configuration"
            )
        kept, held_out = hold_out(frames, config.validation, seed=config.seed)
        training += kept
        validation += held_out
    return training, validation


def hold_out(frames: Sequence[Atoms], n: int, *, seed: int) -> tuple[list[Atoms], list[Atoms]]:
    """Split off ``n`` frames chosen by the seed: the others, and those."""
    chosen = set(np.random.default_rng(seed).permutation(len(frames))[:n].tolist())
    kept = [atoms for i, atoms in enumerate(frames) if i not in chosen]
    return kept, [atoms for i, atoms in enumerate(frames) if i in chosen]


def hash_labelled(frames: Sequence[Atoms]) -> str:
    """SHA-256 over geometries, energies, forces and (where present) stresses."""
    sha = hashlib.sha256(hash_frames(frames).encode())
    for atoms in frames:
        results = atoms.calc.results if atoms.calc is not None else {}
        for name in ("energy", "forces", "stress"):
            if results.get(name) is not None:
                sha.update(name.encode() + np.asarray(results[name], dtype="<f8").tobytes())
    return sha.hexdigest()


def bare(atoms: Atoms) -> Atoms:
    """Species, positions, cell and periodicity alone."""
    return Atoms(atoms.numbers, positions=atoms.positions, cell=atoms.cell, pbc=atoms.pbc)
