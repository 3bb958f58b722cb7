r"""Errors of predicted energies, forces and stresses of frames, against labels or against other predictions.

How large an error is, is said in units of what varies: over frames f of reference predictions (or labels) with forces F,

.. math::

   d = \sqrt{\langle |\Delta F|^2 \rangle / \langle |F|^2 \rangle} .

Equations of state and perfect crystals have no forces by symmetry. There, energies per atom and stresses speak: d is the
larger of their root mean square errors, each over the root mean square of the quantity itself. Energies count up to a shift
for each element, the one that fits best (one number per atom where all frames have one composition), in error and in size.
No size is smaller than a floor of what labels resolve: :data:`FORCE_FLOOR`, :data:`ENERGY_FLOOR`, :data:`STRESS_FLOOR`.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Self

import numpy as np
from ase import Atoms, units
from ase.calculators.singlepoint import SinglePointCalculator
from ase.data import chemical_symbols

from ase_gffmerge.data.labels import energy_label, force_labels, stress_label
from ase_gffmerge.inference.predict import FramePredictions, predict_frames
from ase_gffmerge.inference.reliability import Deviations
from ase_gffmerge.models import Potential

FORCE_FLOOR = 0.01
"""Root mean square force component in eV/Å below which forces are taken for silent, and errors are relative to this."""

ENERGY_FLOOR, STRESS_FLOOR = 0.001, 0.1
"""The same for energies in eV/atom, less shifts of the elements, and for stress components in GPa."""


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
    error = difference(predicted, reference)
    counts = np.array([len(numbers) for numbers in error.numbers])
    numbers, forces = np.concatenate(error.numbers), np.concatenate(error.forces)
    stress = np.concatenate(stress_components(error))
    return Errors(
        force_mae=float(np.abs(forces).mean()),
        force_rmse=_rms(forces),
        energy_mae=float((np.abs(error.energies) / counts).mean()),
        n_frames=len(counts),
        stress_mae=float(np.abs(stress).mean()) if len(stress) else None,
        force_mae_by_element={
            chemical_symbols[z]: float(np.abs(forces[numbers == z]).mean())
            for z in np.unique(numbers).tolist()
        },
    )


def difference(predicted: FramePredictions, reference: FramePredictions) -> FramePredictions:
    """What is predicted less the reference; stresses where both have one."""
    return FramePredictions(
        numbers=reference.numbers,
        energies=predicted.energies - reference.energies,
        forces=[a - b for a, b in zip(predicted.forces, reference.forces, strict=True)],
        stresses=[
            None if a is None or b is None else a - b
            for a, b in zip(predicted.stresses, reference.stresses, strict=True)
        ],
    )


def total(predicted: FramePredictions, contribution: FramePredictions) -> FramePredictions:
    """Predictions with a contribution of something else, such as dispersion, added to them."""
    negative = replace(
        contribution,
        energies=-contribution.energies,
        forces=[-forces for forces in contribution.forces],
        stresses=[None if stress is None else -stress for stress in contribution.stresses],
    )
    return difference(predicted, negative)


def stress_components(predictions: FramePredictions) -> list[np.ndarray]:
    """Stresses in GPa, one array of six components in Voigt order per frame, without any where a frame has no stress."""
    return [
        np.empty(0) if stress is None else stress[[0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1]] / units.GPa
        for stress in predictions.stresses
    ]


@dataclass(frozen=True, kw_only=True)
class Scales:
    """Root mean squares of forces, energies and stresses over frames: of a quantity, or of its errors.

    Attributes
    ----------
    force
        Of all components, eV/Å.
    energy
        Per atom, less the shift for each element that fits best, eV/atom.
    stress
        Of the six independent components, GPa; ``None`` without any.
    """

    force: float
    energy: float
    stress: float | None = None

    @classmethod
    def of(cls, predictions: FramePredictions) -> Self:
        """Of predictions, or labels, themselves."""
        energies = predictions.energies / np.array([len(numbers) for numbers in predictions.numbers])
        stress = np.concatenate(stress_components(predictions))
        return cls(
            force=_rms(np.concatenate(predictions.forces)),
            energy=_rms(without_shifts(energies, predictions.numbers)),
            stress=_rms(stress) if len(stress) else None,
        )

    @property
    def silent(self) -> bool:
        """Whether there are no forces to speak of."""
        return self.force < FORCE_FLOOR

    def relative(self, reference: "Scales") -> tuple[float, str]:
        """Error in units of the size of ``reference``, and of what: ``forces``, or where these are silent the worst.

        Parameters
        ----------
        reference
            Of the quantities; these are of the errors.
        """
        found = {"forces": self.force / max(reference.force, FORCE_FLOOR)}
        if reference.silent:
            found["energies"] = self.energy / max(reference.energy, ENERGY_FLOOR)
            if self.stress is not None and reference.stress is not None:
                found["stresses"] = self.stress / max(reference.stress, STRESS_FLOOR)
        worst = max(found, key=lambda name: np.nan_to_num(found[name], nan=np.inf))
        return found[worst], worst


def relative_error(predicted: FramePredictions, reference: FramePredictions) -> float:
    """The d of this module."""
    return Scales.of(difference(predicted, reference)).relative(Scales.of(reference))[0]


def relative_squares(predicted: FramePredictions, reference: FramePredictions) -> np.ndarray:
    """Squares (n_frames,) of what d is the root mean of, over atoms of forces and over frames of energies or stresses."""
    error, size = difference(predicted, reference), Scales.of(reference)
    _, what = Scales.of(error).relative(size)
    if what == "forces":
        square = np.array([np.square(forces).mean() for forces in error.forces])
        return square / max(size.force, FORCE_FLOOR) ** 2
    if what == "energies":
        counts = np.array([len(numbers) for numbers in error.numbers])
        square = np.square(without_shifts(error.energies / counts, error.numbers))
        return square / max(size.energy, ENERGY_FLOOR) ** 2
    square = np.array([np.square(s).mean() if len(s) else np.nan for s in stress_components(error)])
    assert size.stress is not None
    return np.nan_to_num(square, nan=np.nanmean(square)) / max(size.stress, STRESS_FLOOR) ** 2


def without_shifts(energies: np.ndarray, numbers: Sequence[np.ndarray]) -> np.ndarray:
    """Energies per atom (n_frames,) less what the best energy for each element gives (least squares)."""
    symbols = np.unique(np.concatenate(numbers))
    if not np.isfinite(energies).all():
        return np.full(len(energies), np.nan)
    shares = np.array([[np.mean(frame == z) for z in symbols] for frame in numbers])
    best: np.ndarray = np.linalg.lstsq(shares, energies, rcond=None)[0]
    return energies - shares @ best


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.square(values).mean()))


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


def with_predictions(
    frames: Sequence[Atoms],
    predicted: Mapping[str, FramePredictions],
    deviations: Mapping[str, Deviations] | None = None,
) -> list[Atoms]:
    """Copies of labelled frames that hold predictions beside the labels, as ASE writes them to extxyz.

    Parameters
    ----------
    frames
        Labelled; the labels stay where they are (``atoms.calc``).
    predicted
        By model. Those of ``NAME`` become ``atoms.info["NAME_energy"]`` (eV), ``atoms.arrays["NAME_forces"]`` (eV/Å)
        and ``atoms.info["NAME_stress"]`` (nine components in eV/Å^3, of frames with a volume), with every character of the
        name that is no letter, digit or underscore replaced by an underscore.
    deviations
        Of those models that have some: ``atoms.info["NAME_energy_std"]`` and ``atoms.arrays["NAME_forces_std"]``.
    """
    copies = [_labelled_copy(atoms) for atoms in frames]
    for name, (model, found) in zip(keys_of_models(predicted), predicted.items(), strict=True):
        for copy, energy, forces, stress in zip(
            copies, found.energies, found.forces, found.stresses, strict=True
        ):
            copy.info[f"{name}_energy"] = float(energy)
            copy.arrays[f"{name}_forces"] = forces
            if stress is not None:
                copy.info[f"{name}_stress"] = stress.ravel()  # what a file keeps without JSON
        if deviations and model in deviations:
            spread = deviations[model]
            for copy, energy, forces in zip(copies, spread.energies, spread.forces, strict=True):
                copy.info[f"{name}_energy_std"] = float(energy)
                copy.arrays[f"{name}_forces_std"] = forces
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
