"""Neighbor lists for molecules, slabs, crystals, mixed boundary conditions and structures that are mostly vacuum.

On CUDA devices, NVIDIA's ALCHEMI toolkit (``pip install "ase-gffmerge[gpu]"``) is used whenever it is installed: neighbors
are found where the potential computes, so that only positions travel to the GPU and never the edges.
"""

import threading
from functools import cache
from importlib.util import find_spec

import numpy as np
import torch
from ase import Atoms
from ase.geometry import complete_cell
from matscipy.neighbours import neighbour_list as matscipy_neighbors
from scipy.spatial import cKDTree
from torch import Tensor

from ase_gffmerge.errors import EvaluationFailed, StructureError

MAX_BINS = 100_000  # of side ``cutoff`` in matscipy's grid; a cell with more that are mostly empty is searched by a tree

MAX_COMPARED = 200
"""Atoms of a molecule of which all pairs are compared; a grid is faster for more."""

MAX_IMAGES = 10_000
"""Of an atom within the cutoff, by the heights of the cell: real cells have a few hundred."""

MAX_COORDINATE = 1e9
"""Å from the origin; there neighboring float64 numbers are 1.2e-7 Å apart, as float32 numbers are around 1 Å.

Beyond it the length of a bond would be known less precisely than in single precision, whatever computes with it.
"""


def find_neighbors(atoms: Atoms, cutoff: float) -> tuple[np.ndarray, np.ndarray]:
    """Directed edges between atoms closer than ``cutoff``, periodic images included.

    They are ordered by receiver, sender and shift, so that results depend on the structure alone and not, in their last
    digits, on how its neighbors were searched.

    Parameters
    ----------
    atoms
        Any structure; positions need not be wrapped and are not changed.
    cutoff
        Radius in Å.

    Returns
    -------
    edge_index : (2, n_edges) int64
        Sender j in row 0 and receiver i in row 1 (torch_geometric's ``source_to_target``).
    shifts : (n_edges, 3) int64
        Cell shifts S such that the edge vector is ``r_j - r_i + S @ cell``.

    Raises
    ------
    StructureError
        When positions or cell are not finite, atoms are further than :data:`MAX_COORDINATE` from the origin, a periodic
        direction has no cell vector, or the cell is nearly flat.
    """
    check_geometry(atoms, cutoff)
    positions = atoms.get_positions()
    if not atoms.pbc.any() and len(atoms) <= MAX_COMPARED:
        return _compared(positions, cutoff)
    origin, box = enclosing_box(atoms, cutoff)
    bins = np.prod(np.floor(1 / (cutoff * np.linalg.norm(np.linalg.inv(box), axis=0))).clip(1))
    inside, cells = wrap_positions(positions, box, origin=origin, pbc=atoms.pbc)
    if bins > max(MAX_BINS, 10 * len(atoms)):
        receiver, sender, shifts = kdtree_neighbors(inside, box, pbc=atoms.pbc, cutoff=cutoff)
    else:  # whose cost grows with the distance of an atom from its cell
        near = positions - cells @ box
        receiver, sender, shifts = matscipy_neighbors(
            "ijS", cutoff=cutoff, positions=near, cell=box, pbc=atoms.pbc, cell_origin=origin
        )
    return _ordered(receiver, sender, shifts + cells[receiver] - cells[sender])


def _compared(positions: np.ndarray, cutoff: float) -> tuple[np.ndarray, np.ndarray]:
    """Edges of a molecule, by the distances of all pairs of its atoms; they come in order."""
    vectors = positions[:, None] - positions
    near = np.einsum("ijk,ijk->ij", vectors, vectors) < cutoff**2
    np.fill_diagonal(near, val=False)
    receiver, sender = np.nonzero(near)
    return np.stack([sender, receiver]), np.zeros((len(sender), 3), dtype=np.int64)


def _ordered(receiver: np.ndarray, sender: np.ndarray, shifts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Edges sorted by receiver, sender and shift."""
    if len(receiver) == 0:
        return np.zeros((2, 0), dtype=np.int64), np.zeros((0, 3), dtype=np.int64)
    columns = (receiver, sender, *(shifts - shifts.min(axis=0)).T)
    extents = [int(column.max()) + 1 for column in columns]
    if np.prod(extents, dtype=float) < np.iinfo(np.int64).max:
        order = np.argsort(np.ravel_multi_index(columns, extents), kind="stable")
    else:  # atoms that drifted millions of cells apart
        order = np.lexsort(columns[::-1])
    return np.stack([sender, receiver])[:, order].astype(np.int64), shifts[order].astype(np.int64)


def kdtree_neighbors(
    inside: np.ndarray, box: np.ndarray, *, pbc: np.ndarray, cutoff: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs of atoms closer than ``cutoff``, periodic images included.

    Parameters
    ----------
    inside
        Fractional coordinates (n_atoms, 3), from 0 to 1 along periodic directions
        (:func:`~ase_gffmerge.graphs.neighbor_list.wrap_positions`).
    box
        Vectors (3, 3) of the cell in Å, as rows.
    pbc
        Which of the three directions are periodic.
    cutoff
        Radius in Å.

    Returns
    -------
    receiver, sender : (n_edges,) int64
        Atoms i and j.
    shifts : (n_edges, 3) int64
        Cell shifts S such that the edge vector is ``(inside_j - inside_i + S) @ box``.
    """
    atom, images = images_within(inside, box, pbc=pbc, cutoff=cutoff)
    receivers, neighbors = cKDTree(inside @ box), cKDTree((inside[atom] + images) @ box)
    pairs = receivers.sparse_distance_matrix(neighbors, cutoff, output_type="ndarray")
    receiver, sender, image = pairs["i"], atom[pairs["j"]], images[pairs["j"]]
    proper = (receiver != sender) | image.any(axis=1)
    return receiver[proper], sender[proper], image[proper]


def images_within(
    fractional: np.ndarray, box: np.ndarray, *, pbc: np.ndarray, cutoff: float
) -> tuple[np.ndarray, np.ndarray]:
    """Atoms (n_images,) and shifts (n_images, 3) of all images no further than ``cutoff`` outside any face of the cell.

    The distance between the faces across direction k is the inverse length of the k-th reciprocal vector.

    Parameters
    ----------
    fractional
        Fractional coordinates (n_atoms, 3), within the cell along periodic directions.
    box
        Cell vectors (3, 3) as rows, Å.
    pbc
        Which directions are periodic.
    cutoff
        Å.
    """
    atom = np.arange(len(fractional))
    images = np.zeros((len(fractional), 3), dtype=np.int64)
    margins = cutoff * np.linalg.norm(np.linalg.inv(box), axis=0)
    for k in np.flatnonzero(pbc):
        reach = int(np.ceil(margins[k]))
        steps = np.arange(-reach, reach + 1)
        place = fractional[atom, k] + steps[:, None]
        step, row = np.nonzero((place >= -margins[k]) & (place <= 1 + margins[k]))
        atom, images = atom[row], images[row]
        images[:, k] = steps[step]
    return atom, images


def wrap_positions(
    positions: np.ndarray, box: np.ndarray, *, origin: np.ndarray, pbc: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    r"""Find the cell of every atom, and where in that cell it is.

    With edges found between the wrapped atoms, ``shifts + cells[receiver] - cells[sender]`` are those of the atoms
    themselves: :math:`\mathbf r = \mathbf r' + \mathbf n H` gives
    :math:`\mathbf r'_j - \mathbf r'_i + S' H = \mathbf r_j - \mathbf r_i + (S' + \mathbf n_i - \mathbf n_j) H`.

    Parameters
    ----------
    positions
        (n_atoms, 3) in Å.
    box, origin
        Vectors (3, 3), as rows, and corner (3,) of the first cell in Å.
    pbc
        Which of the three directions are periodic.

    Returns
    -------
    inside : (n_atoms, 3) float64
        Fractional coordinates, from 0 to 1 along periodic directions.
    cells : (n_atoms, 3) int64
        Number of box vectors taken away; 0 along open directions.
    """
    fractional = (positions - origin) @ np.linalg.inv(box)
    cells = np.where(pbc, np.floor(fractional), 0.0)
    return fractional - cells, cells.astype(np.int64)


def enclosing_box(atoms: Atoms, cutoff: float) -> tuple[np.ndarray, np.ndarray]:
    """Origin and cell for the search grid: real vectors where periodic, a bounding box elsewhere.

    Open directions get a vector orthogonal to the periodic ones and as long as the structure, so that a
    molecule far from the origin or in a huge vacuum costs no more than one at the origin.

    Returns
    -------
    origin : (3,) float64
    box : (3, 3) float64, rows are vectors
    """
    pbc = atoms.pbc
    if pbc.all():
        return np.zeros(3), np.asarray(atoms.cell.array, dtype=float)
    periodic = np.where(pbc[:, None], atoms.cell.array, 0.0)
    box = complete_cell(periodic)
    unit = box[~pbc] / np.linalg.norm(box[~pbc], axis=1, keepdims=True)
    heights = atoms.get_positions() @ unit.T
    lower, upper = heights.min(axis=0), heights.max(axis=0)
    margin = 0.1 * cutoff
    box[~pbc] = unit * (upper - lower + 2 * margin)[:, None]
    return (lower - margin) @ unit, box


def check_geometry(atoms: Atoms, cutoff: float) -> None:
    """Raise :class:`StructureError` for structures that have no neighbor list, or one that nobody would wait for."""
    if not np.isfinite(atoms.get_positions()).all():
        bad = np.flatnonzero(~np.isfinite(atoms.get_positions()).all(axis=1))
        raise StructureError(
            f"the positions of atom(s) {bad[:5].tolist()} of {atoms.get_chemical_formula()} are not finite; "
            "look at the step before this one: a too long time step or overlapping atoms are the usual cause"
        )
    _check_reach(atoms)
    cell = atoms.cell.array
    if not np.isfinite(cell).all():
        formula = atoms.get_chemical_formula()
        raise StructureError(f"the cell of {formula} is not finite; set atoms.cell again")
    missing = atoms.pbc & ~cell.any(axis=1)
    rank_deficient = np.linalg.matrix_rank(cell[atoms.pbc]) < atoms.pbc.sum() if atoms.pbc.any() else False
    if missing.any() or rank_deficient:
        directions = np.flatnonzero(missing).tolist() or np.flatnonzero(atoms.pbc).tolist()
        raise StructureError(
            f"{atoms.get_chemical_formula()} is periodic along direction(s) {directions} but has no "
            "independent cell vector there; set atoms.cell, or atoms.pbc = False for that direction"
        )
    _check_images(atoms, cutoff)


def _check_reach(atoms: Atoms) -> None:
    """Raise :class:`EvaluationFailed` for atoms so far away that float64 does not resolve their distances any more."""
    distances = np.abs(atoms.positions).max(axis=1, initial=0.0)
    far = np.flatnonzero(distances > MAX_COORDINATE)
    if far.size:
        furthest = distances.max()
        raise EvaluationFailed(
            f"atom(s) {far[:5].tolist()} of {atoms.get_chemical_formula()} are up to {furthest:.1e} Å from the origin, "
            f"where positions are only known to {np.spacing(furthest):.1e} Å (the limit is {MAX_COORDINATE:.0e} Å); look at "
            "the step before this one: a too long time step is the usual cause, so try a shorter one; if the structure "
            "itself is fine, move it to the origin (atoms.positions -= atoms.positions.mean(axis=0))"
        )


def _check_images(atoms: Atoms, cutoff: float) -> None:
    """Refuse cells so flat or so skewed that a search over their periodic images would not end."""
    if not atoms.pbc.any():
        return
    box = complete_cell(np.where(atoms.pbc[:, None], atoms.cell.array, 0.0))
    with np.errstate(over="ignore"):
        reach = cutoff * np.linalg.norm(np.linalg.inv(box), axis=0)[atoms.pbc]
        images = np.prod(reach.clip(1))
    if images > MAX_IMAGES:
        heights = ", ".join(f"{cutoff / along:.2g}" for along in reach)
        raise StructureError(
            f"the cell of {atoms.get_chemical_formula()} is only {heights} Å high along its periodic directions, so that "
            f"about {images:.0e} periodic images lie within the cutoff of {cutoff:g} Å, too many to search; look at the "
            "step before this one (a cell that collapsed is the usual cause), or describe the same crystal by vectors that "
            "are less parallel (ase.build.niggli_reduce)"
        )


_ONE_AT_A_TIME = threading.Lock()  # kernels are compiled on first use


def can_search_on(device: torch.device) -> bool:
    """Whether neighbors are searched on the device itself: a GPU, when the toolkit is installed."""
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
    cells = wrap_positions(atoms.positions, box, origin=origin, pbc=atoms.pbc)[1]
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
    """Atoms i and j (2, n_edges) and shifts (n_edges, 3), with room for as many neighbors as there are."""
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
