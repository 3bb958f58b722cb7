"""Stopping criteria of molecular dynamics, applied to structures that do not move."""

from collections.abc import Sequence

import numpy as np
from ase import Atoms

from ase_gffmerge.data.frames import bare
from ase_gffmerge.dynamics.langevin import BatchedLangevin
from ase_gffmerge.dynamics.stopping import Stop, StoppingCriteria, StoppingTracker
from ase_gffmerge.models import Potential
from ase_gffmerge.runtime.batching import chunks


def screen(
    potential: Potential,
    frames: Sequence[Atoms],
    references: Sequence[Atoms],
    *,
    criteria: StoppingCriteria,
    max_atoms: int = 2000,
) -> list[Stop | None]:
    """Find what is wrong with each frame, compared with the intact structure that it comes from.

    Parameters
    ----------
    potential
        Its energies must be finite, and its extrapolation grade acceptable.
    frames
        Structures to look at.
    references
        One per frame, the same atoms in the same order; their bonds must hold.
    criteria
        The criteria.
    max_atoms
        Size of a batch.
    """
    found: list[Stop | None] = []
    for group in chunks(frames, max_atoms):
        part = references[len(found) : len(found) + len(group)]
        stops = _screen(potential, [bare(atoms) for atoms in group], part, criteria)
        found += [stops.get(k) for k in range(len(group))]
    return found


def _screen(
    potential: Potential, frames: Sequence[Atoms], references: Sequence[Atoms], criteria: StoppingCriteria
) -> dict[int, Stop]:
    n = len(frames)
    generators = [np.random.default_rng(0)] * n
    replicas = BatchedLangevin(
        potential, frames, temperatures=[0.0] * n, generators=generators, specialist=[0] * n, skin=0.0
    )
    freedom = [3 * len(atoms) for atoms in frames]
    return StoppingTracker(criteria, replicas, references, freedom=freedom).stops(recording=True)
