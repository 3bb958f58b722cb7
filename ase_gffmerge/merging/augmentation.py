r"""Copies of a specialist's calibration frames, which the specialist labels for free.

Around every frame the merged potential must follow the specialist's surface, so each frame brings a few neighbours. They
are visited by short Langevin dynamics of the specialist itself, started at the frame: stiff bonds move little, soft
torsions far, as in any dynamics to come. The distribution of positions does not depend on the masses, so all atoms
weigh the same 12 u and light ones do not limit the time step. Copies displaced at random are the alternative.
"""

from collections.abc import Sequence

import numpy as np
from ase import Atoms

from ase_gffmerge.data.frames import bare, displaced
from ase_gffmerge.dynamics.batched_md import run_replicas
from ase_gffmerge.forcefield.force_field import ForceField
from ase_gffmerge.graphs import build_graph
from ase_gffmerge.merging.recipe import AugmentationOptions
from ase_gffmerge.runtime.devices import chunks
from ase_gffmerge.runtime.distributed import gathered, mine

MAX_EDGES = 3_000
"""Edges of the replicas that move in one batch: few enough for several processes to have some, and always the same replicas,
so that they visit the same structures to the last bit."""

MASS, TIMESTEP, FRICTION = 12.0, 2.0, 0.05
"""Of every atom in u; fs; 1/fs."""


def with_copies(
    specialist: ForceField, frames: Sequence[Atoms], options: AugmentationOptions, *, n_copies: int
) -> list[Atoms]:
    """Frames followed by copies of each, fewer where dynamics broke a structure.

    Parameters
    ----------
    specialist
        Whose dynamics visits the copies.
    frames
        Where they start.
    options
        Temperature and interval, or random displacements at temperature 0.
    n_copies
        Of every frame.
    """
    originals = [bare(atoms) for atoms in frames]
    if not n_copies or not frames:
        return originals
    if options.temperature:
        return [*originals, *visited(specialist, originals, options, n_copies=n_copies)]
    rng = np.random.default_rng(options.seed)
    return [
        *originals,
        *(
            displaced(a, rattle=options.displacement, strain=0.0, rng=rng)
            for _ in range(n_copies)
            for a in originals
        ),
    ]


def visited(
    specialist: ForceField, frames: Sequence[Atoms], options: AugmentationOptions, *, n_copies: int
) -> list[Atoms]:
    """What the specialist's dynamics visits from every frame.

    Parameters
    ----------
    specialist, frames, n_copies
        As for :func:`with_copies`.
    options
        Temperature, and the interval between visited structures.
    """
    every = max(round(options.interval / TIMESTEP), 1)
    starts = [atoms.copy() for atoms in frames]
    for atoms in starts:
        atoms.set_masses(np.full(len(atoms), MASS))
    seeds = [(options.seed, k) for k in range(len(starts))]  # of a replica, whatever the group
    sizes = _edge_counts(specialist, starts)
    groups = chunks(zip(starts, seeds, sizes, strict=True), MAX_EDGES, size=lambda one: one[2])
    visits: dict[int, list[Atoms]] = {}
    for k, group in mine(groups):
        runs = run_replicas(
            specialist.potential,
            [atoms for atoms, _, _ in group],
            ensemble="nvt",
            temperature=options.temperature,
            timestep=TIMESTEP,
            steps=every * n_copies,
            every=every,
            friction=FRICTION,
            seed=[seed for _, seed, _ in group],
        )
        visits[k] = [bare(atoms) for run in runs for atoms in run.frames[1:]]
    return [atoms for visit in gathered(visits) for atoms in visit]


def copies_per_frame(specialist: ForceField, frames: Sequence[Atoms], options: AugmentationOptions) -> int:
    """How many copies of every frame stay within a number of edges, at least one where any are wanted.

    Parameters
    ----------
    specialist
        Whose cutoff counts the edges.
    frames
        All frames that will be copied.
    options
        ``copies`` and ``max_copied_edges``.
    """
    if options.copies <= 1:
        return options.copies
    n_edges = sum(_edge_counts(specialist, frames))
    return min(options.copies, max(options.max_copied_edges // max(n_edges, 1), 1))


def _edge_counts(specialist: ForceField, frames: Sequence[Atoms]) -> list[int]:
    return [build_graph(atoms, specialist.cutoff).n_edges for atoms in frames]
