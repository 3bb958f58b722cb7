"""Structures as torch_geometric graphs, and graphs as batches."""

from collections.abc import Sequence

import numpy as np
import torch
from ase import Atoms
from torch import Tensor
from torch_geometric.data import Batch, Data

from ase_gffmerge.graphs.cuda_neighbor_list import device_neighbour_list, searches_on
from ase_gffmerge.graphs.neighbor_list import neighbour_list


def build_graph(
    atoms: Atoms,
    cutoff: float,
    *,
    dtype: torch.dtype = torch.float64,
    specialist: int = 0,
    device: torch.device | None = None,
) -> Data:
    """Build the graph of one structure.

    Parameters
    ----------
    atoms
        The structure.
    cutoff
        Neighbour radius in Å.
    dtype
        Floating-point type of positions and cell. The neighbour list itself is always found in float64.
    specialist
        Index of the specialist every atom belongs to (used by per-specialist embeddings); overridden per atom
        by an integer array ``atoms.arrays["specialist"]``.
    device
        Where the graph is wanted, and its neighbours are found if the device can; default: the CPU.

    Returns
    -------
    torch_geometric.data.Data
        ``pos`` (n_atoms, 3) Å, ``atomic_numbers`` (n_atoms,), ``specialist`` (n_atoms,), ``cell`` (1, 3, 3)
        Å, ``edge_index`` (2, n_edges) sender and receiver, ``shifts`` (n_edges, 3).
    """
    if device is not None and searches_on(device):
        edge_index, shifts = device_neighbour_list(atoms, cutoff, device=device)
    else:
        edge_index, shifts = map(torch.as_tensor, neighbour_list(atoms, cutoff))
    index = atoms.arrays.get("specialist", np.full(len(atoms), specialist))
    graph = Data(
        pos=torch.as_tensor(atoms.get_positions(), dtype=dtype),
        atomic_numbers=torch.as_tensor(atoms.numbers, dtype=torch.long),
        specialist=torch.as_tensor(np.asarray(index), dtype=torch.long),
        cell=torch.as_tensor(np.asarray(atoms.cell.array), dtype=dtype)[None],
        edge_index=edge_index,
        shifts=shifts.to(dtype),
    )
    return graph if device is None else graph.to(device)


def batch_graphs(graphs: Sequence[Data]) -> Batch:
    """Join graphs into one batch; ``batch.batch`` (n_atoms,) tells which structure an atom belongs to."""
    return Batch.from_data_list(list(graphs))


def structure_index(graph: Data) -> Tensor:
    """Index (n_atoms,) of the structure each atom belongs to; zeros for a single graph."""
    index = getattr(graph, "batch", None)
    return torch.zeros(len(graph.pos), dtype=torch.long, device=graph.pos.device) if index is None else index


def edge_vectors(graph: Data, positions: Tensor | None = None) -> Tensor:
    """Vectors r_j - r_i + S·cell (n_edges, 3) in Å from receiver i to sender j."""
    positions = graph.pos if positions is None else positions
    sender, receiver = graph.edge_index
    vectors = positions[sender] - positions[receiver]
    if len(graph.cell) == 1:
        return vectors + graph.shifts @ graph.cell[0]
    cell = graph.cell[graph.batch[sender]]
    return vectors + torch.einsum("ei,eij->ej", graph.shifts, cell)
