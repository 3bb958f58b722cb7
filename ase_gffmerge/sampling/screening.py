"""Structures that need not move are judged by the same criteria as replicas that do."""

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
    monitor: StoppingCriteria,
    max_atoms: int = 2000,
) -> list[Stop | None]:
    """Say what is wrong with each frame, compared with the intact structure it comes from.

    Parameters
    ----------
    potential
        Its energies must be finite, and the monitor's grade acceptable.
    frames
        What is judged.
    references
        One per frame, the same atoms in the same order; their bonds must hold.
    monitor
        The criteria.
    max_atoms
        Size of a batch.
    """
    found: list[Stop | None] = []
    for group in chunks(frames, max_atoms):
        part = references[len(found) : len(found) + len(group)]
        stops = _screen(potential, [bare(atoms) for atoms in group], part, monitor)
        found += [stops.get(k) for k in range(len(group))]
    return found


def _screen(
    potential: Potential, frames: Sequence[Atoms], references: Sequence[Atoms], monitor: StoppingCriteria
) -> dict[int, Stop]:
    n = len(frames)
    generators = [np.random.default_rng(0)] * n
    swarm = BatchedLangevin(
        potential, frames, temperatures=[0.0] * n, generators=generators, specialist=[0] * n, skin=0.0
    )
    freedom = [3 * len(atoms) for atoms in frames]
    return StoppingTracker(monitor, swarm, references, freedom=freedom).stops(recording=True)
