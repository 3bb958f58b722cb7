r"""Distributions of interatomic distances, how far two are apart, and radial distribution functions by pair of elements.

After Fu et al., "Forces are not enough", arXiv 2210.07237:

.. math:: h(r) = \Big\langle \frac{1}{n(n-1)} \sum_i \sum_{j\neq i} \delta(r - |x_i - x_j|) \Big\rangle ,\qquad
          \mathrm{MAE}(h, \hat h) = \int_0^\infty |h(r) - \hat h(r)|\,dr .

Of periodic systems:

.. math:: g_{ab}(r) = \Big\langle \frac{V}{N_a N_b} \sum_{i\in a} \sum_{j\in b}
          \frac{\delta(r - |x_i - x_j|)}{4\pi r^2} \Big\rangle ,

where j runs over periodic images as well, so that r may exceed half the cell.
"""

from dataclasses import dataclass
from itertools import combinations_with_replacement

import numpy as np
from ase.data import chemical_symbols
from ase.geometry import find_mic
from matscipy.neighbours import neighbour_list


@dataclass(frozen=True)
class Distribution:
    """A function of a distance, constant within bins.

    Attributes
    ----------
    edges : (n_bins + 1,)
        Å, equally spaced.
    values : (n_bins,)
        Mean of the function in each bin: 1/Å for h(r), no unit for g(r).
    """

    edges: np.ndarray
    values: np.ndarray

    @property
    def centres(self) -> np.ndarray:
        """Middles of the bins (n_bins,) in Å."""
        return 0.5 * (self.edges[1:] + self.edges[:-1])


def bin_edges(r_max: float, width: float) -> np.ndarray:
    """Edges (n_bins + 1,) from 0 to ``r_max`` in steps of ``width`` Å; the last bin may reach beyond."""
    return width * np.arange(int(np.ceil(round(r_max / width, 9))) + 1)


def distance_distribution(
    positions: np.ndarray,
    *,
    r_max: float,
    width: float = 0.05,
    cell: np.ndarray | None = None,
    pbc: np.ndarray | bool = False,
) -> Distribution:
    """h(r) of all pairs of atoms, averaged over frames.

    Parameters
    ----------
    positions : (n_frames, n_atoms, 3)
        Å; at least two atoms.
    r_max, width
        Range and width of the bins in Å. Distances beyond the range are counted in the norm, not in a bin.
    cell : (3, 3)
        Å; with ``pbc``, distances are those of the nearest images.
    pbc
        Periodic directions.

    Returns
    -------
    Distribution
        In 1/Å; integrates to 1 when ``r_max`` is beyond the largest distance.
    """
    pairs = np.stack(np.triu_indices(positions.shape[1], k=1), axis=1)
    distances = pair_distances(positions, pairs, cell=cell, pbc=pbc)
    edges = bin_edges(r_max, width)
    counts, _ = np.histogram(distances, edges)
    return Distribution(edges, counts / (distances.size * width))


def pair_distances(
    positions: np.ndarray,
    pairs: np.ndarray,
    *,
    cell: np.ndarray | None = None,
    pbc: np.ndarray | bool = False,
) -> np.ndarray:
    """Distances (n_frames, n_pairs) in Å of given pairs of atoms, of nearest images where periodic.

    Parameters
    ----------
    positions : (n_frames, n_atoms, 3)
        Å.
    pairs : (n_pairs, 2)
        Indices of atoms.
    cell : (3, 3)
        Å.
    pbc
        Periodic directions.
    """
    vectors = positions[:, pairs[:, 1]] - positions[:, pairs[:, 0]]
    if cell is None or not np.any(pbc):
        return np.linalg.norm(vectors, axis=-1)
    return find_mic(vectors.reshape(-1, 3), cell, pbc)[1].reshape(vectors.shape[:2])


def distribution_mae(first: Distribution, second: Distribution) -> float:
    """Integral of the absolute difference: no unit (0 to 2) for h(r), Å for g(r).

    The bins of both must be the same; wider bins average out noise and give smaller values.
    """
    assert np.array_equal(first.edges, second.edges)
    return float(np.abs(first.values - second.values) @ np.diff(first.edges))


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
