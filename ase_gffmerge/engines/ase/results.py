"""From predictions to ASE's results, of one structure or of many in batches, with the checks before and after."""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from numbers import Integral

import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import PropertyNotImplementedError
from ase.stress import full_3x3_to_voigt_6_stress
from torch import Tensor

from ase_gffmerge.engines.ase.dispersion import Dispersion, Results
from ase_gffmerge.errors import (
    ArgumentError,
    EvaluationFailed,
    ExtrapolationWarning,
    GFFMergeError,
    StructureError,
)
from ase_gffmerge.forcefield.force_field import ForceField
from ase_gffmerge.graphs import Prediction, build_graph
from ase_gffmerge.graphs.neighbor_list import check_geometry
from ase_gffmerge.inference.predict import Predictor, predict_batches
from ase_gffmerge.runtime.devices import memory_errors, survive_fork


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


def ase_results(prediction: Prediction, atoms: Atoms) -> Results:
    """ASE's results: new float64 arrays, the energy a float and exactly the sum of the energies."""
    energies = as_array(prediction.energies)
    energy = float(energies.sum())
    results: Results = {"energy": energy, "free_energy": energy, "energies": energies}
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


def require_finite(results: Results, atoms: Atoms) -> None:
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


GRADE, ENERGY_STD, FORCES_STD = "extrapolation", "energy_std", "forces_std"
DEVIATIONS = (ENERGY_STD, FORCES_STD)


def evaluate_structures(
    force_field: ForceField,
    structures: Iterable[Atoms],
    *,
    predictor: Predictor,
    served: Sequence[str],
    properties: Sequence[str] | None = None,
    specialist: str | int | None = None,
    max_edges: int | None = None,
    dispersion: Dispersion | None = None,
) -> list[Results]:
    """Results of every structure.

    Parameters
    ----------
    force_field
        What a structure is checked against.
    structures
        Of any sizes and boundary conditions.
    predictor
        What evaluates the same force field.
    served, properties
        What there is, and what of it is wanted; default: everything that a structure has. ``extrapolation``, ``energy_std``
        and ``forces_std`` are given on request, when the force field has them.
    specialist
        For structures that do not say which specialist they belong to.
    max_edges
        Size of a batch; default: :data:`.MAX_EDGES` of the device.
    dispersion
        D3 correction to add.

    Raises
    ------
    GFFMergeError, PropertyNotImplementedError
        As the calculator does for a single structure, with the index of the structure.
    """
    originals = listed(structures)
    wanted = _wanted(properties, served, force_field)
    prepared = []
    for k, atoms in enumerate(originals):
        with _named(k):
            if properties is not None and "stress" in wanted:
                require_volume(atoms)
            prepared.append(_checked(force_field, atoms, specialist))
    _check_size(max_edges)
    with torch.inference_mode(False):
        graphs = (build_graph(atoms, force_field.cutoff) for atoms in prepared)
        predictions = predict_batches(
            partial(
                predictor, graded=not {GRADE, *DEVIATIONS}.isdisjoint(wanted), forces_std=FORCES_STD in wanted
            ),
            graphs,
            device=force_field.potential.device,
            max_edges=max_edges,
        )
        return [
            _results(k, atoms, *prediction, wanted, dispersion)
            for k, (atoms, prediction) in enumerate(zip(originals, predictions, strict=True))
        ]


def _results(
    k: int,
    atoms: Atoms,
    prediction: Prediction,
    grades: Tensor | None,
    wanted: Sequence[str],
    dispersion: Dispersion | None,
) -> Results:
    found = ase_results(prediction, atoms)
    with _named(k):
        require_finite(found, atoms)
        if dispersion is not None:
            found = dispersion.added(found, atoms)
    found |= trust(prediction, grades)
    return {name: found[name] for name in wanted if name in found}


def _checked(force_field: ForceField, atoms: Atoms, specialist: str | int | None) -> Atoms:
    """What a graph can be built from: everything is checked before anything is evaluated."""
    require_structure(atoms)
    prepared = force_field.prepared(atoms, specialist=specialist)
    check_geometry(prepared, force_field.cutoff)
    return prepared


def listed(structures: Iterable[Atoms]) -> list[Atoms]:
    """A list of structures; a single one, or something else in it, is refused."""
    if isinstance(structures, Atoms):
        raise ArgumentError("a list of structures is needed, not a single Atoms object; put it into a list")
    listed = list(structures)
    for k, atoms in enumerate(listed):
        if not isinstance(atoms, Atoms):
            raise ArgumentError(f"structure {k} is no Atoms object but {type(atoms).__name__}: {atoms!r:.60}")
    return listed


def trust(prediction: Prediction, grades: Tensor | None) -> Results:
    """Grades (n_atoms,) and standard deviations of the energy (eV) and forces (n_atoms, 3; eV/Å), those that there are."""
    found: Results = {} if grades is None else {GRADE: as_array(grades)}
    if prediction.energy_std is not None:
        found[ENERGY_STD] = prediction.energy_std.item()
    if prediction.forces_std is not None:
        found[FORCES_STD] = as_array(prediction.forces_std)
    return found


def _wanted(
    properties: Sequence[str] | None, served: Sequence[str], force_field: ForceField
) -> tuple[str, ...]:
    """Names of what is wanted; by default without grades and deviations, so that results hold what ASE knows."""
    if properties is None:
        return tuple(served)
    if force_field.extrapolation_grade is not None:
        served = (*served, GRADE)
    names = (properties,) if isinstance(properties, str) else tuple(properties)
    for name in names:
        if name in DEVIATIONS:
            force_field.require_uncertainty()
        elif name not in served:
            raise PropertyNotImplementedError(f"{name!r} is not served; there are {', '.join(served)}")
    return names


def _check_size(max_edges: int | None) -> None:
    if max_edges is not None and (not isinstance(max_edges, Integral) or max_edges < 1):
        raise ArgumentError(f"max_edges={max_edges!r} is no size of a batch; give a positive whole number")


@contextmanager
def _named(k: int) -> Iterator[None]:
    """Begin messages with the index of the structure."""
    try:
        yield
    except (GFFMergeError, PropertyNotImplementedError) as error:
        raise type(error)(f"structure {k}: {error}") from error
