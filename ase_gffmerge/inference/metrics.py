"""Errors of a potential against labelled frames."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from ase import Atoms

from ase_gffmerge.data.labels import energy_label, force_labels
from ase_gffmerge.inference.batches import FramePredictions, predict_frames
from ase_gffmerge.models import Potential


@dataclass(frozen=True)
class Errors:
    """Errors over all frames.

    Attributes
    ----------
    force_mae, force_rmse
        Over all force components, eV/Å.
    energy_mae
        Mean over frames of the absolute energy error per atom, eV/atom.
    n_frames
        Number of frames.
    """

    force_mae: float
    force_rmse: float
    energy_mae: float
    n_frames: int

    def to_dict(self) -> dict[str, float]:
        """Plain dictionary."""
        return asdict(self)


def labels(frames: Sequence[Atoms]) -> FramePredictions:
    """Energies and forces attached to labelled frames; constraints that a frame carries are no part of its label."""
    return FramePredictions(
        np.array([energy_label(atoms) for atoms in frames]),
        [force_labels(atoms) for atoms in frames],
    )


def compare(predicted: FramePredictions, reference: FramePredictions) -> Errors:
    """Errors of one set of predictions against another."""
    counts = np.array([len(force) for force in reference.forces])
    difference = np.concatenate(predicted.forces) - np.concatenate(reference.forces)
    return Errors(
        force_mae=float(np.abs(difference).mean()),
        force_rmse=float(np.sqrt(np.square(difference).mean())),
        energy_mae=float((np.abs(predicted.energies - reference.energies) / counts).mean()),
        n_frames=len(counts),
    )


def evaluate(
    potential: Potential,
    frames: Sequence[Atoms],
    *,
    specialist: str | int | None = None,
    names: Sequence[str] | None = None,
) -> Errors:
    """Errors of a potential on labelled frames.

    Parameters
    ----------
    potential
        What is evaluated.
    frames
        With energies and forces, and stress or not.
    specialist, names
        As of :func:`predict_frames`.
    """
    return compare(predict_frames(potential, frames, specialist=specialist, names=names), labels(frames))
