"""Identity of frames: an exact hash for provenance, and one that forgives rigid motion for leak checks."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np
from ase import Atoms

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
