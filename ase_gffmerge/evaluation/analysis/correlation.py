r"""Vibrational density of states from the velocity autocorrelation function.

.. math:: C(\tau) = \Big\langle \sum_i m_i\, v_i(t)\cdot v_i(t+\tau) \Big\rangle_t ,\qquad
          D(\nu) \propto \int C(\tau)\, w(\tau) \cos(2\pi c\nu\tau)\,d\tau ,

with Hann's window w, which falls from 1 to 0 at the correlation time :math:`\tau_c`. A line gets the full width at
half maximum :math:`1/(c\,\tau_c)`: 33 cm⁻¹ for 1 ps.
"""

from dataclasses import dataclass

import numpy as np
from ase import units

from ase_gffmerge.evaluation.analysis.diffusion import summed_correlation

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
