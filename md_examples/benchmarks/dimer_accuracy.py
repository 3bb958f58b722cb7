"""Errors on two molecules that touch, taken apart: forces within the molecules, forces between them, their interaction."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from ase import Atoms

from ase_gffmerge.inference.errors import compare, labels
from ase_gffmerge.inference.predict import FramePredictions, predict_frames
from ase_gffmerge.models import Potential


@dataclass(frozen=True)
class DimerPredictions:
    """What something says about dimers, and about their molecules alone in the same geometries.

    Attributes
    ----------
    dimers
        Energies (eV) and forces (eV/Å) of the dimers, the first molecule's atoms first.
    first, second
        The same of the molecules alone.
    """

    dimers: FramePredictions
    first: FramePredictions
    second: FramePredictions

    @property
    def molecular_forces(self) -> np.ndarray:
        """Forces of the molecules alone, in the order of the dimers' atoms, (n_frames, n_atoms, 3) in eV/Å."""
        return np.concatenate([np.array(self.first.forces), np.array(self.second.forces)], axis=1)

    @property
    def forces(self) -> np.ndarray:
        """Forces on the dimers' atoms (n_frames, n_atoms, 3) in eV/Å."""
        return np.array(self.dimers.forces)

    @property
    def interaction_energies(self) -> np.ndarray:
        """Energies of the dimers less those of the molecules (n_frames,) in eV."""
        return self.dimers.energies - self.first.energies - self.second.energies


@dataclass(frozen=True)
class DimerFrames:
    """Labelled frames of the dimer and of its molecules alone in the same geometries."""

    dimers: Sequence[Atoms]
    first: Sequence[Atoms]
    second: Sequence[Atoms]

    def labels(self) -> DimerPredictions:
        """What the theory says."""
        return DimerPredictions(labels(self.dimers), labels(self.first), labels(self.second))

    def predict(self, potential: Potential) -> DimerPredictions:
        """What one potential says about everything."""
        return DimerPredictions(
            *(predict_frames(potential, f) for f in (self.dimers, self.first, self.second))
        )

    def without_interaction(self, first: Potential, second: Potential) -> DimerPredictions:
        """Every molecule by its own potential, as if the other one were not there."""
        a, b = predict_frames(first, self.first), predict_frames(second, self.second)
        forces = [np.concatenate(pair) for pair in zip(a.forces, b.forces, strict=True)]
        together = FramePredictions(
            numbers=[np.concatenate(pair) for pair in zip(a.numbers, b.numbers, strict=True)],
            energies=a.energies + b.energies,
            forces=forces,
            stresses=[None] * len(forces),
        )
        return DimerPredictions(together, a, b)


def dimer_errors(predicted: DimerPredictions, reference: DimerPredictions) -> dict[str, Any]:
    """Errors of the predictions, JSON-able.

    Returns
    -------
    dict
        ``force_mae``, ``force_rmse``: of the dimers' forces. ``first_mae``, ``second_mae``: of those on each molecule's
        atoms. ``molecular_mae``: of the forces of the molecules alone. ``interaction_force_mae``: of what the other
        molecule adds to the forces. ``net_force_mae``: of the sum of the forces on a molecule. All in eV/Å, mean over
        components. ``interaction_energy_mae``, ``interaction_energy_bias`` in eV.
    """
    n_first = len(reference.first.forces[0])
    overall = compare(predicted.dimers, reference.dimers)
    difference = predicted.forces - reference.forces
    molecular = predicted.molecular_forces - reference.molecular_forces
    interaction = predicted.interaction_energies - reference.interaction_energies
    return {
        "force_mae": overall.force_mae,
        "force_rmse": overall.force_rmse,
        "first_mae": _mean_size(difference[:, :n_first]),
        "second_mae": _mean_size(difference[:, n_first:]),
        "molecular_mae": _mean_size(molecular),
        "interaction_force_mae": _mean_size(difference - molecular),
        "net_force_mae": _mean_size(difference[:, :n_first].sum(axis=1)),
        "interaction_energy_mae": _mean_size(interaction),
        "interaction_energy_bias": float(interaction.mean()),
    }


def typical_size(reference: DimerPredictions) -> dict[str, float]:
    """Mean size of what is predicted: the errors of predicting zero."""
    n_first = len(reference.first.forces[0])
    forces = reference.forces
    return {
        "force_mae": _mean_size(forces),
        "molecular_mae": _mean_size(reference.molecular_forces),
        "interaction_force_mae": _mean_size(forces - reference.molecular_forces),
        "net_force_mae": _mean_size(forces[:, :n_first].sum(axis=1)),
        "interaction_energy_mae": _mean_size(reference.interaction_energies),
    }


def _mean_size(values: np.ndarray) -> float:
    return float(np.abs(values).mean())
