r"""Observables of trajectories: distributions of distances, radial distribution functions, diffusion, vibrational spectra.

After Fu et al., "Forces are not enough", arXiv 2210.07237:

.. math:: h(r) = \Big\langle \frac{1}{n(n-1)} \sum_i \sum_{j\neq i} \delta(r - |x_i - x_j|) \Big\rangle ,\qquad
          \mathrm{MAE}(h, \hat h) = \int_0^\infty |h(r) - \hat h(r)|\,dr .

Of periodic systems:

.. math:: g_{ab}(r) = \Big\langle \frac{V}{N_a N_b} \sum_{i\in a} \sum_{j\in b}
          \frac{\delta(r - |x_i - x_j|)}{4\pi r^2} \Big\rangle ,

where j runs over periodic images as well, so that r may exceed half the cell.

Time correlations: mean squared displacement, self-diffusion coefficient, vibrational density of states.

.. math:: \mathrm{MSD}(\tau) = \big\langle |x_i(t+\tau) - x_i(t)|^2 \big\rangle_{i,t} ,\qquad
          D = \tfrac16 \frac{d\,\mathrm{MSD}}{d\tau} \quad\text{(Einstein)} .

All time origins are used at once through fast Fourier transforms (Kneller et al., Comput. Phys. Commun. 91, 191,
1995).

.. math:: C(\tau) = \Big\langle \sum_i m_i\, v_i(t)\cdot v_i(t+\tau) \Big\rangle_t ,\qquad
          D(\nu) \propto \int C(\tau)\, w(\tau) \cos(2\pi c\nu\tau)\,d\tau ,

with Hann's window w, which falls from 1 to 0 at the correlation time :math:`\tau_c`. A line gets the full width at
half maximum :math:`1/(c\,\tau_c)`: 33 cm⁻¹ for 1 ps.
"""

from dataclasses import dataclass
from itertools import combinations_with_replacement

import numpy as np
from ase import units
from ase.data import chemical_symbols
from ase.geometry import find_mic
from matscipy.neighbours import neighbour_list

from ase_gffmerge.errors import ArgumentError


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

    The bins of both must be the same (else :class:`ArgumentError`); wider bins average out noise and give smaller values.
    """
    if not np.array_equal(first.edges, second.edges):
        raise ArgumentError(
            "the two distributions have different bins; compute both with the same r_max and width"
        )
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


SQUARE_CM_PER_S = 1e-4
"""One Å²/ps in cm²/s."""


@dataclass(frozen=True, kw_only=True)
class Diffusion:
    """A self-diffusion coefficient with what it was read from.

    Attributes
    ----------
    coefficient
        Å²/ps.
    standard_error
        Of the mean over consecutive blocks of the trajectory, Å²/ps.
    fit : (2,)
        First and last lag of the straight line, ps.
    n_blocks
        Number of blocks.
    lags, displacements : (n_lags,)
        ps and Å², over all time origins.
    """

    coefficient: float
    standard_error: float
    fit: tuple[float, float]
    n_blocks: int
    lags: np.ndarray
    displacements: np.ndarray


def without_drift(positions: np.ndarray, masses: np.ndarray) -> np.ndarray:
    """Positions (n_frames, n_atoms, 3) in Å relative to the centre of mass of ALL atoms in each frame."""
    return positions - np.einsum("tni,n->ti", positions, masses / masses.sum())[:, None]


def mean_squared_displacement(positions: np.ndarray, n_lags: int | None = None) -> np.ndarray:
    """Mean squared displacement (n_lags,) in Å² over all atoms given and all time origins.

    Parameters
    ----------
    positions : (n_frames, n_atoms, 3)
        Å, unwrapped (as ASE's integrators leave them), without drift.
    n_lags
        Lags from 0 to ``n_lags - 1`` frames; default: all.
    """
    n_frames = len(positions)
    centred = (positions - positions.mean(axis=0)).reshape(n_frames, -1)
    correlation = summed_correlation(centred, n_frames)
    squares = np.square(centred).sum(axis=1)
    # sum over t of |x(t)|^2 + |x(t+lag)|^2: everything, less what has no partner at either end
    ends = np.concatenate([[0.0], np.cumsum(squares[:-1] + squares[:0:-1])])
    totals = 2 * squares.sum() - ends - 2 * correlation
    return (totals / (np.arange(n_frames, 0, -1) * positions.shape[1]))[:n_lags]


def summed_correlation(signals: np.ndarray, n_lags: int) -> np.ndarray:
    """Sum over signals and time origins of x(t) x(t + lag), (n_lags,), of signals (n_frames, n_signals)."""
    n_frames = len(signals)
    power = np.square(np.abs(np.fft.rfft(signals, n=2 * n_frames, axis=0))).sum(axis=1)
    return np.fft.irfft(power, n=2 * n_frames)[:n_lags]


def diffusion_coefficient(
    positions: np.ndarray,
    *,
    interval: float,
    n_blocks: int = 4,
    fit: tuple[float, float] = (0.1, 0.5),
) -> Diffusion:
    """Self-diffusion coefficient from a straight line through the mean squared displacement.

    Parameters
    ----------
    positions : (n_frames, n_atoms, 3)
        Å, of the diffusing atoms alone, unwrapped and :func:`without_drift`.
    interval
        Time between frames in ps.
    n_blocks
        The trajectory is cut into so many consecutive blocks for the error; each must hold at least 10 frames.
    fit
        First and last lag of the line as fractions of a block's length; the same lags serve for the whole
        trajectory. They should lie beyond the ballistic and caged motion: the curve is there to be looked at.
    """
    length = len(positions) // n_blocks
    if length < 10:
        raise ArgumentError(
            f"{len(positions)} frames in {n_blocks} blocks are {length} in each, fewer than 10; give a longer trajectory "
            "or fewer blocks"
        )
    window = slice(round(fit[0] * length), round(fit[1] * length) + 1)
    blocks = [positions[k * length : (k + 1) * length] for k in range(n_blocks)]
    lags = interval * np.arange(len(positions))
    displacements = mean_squared_displacement(positions)
    slopes = [_slope(lags, mean_squared_displacement(block), window) for block in blocks]
    return Diffusion(
        coefficient=_slope(lags, displacements, window) / 6,
        standard_error=float(np.std(slopes, ddof=1)) / 6 / np.sqrt(n_blocks),
        fit=(float(lags[window][0]), float(lags[window][-1])),
        n_blocks=n_blocks,
        lags=lags,
        displacements=displacements,
    )


def _slope(lags: np.ndarray, displacements: np.ndarray, window: slice) -> float:
    return float(np.polyfit(lags[window], displacements[window], 1)[0])


PER_FS_IN_INVERSE_CM = 1e15 / (100 * units._c)
"""One oscillation per fs as a wavenumber in cm⁻¹."""
PADDING = 4
"""Points of the spectrum per independent one."""


@dataclass(frozen=True)
class Spectrum:
    """A vibrational density of states.

    Attributes
    ----------
    wavenumbers : (n_points,)
        cm⁻¹, equally spaced from 0.
    density : (n_points,)
        cm, integrates to 1.
    resolution
        Full width at half maximum of a sharp line, cm⁻¹.
    """

    wavenumbers: np.ndarray
    density: np.ndarray
    resolution: float


def velocity_autocorrelation(velocities: np.ndarray, masses: np.ndarray, n_lags: int) -> np.ndarray:
    """Mass-weighted velocity autocorrelation (n_lags,), averaged over all time origins.

    Parameters
    ----------
    velocities : (n_frames, n_atoms, 3)
        Any unit; at equal intervals, shorter than half the fastest period.
    masses : (n_atoms,)
        Any unit.
    n_lags
        Lags from 0 to ``n_lags - 1`` frames, at most ``n_frames``.
    """
    n_frames = len(velocities)
    if n_lags > n_frames:
        raise ArgumentError(
            f"{n_lags} lags need as many frames, and there are {n_frames}; ask for fewer lags"
        )
    weighted = (np.sqrt(masses)[:, None] * velocities).reshape(n_frames, -1)
    return summed_correlation(weighted, n_lags) / np.arange(n_frames, n_frames - n_lags, -1)


def vibrational_spectrum(autocorrelation: np.ndarray, *, interval: float) -> Spectrum:
    """Density of states from an autocorrelation at lags 0, ``interval``, 2 ``interval``, ... (fs).

    Average the autocorrelations of several runs before. What Hann's window leaves of negative side lobes is set to
    zero; the highest wavenumber is that of two frames per period.
    """
    n_lags = len(autocorrelation)
    windowed = autocorrelation * np.cos(0.5 * np.pi * np.arange(n_lags) / n_lags) ** 2
    n_padded = 2 * PADDING * n_lags
    density = np.maximum(2 * np.fft.rfft(windowed, n=n_padded).real - windowed[0], 0.0)
    wavenumbers = np.fft.rfftfreq(n_padded, interval) * PER_FS_IN_INVERSE_CM
    density /= density.sum() * wavenumbers[1]
    return Spectrum(wavenumbers, density, PER_FS_IN_INVERSE_CM / (n_lags * interval))


def spectral_overlap(first: Spectrum, second: Spectrum) -> float:
    """Area under both spectra, integral of min(D1, D2): 1 for equal ones, 0 for ones without common lines.

    Both must have the same wavenumbers (else :class:`ArgumentError`).
    """
    if not np.array_equal(first.wavenumbers, second.wavenumbers):
        raise ArgumentError(
            "the two spectra have different wavenumbers; compute both with the same interval and number of lags"
        )
    return float(np.minimum(first.density, second.density).sum() * first.wavenumbers[1])
