"""Structures as graphs of atoms and edges, one or many in a batch."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Self, TypeVar

import numpy as np
import torch
from ase import Atoms
from torch import Tensor

from ase_gffmerge.graphs.neighbor_list import can_search_on, find_neighbors, find_neighbors_on_device


@dataclass(frozen=True, kw_only=True, eq=False)
class Topology:
    """Which atoms are neighbors: everything in a graph but lengths. With edge vectors it is all that a potential reads.

    Attributes
    ----------
    atomic_numbers, specialist : (n_atoms,) int64
        Elements, and the index of the specialist each atom belongs to (read by per-specialist embeddings).
    edge_index : (2, n_edges) int64
        Sender j in row 0 and receiver i in row 1.
    shifts : (n_edges, 3)
        Cell shifts S such that the edge vector is ``r_j - r_i + S @ cell``.
    structure_index : (n_atoms,) int64
        Which structure of the batch an atom belongs to, ascending.
    """

    atomic_numbers: Tensor
    specialist: Tensor
    edge_index: Tensor
    shifts: Tensor
    structure_index: Tensor

    def __len__(self) -> int:
        """Number of atoms, as of :class:`ase.Atoms`."""
        return len(self.atomic_numbers)

    @property
    def n_edges(self) -> int:
        """Number of directed edges."""
        return self.edge_index.shape[1]


@dataclass(frozen=True, kw_only=True, eq=False)
class TracedTopology(Topology):
    """What a function that is compiled or recorded knows: numbers of atoms and edges, and no values of tensors.

    Attributes
    ----------
    width
        One more than the largest number of edges of an atom, for :attr:`.Potential.pads_neighborhoods`. Atoms with more are
        padding, whose edges have no envelope.
    """

    width: int


@dataclass(frozen=True, kw_only=True, eq=False)
class AtomGraph(Topology):
    """One structure, or a batch of structures, as a graph of atoms and the edges between neighbors.

    Attributes
    ----------
    positions : (n_atoms, 3)
        Å.
    cell : (n_structures, 3, 3)
        Cell vectors as rows, Å; zero along directions that have none.
    """

    positions: Tensor
    cell: Tensor

    @property
    def n_structures(self) -> int:
        """Number of structures."""
        return len(self.cell)

    def get_chemical_formula(self) -> str:
        """Formula of all atoms, as of :class:`ase.Atoms`."""
        return str(Atoms(self.atomic_numbers.tolist()).get_chemical_formula())

    def to(self, device: torch.device) -> Self:
        """Give the same graph on a device."""
        return replace(self, **{field.name: getattr(self, field.name).to(device) for field in fields(self)})


Graph = TypeVar("Graph", bound=AtomGraph)


def build_graph(
    atoms: Atoms,
    cutoff: float,
    *,
    dtype: torch.dtype = torch.float64,
    specialist: int = 0,
    device: torch.device | None = None,
) -> AtomGraph:
    """Build the graph of one structure.

    Parameters
    ----------
    atoms
        The structure.
    cutoff
        Neighbor radius in Å.
    dtype
        Floating-point type of positions, cell and shifts. Neighbors are always found in float64.
    specialist
        Index of the specialist every atom belongs to (used by per-specialist embeddings); overridden per atom
        by an integer array ``atoms.arrays["specialist"]``.
    device
        Where the graph is wanted, and its neighbors are found if the device can; default: the CPU.
    """
    if device is not None and can_search_on(device):
        edge_index, shifts = find_neighbors_on_device(atoms, cutoff, device=device)
    else:
        edge_index, shifts = map(torch.as_tensor, find_neighbors(atoms, cutoff))
    index = atoms.arrays.get("specialist", np.full(len(atoms), specialist))
    graph = AtomGraph(
        positions=torch.as_tensor(atoms.get_positions(), dtype=dtype),
        cell=torch.as_tensor(np.asarray(atoms.cell.array), dtype=dtype)[None],
        atomic_numbers=torch.as_tensor(atoms.numbers, dtype=torch.long),
        specialist=torch.as_tensor(np.asarray(index), dtype=torch.long),
        edge_index=edge_index,
        shifts=shifts.to(dtype),
        structure_index=torch.zeros(len(atoms), dtype=torch.long),
    )
    return graph if device is None else graph.to(device)


def batch_graphs(graphs: Sequence[Graph]) -> Graph:
    """Join graphs of one kind into one batch; ``structure_index`` says which structure an atom belongs to."""
    sizes = torch.tensor([[len(graph), graph.n_structures] for graph in graphs])
    first_atoms, first_structures = (sizes.cumsum(0) - sizes).T.tolist()
    joined: dict[str, Tensor] = {}
    for name in (field.name for field in fields(graphs[0])):
        parts: list[Tensor] = [getattr(graph, name) for graph in graphs]
        if name in ("edge_index", "structure_index"):
            starts = first_atoms if name == "edge_index" else first_structures
            parts = [part + start for part, start in zip(parts, starts, strict=True)]
        joined[name] = torch.cat(parts, dim=1 if name == "edge_index" else 0)
    return replace(graphs[0], **joined)


def edge_vectors(graph: AtomGraph, positions: Tensor | None = None) -> Tensor:
    """Vectors r_j - r_i + S·cell (n_edges, 3) in Å from receiver i to sender j.

    Parameters
    ----------
    graph
        One graph or a batch.
    positions
        (n_atoms, 3) in Å in the place of the graph's.
    """
    positions = graph.positions if positions is None else positions
    sender, receiver = graph.edge_index
    vectors = positions[sender] - positions[receiver]
    if graph.n_structures == 1:
        return vectors + graph.shifts @ graph.cell[0]
    cell = graph.cell[graph.structure_index[sender]]
    return vectors + torch.einsum("ei,eij->ej", graph.shifts, cell)
