"""Neighbours of structures that are mostly vacuum, by a k-d tree: what it costs depends on the atoms, not on the space."""

import numpy as np
from scipy.spatial import cKDTree


def sparse_neighbour_list(
    inside: np.ndarray, box: np.ndarray, *, pbc: np.ndarray, cutoff: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs of atoms closer than ``cutoff``, periodic images included.

    Parameters
    ----------
    inside
        Fractional coordinates (n_atoms, 3), from 0 to 1 along periodic directions
        (:func:`~ase_gffmerge.graphs.wrapping.wrapped`).
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
    receivers, neighbours = cKDTree(inside @ box), cKDTree((inside[atom] + images) @ box)
    pairs = receivers.sparse_distance_matrix(neighbours, cutoff, output_type="ndarray")
    receiver, sender, image = pairs["i"], atom[pairs["j"]], images[pairs["j"]]
    proper = (receiver != sender) | image.any(axis=1)
    return receiver[proper], sender[proper], image[proper]


def images_within(
    fractional: np.ndarray, box: np.ndarray, *, pbc: np.ndarray, cutoff: float
) -> tuple[np.ndarray, np.ndarray]:
    """Atoms and shifts (n_images,), (n_images, 3) of all images no further than ``cutoff`` outside any face of the cell.

    The distance between the faces across direction k is the inverse length of the k-th reciprocal vector.

    Parameters
    ----------
    fractional
        Positions (n_atoms, 3) in units of the cell's vectors; within the cell along periodic directions.
    box
        The cell's vectors (3, 3) in Å, as rows.
    pbc
        Which directions are periodic (3,).
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
