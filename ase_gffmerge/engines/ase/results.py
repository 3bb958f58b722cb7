"""From a prediction to ASE's results, with the checks before and after."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import PropertyNotImplementedError
from ase.stress import full_3x3_to_voigt_6_stress
from torch import Tensor

from ase_gffmerge.errors import EvaluationFailed, ExtrapolationWarning, StructureError
from ase_gffmerge.graphs import Prediction
from ase_gffmerge.runtime.devices import memory_errors
from ase_gffmerge.runtime.forking import survive_fork


def require_structure(atoms: Atoms | None) -> Atoms:
    """Raise for structures that hold nothing, or something that is no number."""
    if atoms is None or len(atoms) == 0:
        raise StructureError("there is no structure to calculate: the Atoms object is empty; add atoms to it")
    for name, values in (("positions", atoms.positions), ("cell vectors", atoms.cell.array)):
        bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
        if bad.size:
            raise EvaluationFailed(
                f"{name} {bad[:5].tolist()} of {atoms.get_chemical_formula()} contain NaN or infinity; look "
                "at the step before this one: a too long time step or overlapping atoms are the usual cause"
            )
    return atoms


@contextmanager
def computing(atoms: Atoms, device: torch.device) -> Iterator[None]:
    """Compute in a process that may have been forked; raise :class:`DeviceMemoryError` when memory does not suffice."""
    survive_fork()
    try:
        yield
    except (RuntimeError, MemoryError):
        with memory_errors(f"{atoms.get_chemical_formula()} ({len(atoms)} atoms)", device=device):
            raise


def ase_results(prediction: Prediction, atoms: Atoms) -> dict[str, Any]:
    """ASE's results: new float64 arrays, the energy a float and exactly the sum of the energies."""
    energies = as_array(prediction.energies)
    energy = float(energies.sum())
    results: dict[str, Any] = {"energy": energy, "free_energy": energy, "energies": energies}
    results["forces"] = as_array(prediction.forces)
    if has_volume(atoms):
        stress = as_array(prediction.strain_derivative)[0] / atoms.cell.volume
        results["stress"] = full_3x3_to_voigt_6_stress(stress)
    return results


MIN_VOLUME = 1e-100
"""Å^3; in less there is no stress that a number could hold."""


def has_volume(atoms: Atoms) -> bool:
    """Whether the cell has three independent vectors (one that is not finite is reported elsewhere)."""
    if not np.isfinite(atoms.cell.array).all():
        return True
    return atoms.cell.rank == 3 and atoms.cell.volume > MIN_VOLUME


def require_volume(atoms: Atoms) -> None:
    """Raise ``PropertyNotImplementedError`` for structures that have no stress."""
    if not has_volume(atoms):
        raise PropertyNotImplementedError(
            f"{atoms.get_chemical_formula()} has no volume and so no stress: {atoms.cell.rank} of three cell vectors are "
            f"independent, and they span {atoms.cell.volume:.1g} Å^3; set atoms.cell"
        )


def as_array(tensor: Tensor) -> np.ndarray:
    """Copy of a tensor as a float64 array of its own."""
    return tensor.detach().to(device="cpu", dtype=torch.float64).numpy().copy()


def require_finite(results: Mapping[str, Any], atoms: Atoms) -> None:
    """Raise :class:`EvaluationFailed` naming the first result that is not finite, and where."""
    for name in ("energies", "forces"):
        finite = np.isfinite(results[name]).reshape(len(atoms), -1).all(axis=1)
        if not finite.all():
            raise EvaluationFailed(
                f"the {name} of {atoms.get_chemical_formula()} contain NaN or infinity at atom(s) "
                f"{np.flatnonzero(~finite)[:5].tolist()}; overlapping atoms, or a structure far from "
                "anything the force field knows, are the usual cause: look at the step before this one"
            )


WARN_GRADE = 5.0
"""Extrapolation grade beyond which plain use warns; 1 is the edge of the calibration frames."""


class ExtrapolationNotice:
    """Warns of structures beyond the calibration frames, once of every kind; runs that watch it have a monitor.

    Parameters
    ----------
    name
        Of the force field.
    """

    def __init__(self, name: str):
        self.name, self._said = name, set[str]()

    def __call__(self, atoms: Atoms, grades: np.ndarray) -> None:
        """Look at the grades (n_atoms,) of a structure."""
        worst = grades.max()
        if worst <= WARN_GRADE:
            return
        unknown = sorted({str(atoms.symbols[i]) for i in np.flatnonzero(np.isinf(grades))})
        kind = f"the elements {', '.join(unknown)}" if unknown else "surroundings"
        if kind in self._said:
            return
        self._said.add(kind)
        warnings.warn(
            f"{atoms.get_chemical_formula()} has {kind} that no calibration frame of {self.name!r} contains (extrapolation "
            f"grade {worst:.3g}, 1 is the edge): do not trust its energies and forces; see calc.extras['extrapolation']. "
            "This is said once.",
            ExtrapolationWarning,
            stacklevel=4,
        )
