"""Distributions of distances that suit the structure: h(r) of molecules, g(r) of crystals."""

from collections.abc import Mapping, Sequence

import numpy as np
from ase import Atoms

from ase_gffmerge.evaluation.analysis import Distribution, distance_distribution, radial_distributions

Distributions = Mapping[str, Distribution]
CRYSTAL_RANGE = 6.0


def distribution_range(frames: Sequence[Atoms]) -> float:
    """Range in Å that holds all distances of molecules, with 1 Å to spare; fixed for crystals."""
    if frames[0].pbc.all():
        return CRYSTAL_RANGE
    return float(np.ceil(max(atoms.get_all_distances(mic=True).max() for atoms in frames) + 1))


def distributions(
    positions: np.ndarray, numbers: np.ndarray, cells: np.ndarray, pbc: np.ndarray, *, r_max: float
) -> dict[str, Distribution]:
    """h(r) of molecules and slabs as ``h``; g(r) by pair of elements of structures periodic in three directions.

    Parameters
    ----------
    positions : (n_frames, n_atoms, 3)
        Å; without frames, or with a single atom that is not periodic, there is no distribution.
    numbers : (n_atoms,)
    cells : (n_frames, 3, 3)
        Å; slabs have that of the first frame.
    pbc : (3,)
    """
    if len(positions) and pbc.all():
        return radial_distributions(positions, numbers, cells, r_max=r_max)
    if len(positions) == 0 or len(numbers) < 2:
        return {}
    return {"h": distance_distribution(positions, r_max=r_max, cell=cells[0], pbc=pbc)}


def frames_distributions(frames: Sequence[Atoms], *, r_max: float) -> dict[str, Distribution]:
    """Distributions of frames with the same atoms."""
    positions = np.stack([atoms.positions for atoms in frames])
    cells = np.stack([atoms.cell.array for atoms in frames])
    return distributions(positions, frames[0].numbers, cells, frames[0].pbc, r_max=r_max)
