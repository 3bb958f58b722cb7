r"""The graph of a batch of moving structures, whose neighbor lists last for many steps.

When a list remains exact
-------------------------
At the reference positions :math:`\mathbf R_i` and cell :math:`H` (rows are vectors) the candidates are all pairs with
:math:`|\mathbf D| < c + s`, where :math:`\mathbf D = \mathbf R_j - \mathbf R_i + S H`, c is the cutoff and s the skin. Let
:math:`F` be any linear map that takes the periodic cell vectors to those of now, :math:`H F = h`, and

.. math:: \mathbf w_i = \mathbf r_i - \mathbf R_i F

what an atom moved beyond that strain. The vector of the same pair is now
:math:`\mathbf d = \mathbf D F + \mathbf w_j - \mathbf w_i`, hence

.. math:: |\mathbf d| \ge \sigma_{\min}(F)\,|\mathbf D| - 2 \max_i |\mathbf w_i - \bar{\mathbf w}| ,

with the smallest singular value of F. A pair outside the candidates had :math:`|\mathbf D| \ge c + s` and stays outside the
cutoff as long as :math:`2 \max_i |\mathbf w_i - \bar{\mathbf w}| \le \sigma_{\min}(F)(c + s) - c`. With a fixed cell that is
the familiar half skin; translating or rotating everything, cell included, or shearing an atom far from the origin along
with its cell costs nothing.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from ase import Atoms
from torch import Tensor

from ase_gffmerge.graphs.graph import AtomGraph, batch_graphs, build_graph, edge_vectors
from ase_gffmerge.graphs.neighbor_list import MAX_COORDINATE


class VerletGraph:
    """Batch graph of structures in motion, with a skin around the cutoff (Verlet, doi:10.1103/PhysRev.159.98).

    Candidate edges reach to ``cutoff + skin``; those of a structure are found again when its atoms or its cell have moved
    too far since (see the module). Every graph handed out holds exactly the edges shorter than ``cutoff``, in the order of
    :func:`~ase_gffmerge.graphs.find_neighbors`, so that skin and history leave no trace in the results. Wrapping positions
    is allowed, but costs a search.

    Parameters
    ----------
    structures
        Elements, boundary conditions, and the cells and positions to begin with.
    cutoff, skin
        Å. Without a skin every step finds all neighbors again.
    device
        Where the graph lives; its geometry is float64.
    specialist
        Specialist index of every structure (``atoms.arrays["specialist"]`` overrides it per atom).
    """

    def __init__(
        self,
        structures: Sequence[Atoms],
        *,
        cutoff: float,
        skin: float,
        device: torch.device,
        specialist: Sequence[int],
    ):
        self.cutoff, self.skin, self.device = cutoff, skin, device
        self._structures = [atoms.copy() for atoms in structures]
        self._specialist = list(specialist)
        self._graphs = [self._candidates(k) for k in range(len(self._structures))]
        self._join()

    def _candidates(self, k: int) -> AtomGraph:
        """Graph of structure ``k`` with edges up to ``cutoff + skin``."""
        return build_graph(
            self._structures[k],
            self.cutoff + self.skin,
            specialist=self._specialist[k],
            device=self.device,
        )

    def _join(self) -> None:
        """Concatenate the structures' candidate graphs."""
        counts = torch.tensor([len(atoms) for atoms in self._structures])
        ends = counts.cumsum(0).tolist()
        self.slices = [slice(end - n, end) for n, end in zip(counts.tolist(), ends, strict=True)]
        self._periodic = torch.tensor(np.stack([atoms.pbc for atoms in self._structures]))
        self._counts = counts.to(self.device)[:, None]
        self._all = batch_graphs(self._graphs)
        self.structure_index = self._all.structure_index

    def keep(self, kept: Sequence[int]) -> None:
        """Go on with the structures of these indices."""
        for name in ("_structures", "_specialist", "_graphs"):
            setattr(self, name, [getattr(self, name)[k] for k in kept])
        self._join()

    def at(self, positions: Tensor, cells: Tensor | None = None) -> AtomGraph:
        """Give the batch graph at ``positions`` (n_atoms, 3) and ``cells`` (n_structures, 3, 3) in Å, float64.

        Without ``cells`` they are what they were.
        """
        cells = self._all.cell if cells is None else cells
        outdated = self._outdated(positions, cells)
        if outdated.any():
            self._update(positions, cells, outdated.nonzero()[:, 0].tolist())
        graph = replace(self._all, positions=positions, cell=cells)
        chosen = (edge_vectors(graph).square().sum(dim=1) < self.cutoff**2).nonzero()[:, 0]
        return replace(graph, edge_index=graph.edge_index[:, chosen], shifts=graph.shifts[chosen])

    def _outdated(self, positions: Tensor, cells: Tensor) -> Tensor:
        """Which structures (n_structures,) may have pairs within the cutoff that are no candidates."""
        reference, shrinkage = self._all.positions, positions.new_ones(len(cells))
        if not torch.equal(cells, self._all.cell):
            if not cells.isfinite().all():
                return torch.ones_like(shrinkage, dtype=torch.bool)
            maps = strain_maps(self._all.cell.cpu(), cells.cpu(), periodic=self._periodic)
            shrinkage = torch.linalg.svdvals(maps)[:, -1].to(self.device)
            reference = torch.einsum("ni,nij->nj", reference, maps.to(self.device)[self.structure_index])
        moves, index = positions - reference, self.structure_index
        mean = moves.new_zeros(len(cells), 3).index_add(0, index, moves) / self._counts
        furthest = moves.new_zeros(len(cells)).scatter_reduce(
            0, index, (moves - mean[index]).norm(dim=1), "amax"
        )
        exact = 2 * furthest <= shrinkage * (self.cutoff + self.skin) - self.cutoff
        return ~exact | (positions.abs() > MAX_COORDINATE).any()  # which a new search refuses

    def _update(self, positions: Tensor, cells: Tensor, which: Sequence[int]) -> None:
        """Find the candidate edges of some structures again."""
        for k in which:
            self._structures[k].positions = positions[self.slices[k]].cpu().numpy()
            self._structures[k].cell = cells[k].cpu().numpy()
            self._graphs[k] = self._candidates(k)
        self._join()


def strain_maps(before: Tensor, after: Tensor, *, periodic: Tensor) -> Tensor:
    """Linear maps F (n, 3, 3) that take the periodic rows of cells ``before`` to those of ``after`` (n, 3, 3).

    F is the identity on everything orthogonal to them: :math:`F = 1 + H^+ (h - H)` with the rows of open directions set to
    zero.

    Parameters
    ----------
    before, after
        Cells (n, 3, 3) in Å: H and h.
    periodic
        Which directions are periodic (n, 3).
    """
    before, after = (torch.where(periodic[:, :, None], cells, 0.0) for cells in (before, after))
    return torch.eye(3, dtype=before.dtype, device=before.device) + torch.linalg.pinv(before) @ (
        after - before
    )


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
