r"""Radial distribution functions of periodic systems, by pair of elements.

.. math:: g_{ab}(r) = \Big\langle \frac{V}{N_a N_b} \sum_{i\in a} \sum_{j\in b}
          \frac{\delta(r - |x_i - x_j|)}{4\pi r^2} \Big\rangle ,

where j runs over periodic images as well, so that r may exceed half the cell.
"""

from itertools import combinations_with_replacement

import numpy as np
from ase.data import chemical_symbols
from matscipy.neighbours import neighbour_list

from ase_gffmerge.evaluation.analysis.distances import Distribution, bin_edges


def radial_distributions(
    positions: np.ndarray, numbers: np.ndarray, cells: np.ndarray, *, r_max: float = 6.0, width: float = 0.1
) -> dict[str, Distribution]:
    """g(r) of every pair of elements, averaged over frames periodic in three directions.

    Parameters
    ----------
    positions : (n_frames, n_atoms, 3)
        Å, wrapped or not.
    numbers : (n_atoms,)
        Atomic numbers.
    cells : (3, 3) or (n_frames, 3, 3)
        Å.
    r_max, width
        Range and width of the bins in Å.

    Returns
    -------
    dict
        By pair, such as ``Li-S`` (elements by atomic number); 1 for an ideal gas of many atoms.
    """
    edges = bin_edges(r_max, width)
    elements, element = np.unique(numbers, return_inverse=True)
    counts = np.zeros((len(elements), len(elements), len(edges) - 1))
    for frame, cell in zip(positions, np.broadcast_to(cells, (len(positions), 3, 3)), strict=True):
        counts += _normalised_counts(frame, element, cell, edges)
    shells = 4 / 3 * np.pi * np.diff(edges**3)
    amounts = np.bincount(element)
    return {
        f"{chemical_symbols[elements[a]]}-{chemical_symbols[elements[b]]}": Distribution(
            edges, counts[a, b] / (len(positions) * amounts[a] * amounts[b] * shells)
        )
        for a, b in combinations_with_replacement(range(len(elements)), 2)
    }


def _normalised_counts(
    positions: np.ndarray, element: np.ndarray, cell: np.ndarray, edges: np.ndarray
) -> np.ndarray:
    """Volume (Å^3) times numbers of ordered pairs per bin, (n_elements, n_elements, n_bins), of one frame."""
    i, j, distances = neighbour_list(
        "ijd", cutoff=float(edges[-1]), positions=positions, cell=cell, pbc=np.ones(3, dtype=bool)
    )
    n_elements, n_bins = int(element.max()) + 1, len(edges) - 1
    bins = np.minimum((distances / edges[1]).astype(int), n_bins - 1)
    flat = (element[i] * n_elements + element[j]) * n_bins + bins
    counts = np.bincount(flat, minlength=n_elements**2 * n_bins)
    return abs(np.linalg.det(cell)) * counts.reshape(n_elements, n_elements, n_bins)
