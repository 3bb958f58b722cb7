"""The graph of a batch of moving structures, whose neighbour lists last for many steps."""

from collections.abc import Sequence

import torch
from ase import Atoms
from torch import Tensor
from torch_geometric.data import Data

from ase_gffmerge.graphs.batches import build_graph, edge_vectors


class VerletGraph:
    """Batch graph of structures in motion, with a skin around the cutoff (Verlet, doi:10.1103/PhysRev.159.98).

    Candidate edges reach to ``cutoff + skin``; those of a structure are found again when one of its atoms has moved
    further than ``skin/2`` since. Every graph handed out holds exactly the edges shorter than ``cutoff``. Cells are
    fixed, and positions must not be wrapped.

    Parameters
    ----------
    structures
        Elements, cells and initial positions.
    cutoff, skin
        Å. Without a skin every step finds all neighbours again.
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

    def _candidates(self, k: int) -> Data:
        """Graph of structure ``k`` with edges up to ``cutoff + skin``."""
        return build_graph(self._structures[k], self.cutoff + self.skin, specialist=self._specialist[k]).to(
            self.device
        )

    def _join(self) -> None:
        """Concatenate the structures' candidate graphs."""
        counts = torch.tensor([len(atoms) for atoms in self._structures])
        ends = counts.cumsum(0).tolist()
        self.slices = [slice(end - n, end) for n, end in zip(counts.tolist(), ends, strict=True)]
        self.structure_index = torch.repeat_interleave(torch.arange(len(counts)), counts).to(self.device)
        fields = {
            key: torch.cat([graph[key] for graph in self._graphs])
            for key in ("pos", "atomic_numbers", "specialist", "cell", "shifts")
        }
        edges = [graph.edge_index + part.start for graph, part in zip(self._graphs, self.slices, strict=True)]
        self._all = Data(edge_index=torch.cat(edges, dim=1), batch=self.structure_index, **fields)

    def keep(self, kept: Sequence[int]) -> None:
        """Go on with the structures of these indices."""
        for name in ("_structures", "_specialist", "_graphs"):
            setattr(self, name, [getattr(self, name)[k] for k in kept])
        self._join()

    def at(self, positions: Tensor) -> Data:
        """Give the batch graph at ``positions`` (n_atoms, 3) in Å, float64."""
        moved = (positions - self._all.pos).square().sum(dim=1) > (self.skin / 2) ** 2
        if moved.any():
            self._update(positions, torch.unique(self.structure_index[moved]).tolist())
        inside = edge_vectors(self._all, positions).square().sum(dim=1) < self.cutoff**2
        chosen = inside.nonzero()[:, 0]
        return Data(
            pos=positions,
            atomic_numbers=self._all.atomic_numbers,
            specialist=self._all.specialist,
            cell=self._all.cell,
            edge_index=self._all.edge_index[:, chosen],
            shifts=self._all.shifts[chosen],
            batch=self.structure_index,
        )

    def _update(self, positions: Tensor, which: Sequence[int]) -> None:
        """Find the candidate edges of some structures again."""
        for k in which:
            self._structures[k].positions = positions[self.slices[k]].cpu().numpy()
            self._graphs[k] = self._candidates(k)
        self._join()
