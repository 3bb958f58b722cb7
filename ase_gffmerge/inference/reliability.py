r"""How well standard deviations foretell errors: rank correlation, shares within intervals, calibration error.

With errors :math:`\Delta` and standard deviations :math:`\sigma`, normally distributed errors lie within
:math:`\pm q_p\,\sigma` in a share p of all cases, :math:`q_p = \Phi^{-1}((1 + p)/2)`. The observed shares over the expected
ones make the reliability diagram; the calibration error is their mean distance (Kuleshov, Fenner & Ermon, arXiv 1807.00263),

.. math:: \frac1{|P|} \sum_{p\in P} \Bigl| \bigl\langle |\Delta| \le q_p\,\sigma \bigr\rangle - p \Bigr| ,\qquad
          P = 0.05, 0.10, \dots, 0.95 .

That says whether deviations are right on average; whether they tell large errors from small ones, their rank correlation
says, for forces that of lengths per atom.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Self

import numpy as np
from ase import Atoms
from scipy.special import ndtri
from scipy.stats import rankdata

from ase_gffmerge.forcefield.force_field import ForceField
from ase_gffmerge.graphs import build_graph
from ase_gffmerge.inference.predict import FramePredictions, Predictor, predict_batches
from ase_gffmerge.runtime.progress import Progress, no_progress

LEVELS = np.linspace(0.05, 0.95, 19)
"""Expected shares P."""


@dataclass(frozen=True)
class Deviations:
    """Standard deviations for frames.

    Attributes
    ----------
    energies : (n_frames,)
        eV.
    forces
        eV/Å, one (n_atoms, 3) array per frame.
    """

    energies: np.ndarray
    forces: Sequence[np.ndarray]


def predict_deviations(
    force_field: ForceField,
    frames: Sequence[Atoms],
    *,
    specialist: str | int | None = None,
    progress: Progress = no_progress,
) -> Deviations:
    """Standard deviations of energies and forces of frames.

    Parameters
    ----------
    force_field
        With a calibrated extrapolation grade.
    frames
        Structures.
    specialist
        For frames that do not say which specialist they belong to.
    progress
        Called with a fraction (0 to 1) and a description.

    Raises
    ------
    MissingUncertaintyError
        When the grade is not calibrated, or there is none.
    StructureError
        For unknown elements or specialists.
    """
    force_field.require_uncertainty()
    dtype, cutoff = force_field.potential.dtype, force_field.cutoff
    prepared = [force_field.prepared(atoms, specialist=specialist) for atoms in frames]
    predictor = partial(Predictor(force_field, compile=False), forces_std=True)
    graphs = (build_graph(atoms, cutoff, dtype=dtype) for atoms in prepared)
    energies, forces = [], []
    for found, _ in predict_batches(predictor, graphs, device=force_field.potential.device):
        assert found.energy_std is not None
        assert found.forces_std is not None
        energies.append(found.energy_std.item())
        forces.append(found.forces_std.double().numpy())
        progress(len(forces) / len(frames), f"standard deviations of {len(forces)} of {len(frames)} frames")
    return Deviations(np.array(energies), forces)


@dataclass(frozen=True, kw_only=True)
class Reliability:
    """Errors against the standard deviations that foretell them.

    Attributes
    ----------
    rank_correlation
        Spearman's, of absolute errors and deviations; NaN where all deviations are equal.
    calibration_error
        See the module.
    ratio
        Root mean square of error over deviation; above 1 the deviations are too small.
    observed
        Shares of errors within the intervals of :data:`LEVELS`.
    n
        Number of errors.
    """

    rank_correlation: float
    calibration_error: float
    ratio: float
    observed: tuple[float, ...]
    n: int

    @classmethod
    def of(cls, errors: np.ndarray, deviations: np.ndarray) -> Self:
        """Compare errors with deviations, both (n,) or, of vectors that are ranked by their lengths, (n, 3).

        Parameters
        ----------
        errors, deviations
            Where deviations are infinite, nothing is foretold, and nothing counted.
        """
        known = np.isfinite(deviations).reshape(len(deviations), -1).all(axis=1)
        errors, deviations = errors[known], deviations[known]
        sizes, spreads = (np.linalg.norm(x.reshape(len(x), -1), axis=1) for x in (errors, deviations))
        ratios = np.abs(errors / np.maximum(deviations, 1e-300)).ravel()
        observed = np.array([(ratios <= bound).mean() for bound in ndtri((1 + LEVELS) / 2)])
        return cls(
            rank_correlation=_correlation(rankdata(sizes), rankdata(spreads)),
            calibration_error=float(np.abs(observed - LEVELS).mean()),
            ratio=float(np.sqrt(np.square(ratios).mean())),
            observed=tuple(observed.tolist()),
            n=ratios.size,
        )

    def to_dict(self) -> dict[str, float | int | tuple[float, ...]]:
        """JSON-able dictionary."""
        return asdict(self)


def _correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson's correlation; NaN where one of them is constant."""
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return float("nan")
    return float(np.corrcoef(x, y)[0, 1])


def reliability(error: FramePredictions, deviations: Deviations) -> dict[str, Reliability]:
    """Reliability of ``energies`` and ``forces``.

    Parameters
    ----------
    error
        Predictions less what is right, see :func:`.difference`.
    deviations
        Of the predictions.
    """
    return {
        "energies": Reliability.of(error.energies, deviations.energies),
        "forces": Reliability.of(np.concatenate(error.forces), np.concatenate(list(deviations.forces))),
    }
