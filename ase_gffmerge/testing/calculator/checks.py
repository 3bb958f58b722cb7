"""The contract between a calculator and ASE as a series of checks."""

from collections.abc import Iterable

import numpy as np
from ase import Atoms
from ase.calculators.calculator import Calculator

from ase_gffmerge.testing.calculator import ase_drivers, derivatives, results, robustness, structures
from ase_gffmerge.testing.calculator.harness import Check, Subject, Tolerances, run_check, served
from ase_gffmerge.testing.calculator.results import is_an_ase_calculator
from ase_gffmerge.testing.report import CheckReport, CheckResult

CHECKS: tuple[Check[Subject], ...] = tuple(
    sorted(
        (
            function
            for part in (results, robustness, structures, derivatives, ase_drivers)
            for function in part.CHECKS
        ),
        key=lambda function: function.point,
    )
)


def check_calculator(
    calc: Calculator,
    atoms: Atoms,
    *,
    forces_tol: float = 1e-7,
    stress_tol: float = 1e-8,
    energy_tol: float = 1e-9,
    drift_tol: float = 1e-3,
    properties: Iterable[str] | None = None,
    points: Iterable[int] | None = None,
    displacement: float = 1e-3,
    timestep: float = 1.0,
    steps: int = 200,
    rattle: float = 0.02,
) -> CheckReport:
    """Check an ASE calculator, anyone's, against the contract of a drop-in calculator.

    Points: 1 type and parameters, 2 properties, 3 results, 4 names of results, 5 sums, 6 what is watched, 7 elements,
    8 failures, 9 structures, 10 neighbour lists, 11 copies, 12 global state, 13 reproducibility and memory,
    14 derivatives, 15 symmetry and continuity, 16 dynamics, 17 evaluations per step, 18 files and other calculators.
    The tolerances suit float64; for a float32 network take about ``forces_tol=5e-3``, ``stress_tol=1e-5``,
    ``energy_tol=1e-5``, because central differences divide round-off by a small step.

    Parameters
    ----------
    calc
        The calculator. Its results are overwritten. Of something that is none, the report says just that.
    atoms
        A structure it can do, which stays as it is; small ones are faster, and a periodic one lets the stress be checked.
        Structures that the checks make of its atoms have its ``info`` and arrays.
    forces_tol, stress_tol, energy_tol, drift_tol
        Largest errors in eV/Å, eV/Å^3, eV/atom, and of the total energy along dynamics in eV/atom.
    properties
        Which properties to check; default: the energies, forces and stress it implements.
    points
        Which points to check; default: all.
    displacement
        Step in Å, and strain, of central differences, which are exact to its fourth power. What their error may be is
        added to the tolerance, up to 1e-5 of the largest force or stress.
    timestep, steps
        Of the run at constant energy, in fs.
    rattle
        Random displacement in Å of the structure that is checked, so that no force vanishes by symmetry.

    Returns
    -------
    CheckReport
        ``print(report)`` for the table, ``report.passed``, ``report.raise_if_failed()``. A check that fails or raises
        does not stop the others.

    Raises
    ------
    ValueError
        For an empty structure or a point that does not exist.

    Examples
    --------
    >>> from ase.build import bulk
    >>> from ase.calculators.emt import EMT
    >>> report = check_calculator(EMT(), bulk("Cu", cubic=True), points=[2, 4])
    >>> report.passed
    True
    """
    if len(atoms) == 0:
        raise ValueError(
            "there is nothing to check with: the Atoms object is empty; give a structure the calculator knows"
        )
    chosen = _chosen(points)
    structure = _rattled(atoms, rattle)
    if isinstance(calc, type) or not callable(getattr(calc, "get_property", None)):
        return _nothing_to_check(calc)
    subject = Subject(
        calc=calc,
        structure=structure,
        properties=tuple(properties) if properties is not None else served(calc, structure),
        tolerances=Tolerances(energy=energy_tol, forces=forces_tol, stress=stress_tol, drift=drift_tol),
        displacement=displacement,
        timestep=timestep,
        steps=steps,
    )
    results = []
    for function in chosen:
        results.append(run_check(function, subject))
        subject.reset()
    return CheckReport(f"{type(calc).__name__} on {structure.get_chemical_formula()}", tuple(results))


def _nothing_to_check(calc: object) -> CheckReport:
    """Report on something that is no calculator at all."""
    what = f"the class {calc.__name__}" if isinstance(calc, type) else repr(calc)[:60]
    finding = (
        f"{what} is no calculator: it cannot be asked for properties (get_property); give an instance of one"
    )
    return CheckReport(what, (CheckResult(1, is_an_ase_calculator.__name__, "failed", finding),))


def _chosen(points: Iterable[int] | None) -> list[Check[Subject]]:
    """Checks of these points."""
    existing = {function.point for function in CHECKS}
    wanted = existing if points is None else set(points)
    unknown = sorted(wanted - existing)
    if unknown:
        raise ValueError(f"no point {unknown} can be checked from outside; choose among {sorted(existing)}")
    return [function for function in CHECKS if function.point in wanted]


def _rattled(atoms: Atoms, size: float) -> Atoms:
    """Copy without constraints or calculator, its atoms displaced a little."""
    structure = atoms.copy()
    structure.set_constraint()
    structure.positions += size * np.random.default_rng(0).standard_normal(structure.positions.shape)
    return structure
