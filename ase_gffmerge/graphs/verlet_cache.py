"""Graphs of one structure after another, with neighbour lists that last."""

import numpy as np
import torch
from ase import Atoms

from ase_gffmerge.graphs.graph import AtomGraph
from ase_gffmerge.graphs.verlet import VerletGraph


class VerletCache:
    """Graphs of one structure after another, reusing the candidates of the one before wherever that is exact.

    What is reused depends on the elements, boundary conditions, positions and cell for which the candidates were found,
    never on what a caller says has changed; a structure that cannot have a graph leaves nothing behind.

    Parameters
    ----------
    cutoff, skin
        Å.
    device
        Where the graphs live; their geometry is float64.
    """

    def __init__(self, *, cutoff: float, skin: float, device: torch.device):
        self.cutoff, self.skin, self.device = cutoff, skin, device
        self._last: tuple[Atoms, VerletGraph] | None = None

    def fresh(self) -> "VerletCache":
        """Return an empty one with the same settings."""
        return VerletCache(cutoff=self.cutoff, skin=self.skin, device=self.device)

    def graph(self, atoms: Atoms) -> AtomGraph:
        """Graph of ``atoms`` as :func:`~ase_gffmerge.graphs.build_graph` makes it, on the device.

        Raises
        ------
        StructureError
            When positions or cell are not finite, or a periodic direction has no cell vector.
        """
        last, self._last = self._last, None  # gone after an exception, and out of reach of other threads
        if last is None or not _same_topology(last[0], atoms):
            candidates = VerletGraph(
                [atoms], cutoff=self.cutoff, skin=self.skin, device=self.device, specialist=[0]
            )
            last = atoms.copy(), candidates
        positions = torch.tensor(atoms.positions, dtype=torch.float64, device=self.device)
        cell = torch.tensor(atoms.cell.array, dtype=torch.float64, device=self.device)
        graph = last[1].at(positions, cell[None])
        self._last = last
        return graph


def _same_topology(one: Atoms, other: Atoms) -> bool:
    """Whether elements, boundary conditions and specialists are the same."""
    return (
        np.array_equal(one.numbers, other.numbers)
        and np.array_equal(one.pbc, other.pbc)
        and np.array_equal(one.arrays.get("specialist", 0), other.arrays.get("specialist", 0))
    )
