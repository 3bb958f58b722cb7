"""Neighbours found where the potential computes, so that only positions travel to a GPU and never the edges.

By NVIDIA's ALCHEMI toolkit (``pip install "ase-gffmerge[gpu]"``), which is used on CUDA devices whenever it is installed.
"""

import threading
from functools import cache
from importlib.util import find_spec

import torch
from ase import Atoms
from torch import Tensor

from ase_gffmerge.graphs.neighbor_list import check_geometry, enclosing_box, wrapped

_ONE_AT_A_TIME = threading.Lock()  # kernels are compiled on first use


def can_search_on(device: torch.device) -> bool:
    """Whether neighbours are searched on the device itself: a GPU, when the toolkit is installed."""
    return device.type == "cuda" and _installed()


@cache
def _installed() -> bool:
    return find_spec("nvalchemiops") is not None


def find_neighbors_on_device(atoms: Atoms, cutoff: float, *, device: torch.device) -> tuple[Tensor, Tensor]:
    """Directed edges between atoms closer than ``cutoff``, in the order of :func:`~ase_gffmerge.graphs.find_neighbors`.

    Parameters
    ----------
    atoms
        Any structure; positions need not be wrapped and are not changed.
    cutoff
        Radius in Å.
    device
        Where to search, and where the edges stay.

    Returns
    -------
    edge_index : (2, n_edges) int64
        Sender j in row 0 and receiver i in row 1.
    shifts : (n_edges, 3) int64
        Cell shifts S such that the edge vector is ``r_j - r_i + S @ cell``.

    Raises
    ------
    StructureError
        As :func:`~ase_gffmerge.graphs.find_neighbors` does.
    """
    check_geometry(atoms, cutoff)
    if len(atoms) == 0:
        empty = torch.zeros(0, dtype=torch.long, device=device)
        return empty.expand(2, 0), empty.expand(3, 0).T
    origin, box = enclosing_box(atoms, cutoff)
    cells = wrapped(atoms.positions, box, origin=origin, pbc=atoms.pbc)[1]
    near = atoms.positions - cells @ box - origin
    positions, cell = (torch.tensor(array, dtype=torch.float64, device=device) for array in (near, box))
    with _ONE_AT_A_TIME:
        (receiver, sender), shifts = _pairs(
            positions, cell.contiguous(), torch.tensor(atoms.pbc, device=device), cutoff
        )
    receiver, sender, wraps = receiver.long(), sender.long(), torch.tensor(cells, device=device)
    shifts = shifts.long() + wraps[receiver] - wraps[sender]
    order = torch.arange(len(receiver), device=device)
    for column in (*shifts.T.flip(0), sender, receiver):
        order = order[column[order].argsort(stable=True)]
    return torch.stack([sender, receiver])[:, order], shifts[order]


def _pairs(positions: Tensor, cell: Tensor, pbc: Tensor, cutoff: float) -> tuple[Tensor, Tensor]:
    """Atoms i and j (2, n_edges) and shifts (n_edges, 3), with room for as many neighbours as there are."""
    from nvalchemiops.neighbors.neighbor_utils import NeighborOverflowError
    from nvalchemiops.torch.neighbors import neighbor_list

    room: dict[str, int] = {}
    while True:
        try:
            pairs, _, shifts = neighbor_list(
                positions, cutoff, cell=cell[None], pbc=pbc[None], return_neighbor_list=True, **room
            )
        except NeighborOverflowError as overflow:
            room = {"max_neighbors": overflow.num_neighbors}
        else:
            return pairs, shifts
