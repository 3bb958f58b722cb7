"""Exchange of rows between the domains of LAMMPS's processes by MPI, from nothing but the atoms' IDs.

A ghost is a copy of an atom with the same ID. Owners are found by a directory that is spread over all processes: the one
numbered ``ID modulo processes`` is told who owns an atom, and asked. After that, rows travel only between processes that
share atoms, by neighbourhood collectives.
"""

from dataclasses import dataclass

import numpy as np
import torch
from mpi4py import MPI
from torch import Tensor


@dataclass(frozen=True)
class _Rows:
    """Rows of a domain that have partners elsewhere: first those whose partners are in the same domain, then by peer."""

    index: Tensor
    n_own: int
    counts: list[int]


class Halo:
    """Who owns the ghosts of a domain, and who has ghosts of its own atoms; all processes make it together.

    Periodic images are folded: an image of an own atom is that atom, and all images of another domain's atom are one ghost.

    Parameters
    ----------
    comm
        Of all processes.
    ids
        Of LAMMPS's own atoms and ghosts (n_all,), own ones first.
    nlocal
        Number of own atoms.
    fold
        Whether images are folded.

    Attributes
    ----------
    nlocal, ntotal
        Own atoms, and these with the ghosts that are left.
    place : (n_all,)
        Row here of each of LAMMPS's atoms and ghosts.
    source : (n_total,)
        The other way round; of several images the first.
    """

    def __init__(self, comm: MPI.Intracomm, ids: np.ndarray, nlocal: int, *, fold: bool):
        owner, row = _owners(comm, ids[:nlocal].astype(np.int64), ids[nlocal:].astype(np.int64))
        self.nlocal, self.place = nlocal, np.arange(len(ids))
        self.source = self.place
        if fold:
            away = np.flatnonzero(owner != comm.rank)
            self.place[nlocal:] = row
            _, first, rank = np.unique(
                np.stack([owner[away], row[away]]), axis=1, return_index=True, return_inverse=True
            )
            self.place[nlocal + away] = nlocal + rank.reshape(-1)
            self.source = np.concatenate([np.arange(nlocal), nlocal + away[first]])
            owner, row = owner[away[first]], row[away[first]]
        self.ntotal = len(self.source)
        ghosts = [np.flatnonzero(owner == rank) for rank in range(comm.size)]
        copied: list[np.ndarray] = comm.alltoall([row[held] for held in ghosts])
        peers = [r for r in range(comm.size) if r != comm.rank and (len(ghosts[r]) or len(copied[r]))]

        def rows(lists: list[np.ndarray]) -> _Rows:
            index = np.concatenate([lists[r] for r in (comm.rank, *peers)])
            return _Rows(torch.as_tensor(index), len(lists[comm.rank]), [len(lists[r]) for r in peers])

        self._ghosts, self._copied = rows([nlocal + held for held in ghosts]), rows(copied)
        self._graph = comm.Create_dist_graph_adjacent(peers, peers)

    def free(self) -> None:
        """Give back MPI's object, of which there is a limited number."""
        self._graph.Free()

    def forward_exchange(self, features: Tensor, out: Tensor, width: int) -> None:
        """Copy rows of own atoms and fill those of ghosts.

        Parameters
        ----------
        features, out : (n_total, width)
            Of a CPU.
        width
            Numbers per atom.
        """
        out.copy_(features)
        out[self._ghosts.index] = self._moved(features, self._copied, self._ghosts, width)

    def reverse_exchange(self, features: Tensor, out: Tensor, width: int) -> None:
        """Copy rows of own atoms and add what other domains hold for them.

        Parameters
        ----------
        features, out : (n_total, width)
            Of a CPU.
        width
            Numbers per atom.
        """
        out[: self.nlocal] = features[: self.nlocal]
        out[self.nlocal :] = 0
        out.index_add_(0, self._copied.index, self._moved(features, self._ghosts, self._copied, width))

    def _moved(self, features: Tensor, leaving: _Rows, coming: _Rows, width: int) -> Tensor:
        """Rows that come in exchange for those that leave; those between images in the same domain stay here."""
        rows = features[leaving.index]
        got = features.new_empty(sum(coming.counts), width)
        sent = [rows[leaving.n_own :].numpy(), [width * n for n in leaving.counts]]
        self._graph.Neighbor_alltoallv(sent, [got.numpy(), [width * n for n in coming.counts]])
        return torch.cat([rows[: leaving.n_own], got])


def _owners(comm: MPI.Intracomm, own: np.ndarray, ghosts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rank that owns each ghost, and its row there."""
    home = own % comm.size
    told = comm.alltoall([np.stack([own[home == r], np.flatnonzero(home == r)]) for r in range(comm.size)])
    rank = np.repeat(np.arange(comm.size), [table.shape[1] for table in told])
    ids, rows = np.concatenate(told, axis=1)
    order = np.argsort(ids, kind="stable")
    table = np.stack([rank, rows])[:, order]
    home = ghosts % comm.size
    asked = comm.alltoall([ghosts[home == r] for r in range(comm.size)])
    answers = comm.alltoall([table[:, np.searchsorted(ids[order], query)] for query in asked])
    found = np.empty((2, len(ghosts)), dtype=np.int64)
    for r, answer in enumerate(answers):
        found[:, home == r] = answer
    return found[0], found[1]
