"""Per-element reference energies: one table shared by a base and all specialists that descend from it."""

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.data import atomic_numbers

from ase_gffmerge.errors import FramesError, ReferenceWarning

OFFSET_TOLERANCE = 1.0


def composition(frames: Sequence[Atoms], species: Sequence[int]) -> np.ndarray:
    """Count of each element in each frame, (n_frames, n_species)."""
    return np.array(
        [[np.count_nonzero(atoms.numbers == z) for z in species] for atoms in frames], dtype=float
    )


def fit_references(frames: Sequence[Atoms], species: Sequence[int]) -> dict[int, float]:
    """Least-squares energies per element in eV (minimum norm where compositions are degenerate)."""
    energies = np.array([atoms.get_potential_energy() for atoms in frames])
    solution = np.linalg.lstsq(composition(frames, species), energies, rcond=1e-10)[0]
    return {int(z): float(energy) for z, energy in zip(species, solution, strict=True)}


def warn_of_offset(frames: Sequence[Atoms], references: Mapping[int, float]) -> None:
    """Warn when energies lie further than 1 eV per atom from the references a specialist inherits.

    A table fitted to too few compositions is not unique and may be far off for the next molecule; a training that has to
    learn such an offset drifts far from its base.
    """
    offsets = [
        (atoms.get_potential_energy() - sum(references[z] for z in atoms.numbers.tolist())) / len(atoms)
        for atoms in frames
    ]
    mean = float(np.mean(offsets))
    if abs(mean) > OFFSET_TOLERANCE:
        warnings.warn(
            f"the energies lie {mean:.1f} eV per atom from the base's reference energies, which the training must learn "
            "as an offset; train the base on more different compositions, or give both trainings one table with "
            "--references FILE",
            ReferenceWarning,
            stacklevel=2,
        )


def load_references(path: Path) -> dict[int, float]:
    """Read ``{"H": -13.6, ...}`` (eV) from a JSON file."""
    try:
        table = {atomic_numbers[key]: float(value) for key, value in json.loads(path.read_text()).items()}
        if not table or not np.isfinite(list(table.values())).all():
            raise ValueError("no energies, or energies that are not finite")
        return table
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise FramesError(
            f"cannot read reference energies from {path} ({type(error).__name__}: {error}); write a JSON "
            'object of element symbols and energies in eV, for example {"H": -13.6}'
        ) from None
