r"""How far apart frames of a trajectory must be to count as independent.

The statistical inefficiency of a correlated series (Chodera et al., doi:10.1021/ct0502864) times its interval,

.. math:: g\,\tau = \tau\Big(1 + 2\sum_{t=1}^{t_0}\big(1 - \tfrac tN\big)\,C(t)\Big),

where C is the autocorrelation of interatomic distances, averaged over pairs of atoms, and t_0 its first zero.
"""

from collections.abc import Sequence

import numpy as np
from ase import Atoms
from ase.geometry import find_mic

MAX_PAIRS = 500


def decorrelation_time(trajectories: Sequence[Sequence[Atoms]], interval: float) -> float:
    """Time in fs after which interatomic distances are forgotten, the mean over trajectories.

    Parameters
    ----------
    trajectories
        Frames that were not wrapped, one sequence per trajectory; those shorter than four frames say nothing.
    interval
        From frame to frame, fs.
    """
    known = [distances(frames) for frames in trajectories if len(frames) >= 4 and len(frames[0]) > 1]
    return interval * (float(np.mean([inefficiency(series) for series in known])) if known else 1.0)


def inefficiency(series: np.ndarray) -> float:
    """Statistical inefficiency, at least 1, of a series (n_frames, n_features); constant features are left out.

    Examples
    --------
    >>> noise = np.random.default_rng(0).standard_normal((500, 20))
    >>> round(inefficiency(noise), 1), round(inefficiency(np.repeat(noise, 5, axis=0)), 1)
    (1.0, 5.0)
    """
    n = len(series)
    deviation = series - series.mean(axis=0)
    scale = deviation.std(axis=0)
    deviation = deviation[:, scale > 1e-9] / scale[scale > 1e-9]
    total = 1.0
    for lag in range(1, n):
        correlation = float((deviation[:-lag] * deviation[lag:]).mean()) if deviation.size else 0.0
        if correlation <= 0:
            break
        total += 2 * (1 - lag / n) * correlation
    return total


def distances(frames: Sequence[Atoms]) -> np.ndarray:
    """Distances (n_frames, n_pairs) in Å of at most ``MAX_PAIRS`` pairs of atoms, each to the image nearest at first."""
    first = frames[0]
    i, j = np.triu_indices(len(first), k=1)
    if len(i) > MAX_PAIRS:
        chosen = np.random.default_rng(0).choice(len(i), size=MAX_PAIRS, replace=False)
        i, j = i[chosen], j[chosen]
    vectors = np.array([atoms.positions[j] - atoms.positions[i] for atoms in frames])
    offsets = find_mic(vectors[0], first.cell, first.pbc)[0] - vectors[0]
    return np.linalg.norm(vectors + offsets, axis=2)
