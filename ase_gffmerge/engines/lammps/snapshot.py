"""Atoms, ghosts and pairs of one domain at one step of a run, and what it costs."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
from matscipy.neighbours import neighbour_list
from torch import Tensor

from ase_gffmerge.engines.lammps.halo import Halo
from ase_gffmerge.engines.lammps.mliap import Array

SKIN = 1.0
"""Å beyond the cutoff up to which neighbors are searched; LAMMPS has a skin of its own for its ghosts."""


@dataclass
class Costs:
    """What a run took on one process after its first evaluation, in seconds of its processor; numbers of its last step.

    Attributes
    ----------
    network, exchange, neighbors
        Of evaluating the force field; of exchanging features, with waiting for other processes; of finding neighbors.
    total
        Of all, LAMMPS's own part included, up to the last evaluation.
    evaluations, searches
        How often, the first evaluation left out.
    atoms, ghosts, pairs
        Of the last step.
    """

    network: float = 0.0
    exchange: float = 0.0
    neighbors: float = 0.0
    total: float = 0.0
    evaluations: int = 0
    searches: int = 0
    atoms: int = 0
    ghosts: int = 0
    pairs: int = 0

    @contextmanager
    def clock(self, name: str) -> Iterator[None]:
        """Add the processor seconds of a block to one of the numbers."""
        start = time.process_time()
        try:
            yield
        finally:
            setattr(self, name, getattr(self, name) + time.process_time() - start)


@dataclass
class Snapshot:
    """Atoms and pairs of one domain at one step, as :class:`.DomainData` has them.

    Attributes
    ----------
    shifts : (n_pairs, 3)
        Whole numbers that tell the images of an atom apart, see :class:`.Topology`.
    """

    halo: Halo
    costs: Costs
    elems: Array
    pair_i: Array
    pair_j: Array
    rij: Array
    shifts: Array

    @property
    def nlocal(self) -> int:
        """Number of own atoms."""
        return self.halo.nlocal

    @property
    def ntotal(self) -> int:
        """Number of own atoms and ghosts."""
        return self.halo.ntotal

    def forward_exchange(self, features: Tensor, out: Tensor, width: int) -> None:
        """See :meth:`.Halo.forward_exchange`.

        Parameters
        ----------
        features, out, width
            As there.
        """
        with self.costs.clock("exchange"):
            self.halo.forward_exchange(features, out, width)

    def reverse_exchange(self, features: Tensor, out: Tensor, width: int) -> None:
        """See :meth:`.Halo.reverse_exchange`.

        Parameters
        ----------
        features, out, width
            As there.
        """
        with self.costs.clock("exchange"):
            self.halo.reverse_exchange(features, out, width)


@dataclass
class Neighbors:
    """Pairs of one domain within the cutoff, from candidates that last until an atom has moved half a skin.

    Attributes
    ----------
    cutoff
        Å.
    ghosts_receive
        Whether pairs that end at ghosts are wanted, too.
    """

    cutoff: float
    ghosts_receive: bool
    _pairs: tuple[np.ndarray, ...] = field(init=False, default=())
    _places: np.ndarray | None = field(init=False, default=None)

    def forget(self) -> None:
        """Search again next time."""
        self._places = None

    def __call__(self, x: np.ndarray, cell: np.ndarray, halo: Halo, costs: Costs) -> tuple[np.ndarray, ...]:
        """Rows of receivers and senders in the halo, vectors (n_pairs, 3) between them, and shifts (n_pairs, 3).

        Parameters
        ----------
        x
            Positions of LAMMPS's own atoms and ghosts (n_all, 3), Å.
        cell
            Vectors of the box as rows, Å.
        halo
            Of the same atoms.
        costs
            Counts searches.
        """
        if self._places is None or ((x - self._places) ** 2).sum(axis=1).max(initial=0) > (SKIN / 2) ** 2:
            self._places = x.copy()
            self._pairs = self._search(x, cell, halo)
            costs.searches += 1
        i, j, sender, shifts = self._pairs
        vectors = x[j] - x[i]
        near = np.flatnonzero(np.einsum("ij,ij->i", vectors, vectors) < self.cutoff**2)
        return i[near], sender[near], vectors[near], shifts[near]

    def _search(self, x: np.ndarray, cell: np.ndarray, halo: Halo) -> tuple[np.ndarray, ...]:
        """Candidates: i and j among LAMMPS's atoms, rows of j in the halo, and shifts."""
        if len(x) == 0:
            none = np.zeros(0, dtype=np.int64)
            return none, none, none, np.zeros((0, 3))
        low, high = x.min(axis=0) - 1, x.max(axis=0) + 1
        i, j = neighbour_list(
            "ij",
            cutoff=self.cutoff + SKIN,
            positions=x,
            cell=np.diag(high - low),
            pbc=[False] * 3,
            cell_origin=low,
        )
        if not self.ghosts_receive:
            i, j = i[i < halo.nlocal], j[i < halo.nlocal]
        i, j = i.astype(np.int64), j.astype(np.int64)
        shifts = np.round((x - x[halo.source[halo.place]]) @ np.linalg.inv(cell))
        return i, j, halo.place[j], shifts[j]
