"""What is done with frames: labels taken off, atoms displaced, some chosen, parts split without leaks, identities hashed.

Identity of frames: an exact hash for provenance, and one that forgives rigid motion for leak checks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from ase import Atoms

from ase_gffmerge.errors import FramesError


def bare(atoms: Atoms, *, wrap: bool = False) -> Atoms:
    """Return a copy with species, positions, cell and periodicity alone, on request wrapped into its cell."""
    copy = Atoms(atoms.numbers, positions=atoms.positions, cell=atoms.cell, pbc=atoms.pbc)
    if wrap and atoms.pbc.any():
        copy.wrap()
    return copy


def evenly(available: int, n: int) -> list[int]:
    """Return at most ``n`` indices, ascending, spread evenly over those below ``available``."""
    if not available:
        return []
    return np.unique(np.linspace(0, available - 1, min(n, available)).round().astype(int)).tolist()


Item = TypeVar("Item")


def spread(items: Sequence[Item], n: int | None) -> list[Item]:
    """At most ``n`` of the items, spread evenly from the first to the last; all of them for ``None``."""
    return [items[i] for i in evenly(len(items), len(items) if n is None else n)]


HELD_OUT = 10
"""Every tenth frame is held out of fits."""


def hold_out_tenth(frames: Sequence[Item]) -> tuple[list[Item], list[Item]]:
    """Split frames into those that a fit sees and every tenth one (the last one, where there are fewer) that it does not."""
    every = min(HELD_OUT, len(frames))
    fitted = [frame for i, frame in enumerate(frames) if i % every != every - 1]
    return fitted, list(frames[every - 1 :: every])


def displaced(atoms: Atoms, *, rattle: float, strain: float, rng: np.random.Generator) -> Atoms:
    """Return a copy with normally displaced atoms and, for a structure periodic in three directions, a strained cell.

    Parameters
    ----------
    atoms
        Not changed.
    rattle
        Standard deviation of every coordinate in Å.
    strain
        Largest component of the symmetric strain; each is uniform between minus and plus this.
    rng
        Source of randomness.
    """
    copy = bare(atoms)
    if atoms.pbc.all():
        random = rng.uniform(-strain, strain, (3, 3))
        symmetric = np.triu(random) + np.triu(random, 1).T
        copy.set_cell(atoms.cell.array @ (np.eye(3) + symmetric), scale_atoms=True)
    copy.positions += rattle * rng.standard_normal(copy.positions.shape)
    return copy


@dataclass(frozen=True)
class Split:
    """Sorted frame indices, each (n,) int, of three parts that share no frame."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


def time_block_split(
    n: int, *, n_blocks: int = 10, gap: int = 20, fractions: tuple[float, float, float] = (0.6, 0.2, 0.2)
) -> Split:
    """Split a time-ordered trajectory into interleaved blocks of train, validation and test frames.

    Neighbours in time are nearly the same geometry, so a random split by frame leaks the test set. Here
    whole blocks go to one part, the parts take turns in proportion to `fractions`, and wherever two parts
    meet `gap` frames are dropped between them.

    Parameters
    ----------
    n
        Number of frames, in order of time.
    n_blocks
        Number of blocks of (nearly) equal length.
    gap
        Frames dropped between blocks of different parts; choose it beyond the correlation time.
    fractions
        Shares of train, validation and test; they must add up to 1. A share of 0 leaves that part empty.

    Returns
    -------
    Split
        Frames i and j of different parts always have ``abs(i - j) > gap``.

    Raises
    ------
    FramesError
        If the numbers make no sense or leave a part without frames.
    """
    shares = np.asarray(fractions, dtype=float)
    if shares.shape != (3,) or not (shares >= 0).all() or abs(shares.sum() - 1) > 1e-6:
        raise FramesError(f"fractions {fractions} must be three shares >= 0 that add up to 1")
    if not 1 <= n_blocks <= n or gap < 0:
        raise FramesError(f"{n} frames cannot be split into {n_blocks} blocks with a gap of {gap}")
    edges = np.linspace(0, n, n_blocks + 1).round().astype(int)
    roles = _take_turns(shares, n_blocks)
    owner = np.repeat(roles, np.diff(edges))
    dropped = np.zeros(n, dtype=bool)
    for edge in edges[1:-1][roles[1:] != roles[:-1]]:
        dropped[max(0, edge - (gap + 1) // 2) : edge + gap // 2] = True
    parts = [np.flatnonzero((owner == role) & ~dropped) for role in range(3)]
    if any(share > 0 and part.size == 0 for share, part in zip(shares, parts)):
        raise FramesError(
            f"{n} frames in {n_blocks} blocks with a gap of {gap} leave a part without frames "
            f"(train, validation, test: {[p.size for p in parts]}); use more frames or a smaller gap"
        )
    return Split(*parts)


def _take_turns(shares: np.ndarray, n_blocks: int) -> np.ndarray:
    """Role of each block (n_blocks,): always the one that lags most behind its share."""
    count = np.zeros(3)
    roles = np.empty(n_blocks, dtype=int)
    for block in range(n_blocks):
        roles[block] = np.argmax((block + 1) * shares - count)
        count[roles[block]] += 1
    return roles


def calibration_frames(frames: Sequence[Atoms], n: int, *, seed: int) -> list[Atoms]:
    """Choose `n` different frames at random, the same for the same seed, in their original order.

    Parameters
    ----------
    frames
        Frames to choose from.
    n
        How many, at least 1.
    seed
        Seed of the generator.

    Raises
    ------
    FramesError
        If there are fewer than `n` frames, or `n` is below 1.
    """
    if not 1 <= n <= len(frames):
        raise FramesError(
            f"cannot choose {n} calibration frames out of {len(frames)}; give a number from 1 to that"
        )
    chosen = np.random.default_rng(seed).choice(len(frames), size=n, replace=False)
    return [frames[i] for i in np.sort(chosen)]


def hold_out(frames: Sequence[Atoms], n: int, *, seed: int) -> tuple[list[Atoms], list[Atoms]]:
    """Split frames at random.

    Parameters
    ----------
    frames
        All of them.
    n
        How many are held out.
    seed
        The same seed gives the same split.

    Returns
    -------
    kept, held_out
        Both in their original order.
    """
    chosen = set(np.random.default_rng(seed).permutation(len(frames))[:n].tolist())
    kept = [atoms for i, atoms in enumerate(frames) if i not in chosen]
    return kept, [atoms for i, atoms in enumerate(frames) if i in chosen]


_BIN = 1e-3
_OFFSET = 1 / np.pi  # bin edges away from round numbers: a distance such as 1.0005 Å must not sit on an edge


def hash_frames(frames: Sequence[Atoms]) -> str:
    """SHA-256 (64 hexadecimal digits) over numbers, positions, cell and periodicity of all frames, in order.

    Labels are not part of it. Positions count to the last bit of a float64, so a file converted to text
    (extxyz keeps 8 decimals) has another hash than its source.
    """
    digest = hashlib.sha256(f"{len(frames)} frames".encode())
    for atoms in frames:
        digest.update(f";{len(atoms)};".encode())
        digest.update(atoms.numbers.astype("<i8").tobytes())
        digest.update(atoms.positions.astype("<f8").tobytes())
        digest.update(atoms.cell.array.astype("<f8").tobytes())
        digest.update(atoms.pbc.astype("u1").tobytes())
    return digest.hexdigest()


def hash_labelled(frames: Sequence[Atoms]) -> str:
    """SHA-256 over geometries, energies, forces and (where present) stresses and weights."""
    digest = hashlib.sha256(hash_frames(frames).encode())
    for atoms in frames:
        results = atoms.calc.results if atoms.calc is not None else {}
        for name in ("energy", "forces", "stress"):
            if results.get(name) is not None:
                digest.update(name.encode() + np.asarray(results[name], dtype="<f8").tobytes())
        if "config_weight" in atoms.info:
            digest.update(f"weight {atoms.info['config_weight']}".encode())
    return digest.hexdigest()


def geometry_fingerprint(atoms: Atoms) -> str:
    """SHA-256 of the sorted interatomic distances with their pairs of elements, in bins of 1e-3 Å.

    Equal for two frames that differ by a translation, a rotation (with the cell), a mirror image, or the
    order of the atoms; for periodic frames also by lattice translations of atoms (minimum-image distances;
    the volume is part of the hash). Meant for leak checks: equal hashes mean the same geometry to about
    1e-3 Å; two frames that differ by less can still fall into different bins. Cost: n_atoms squared.
    """
    i, j = np.triu_indices(len(atoms), k=1)
    distances = atoms.get_all_distances(mic=bool(atoms.pbc.any()))[i, j]
    bins = np.floor(distances / _BIN + _OFFSET).astype("<i8")
    low, high = np.minimum(atoms.numbers[i], atoms.numbers[j]), np.maximum(atoms.numbers[i], atoms.numbers[j])
    order = np.lexsort((bins, high, low))
    table = np.stack([low, high, bins], axis=1)[order].astype("<i8")
    volume = int(np.floor(atoms.cell.volume / (_BIN * 10) + _OFFSET)) if atoms.pbc.all() else -1
    head = f"{sorted(atoms.numbers.tolist())};{atoms.pbc.tolist()};{volume};"
    return hashlib.sha256(head.encode() + table.tobytes()).hexdigest()


def geometry_key(atoms: Atoms) -> str:
    """First 16 hexadecimal digits of :func:`geometry_fingerprint`: what a specialist's file keeps of a frame it has seen.

    64 bits: among 1e6 frames seen and 1e4 test frames, equal keys by chance have a probability of 5e-10.
    """
    return geometry_fingerprint(atoms)[:16]


def geometry_keys(frames: Iterable[Atoms]) -> tuple[str, ...]:
    """Distinct keys of frames, ascending."""
    return tuple(sorted({geometry_key(atoms) for atoms in frames}))
