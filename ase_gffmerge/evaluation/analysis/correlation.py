r"""Time correlations: mean squared displacement, self-diffusion coefficient, vibrational density of states.

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

import numpy as np
from ase import units

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
    assert length >= 10, "at least ten frames per block"
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
    assert n_lags <= n_frames
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
    """Area under both spectra, integral of min(D1, D2): 1 for equal ones, 0 for ones without common lines."""
    assert np.array_equal(first.wavenumbers, second.wavenumbers)
    return float(np.minimum(first.density, second.density).sum() * first.wavenumbers[1])
