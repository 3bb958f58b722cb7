"""Errors of predicted energies, forces and stresses of frames, against labels or against other predictions."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
from ase import Atoms, units
from ase.calculators.singlepoint import SinglePointCalculator
from ase.data import chemical_symbols

from ase_gffmerge.data.labels import energy_label, force_labels, stress_label
from ase_gffmerge.inference.predict import FramePredictions, predict_frames
from ase_gffmerge.models import Potential

FORCE_FLOOR = 0.01
"""Root mean square force component in eV/Å below which errors are not taken relative to the forces themselves, but to this:
equations of state and perfect crystals have none by symmetry."""


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
    stress_mae
        Over the six independent components of the stresses of all frames that have one, GPa; ``None`` when none has.
    force_mae_by_element
        ``force_mae`` over the atoms of one element, by chemical symbol, eV/Å.
    """

    force_mae: float
    force_rmse: float
    energy_mae: float
    n_frames: int
    stress_mae: float | None = None
    force_mae_by_element: Mapping[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, float | Mapping[str, float] | None]:
        """JSON-able dictionary."""
        return asdict(self)

    def totals(self) -> dict[str, float]:
        """All numbers over all elements, those that there are."""
        return {key: value for key, value in vars(self).items() if isinstance(value, float | int)}


def labels(frames: Sequence[Atoms]) -> FramePredictions:
    """Labels of frames, in the form of predictions; constraints that a frame carries are no part of its label."""
    return FramePredictions(
        numbers=[atoms.numbers for atoms in frames],
        energies=np.array([energy_label(atoms) for atoms in frames]),
        forces=[force_labels(atoms) for atoms in frames],
        stresses=[stress_label(atoms) for atoms in frames],
    )


def compare(predicted: FramePredictions, reference: FramePredictions) -> Errors:
    """Errors of one set of predictions against another."""
    counts = np.array([len(force) for force in reference.forces])
    difference = np.concatenate(predicted.forces) - np.concatenate(reference.forces)
    numbers = np.concatenate(reference.numbers)
    stress, own_stress = paired_stresses(predicted, reference)
    return Errors(
        force_mae=float(np.abs(difference).mean()),
        force_rmse=float(np.sqrt(np.square(difference).mean())),
        energy_mae=float((np.abs(predicted.energies - reference.energies) / counts).mean()),
        n_frames=len(counts),
        stress_mae=float(np.abs(stress - own_stress).mean()) if len(stress) else None,
        force_mae_by_element={
            chemical_symbols[z]: float(np.abs(difference[numbers == z]).mean())
            for z in np.unique(numbers).tolist()
        },
    )


def paired_stresses(
    predicted: FramePredictions, reference: FramePredictions
) -> tuple[np.ndarray, np.ndarray]:
    """Stresses in GPa, each (n, 6) in Voigt order, of those frames that have one in both."""
    pairs = [
        (_voigt(a), _voigt(b))
        for a, b in zip(predicted.stresses, reference.stresses, strict=True)
        if a is not None and b is not None
    ]
    together = np.array(pairs).reshape(-1, 2, 6) / units.GPa
    return together[:, 0], together[:, 1]


def _voigt(stress: np.ndarray) -> np.ndarray:
    return stress[[0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1]]


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
        As of :func:`~ase_gffmerge.inference.predict.predict_frames`.
    """
    return compare(predict_frames(potential, frames, specialist=specialist, names=names), labels(frames))


def with_predictions(frames: Sequence[Atoms], predicted: Mapping[str, FramePredictions]) -> list[Atoms]:
    """Copies of labelled frames that hold predictions beside the labels, as ASE writes them to extxyz.

    Parameters
    ----------
    frames
        Labelled; the labels stay where they are (``atoms.calc``).
    predicted
        By model. Those of ``NAME`` become ``atoms.info["NAME_energy"]`` (eV), ``atoms.arrays["NAME_forces"]`` (eV/Å)
        and ``atoms.info["NAME_stress"]`` ((3, 3), eV/Å^3, of frames with a volume), with every character of the name
        that is no letter, digit or underscore replaced by an underscore.
    """
    copies = [_labelled_copy(atoms) for atoms in frames]
    for name, found in zip(keys_of_models(predicted), predicted.values(), strict=True):
        for copy, energy, forces, stress in zip(
            copies, found.energies, found.forces, found.stresses, strict=True
        ):
            copy.info[f"{name}_energy"] = float(energy)
            copy.arrays[f"{name}_forces"] = forces
            if stress is not None:
                copy.info[f"{name}_stress"] = stress
    return copies


def keys_of_models(names: Iterable[str]) -> list[str]:
    """Names in a form that every reader of extxyz takes, all different."""
    keys: list[str] = []
    for name in names:
        key = re.sub(r"\W", "_", name, flags=re.ASCII)
        key = f"model_{key}" if not key[:1].isalpha() else key
        keys.append(key if key not in keys else f"{key}_{len(keys) + 1}")
    return keys


def _labelled_copy(atoms: Atoms) -> Atoms:
    copy = atoms.copy()
    copy.set_constraint()
    copy.calc = SinglePointCalculator(copy, **atoms.calc.results)
    return copy
