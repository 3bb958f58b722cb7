"""The contract between a calculator and ASE as a series of checks.

Points 14 and 16: forces and stress are derivatives of the energy, and dynamics conserves it.
"""

from collections.abc import Iterable

import numpy as np
from ase import Atoms, units
from ase.calculators.calculator import Calculator
from ase.calculators.fd import calculate_numerical_forces, calculate_numerical_stress
from ase.md import MTKNPT, VelocityVerlet, thermalize_momenta

from ase_gffmerge.testing.calculator import ase_drivers, results, robustness, structures
from ase_gffmerge.testing.calculator.harness import (
    Check,
    NotApplicable,
    Subject,
    Tolerances,
    check,
    derivative,
    deviation,
    require,
    run_check,
    served,
)
from ase_gffmerge.testing.calculator.results import is_an_ase_calculator
from ase_gffmerge.testing.report import CheckReport, CheckResult


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


ATOMS_TRIED = 4
TEMPERATURE = 300.0


@check(14)
def forces_are_the_gradient(subject: Subject) -> str:
    """Forces equal central differences of the energy."""
    subject.needs("forces", "energy")
    atoms = subject.atoms()
    chosen = np.unique(np.linspace(0, len(atoms) - 1, ATOMS_TRIED).astype(int))
    forces = atoms.get_forces()[chosen]
    numerical, doubt = derivative(
        lambda eps: calculate_numerical_forces(atoms, eps=eps, iatoms=chosen), subject.displacement
    )
    error = deviation(forces, numerical)
    require(
        error <= subject.tolerances.forces + doubt,
        f"forces differ from central differences of the energy by {error:.3g} eV/Å (tolerance "
        f"{subject.tolerances.forces:.1g} and {doubt:.1g} for the differences; largest force {np.abs(forces).max():.3g})",
    )
    return f"to {error:.1e} eV/Å; largest force {np.abs(forces).max():.2g}"


@check(14)
def stress_is_the_strain_derivative(subject: Subject) -> str:
    """All six components of the stress equal central differences of the energy."""
    subject.needs("stress", "energy")
    atoms = subject.atoms()
    stress = atoms.get_stress()
    numerical, doubt = derivative(
        lambda eps: calculate_numerical_stress(atoms, eps=eps), subject.displacement
    )
    errors = np.abs(stress - numerical)
    worst = int(errors.argmax())
    require(
        bool(errors[worst] <= subject.tolerances.stress + doubt),
        f"component {('xx', 'yy', 'zz', 'yz', 'xz', 'xy')[worst]} differs from central differences of the energy by "
        f"{errors[worst]:.3g} eV/Å^3 (tolerance {subject.tolerances.stress:.1g} and {doubt:.1g} for the differences)",
    )
    return f"to {errors[worst]:.1e} eV/Å^3"


def _moving(subject: Subject) -> Atoms:
    if len(subject.structure) < 2:
        raise NotApplicable("a single atom has no dynamics")
    atoms = subject.atoms()
    thermalize_momenta(atoms, temperature_K=TEMPERATURE, rng=np.random.default_rng(0))
    return atoms


def _total_energies(subject: Subject, timestep: float, steps: int) -> np.ndarray:
    """Total energies per atom along velocity Verlet, eV."""
    atoms = _moving(subject)
    dynamics = VelocityVerlet(atoms, timestep=timestep * units.fs)
    energies: list[float] = []
    dynamics.attach(lambda: energies.append(atoms.get_total_energy()), interval=1)
    dynamics.run(steps)
    return np.array(energies) / len(atoms)


@check(16)
def dynamics_conserves_energy(subject: Subject) -> str:
    """The total energy stays where it was along velocity Verlet at 300 K."""
    subject.needs("forces", "energy")
    energies = _total_energies(subject, subject.timestep, subject.steps)
    drift = np.abs(energies - energies[0]).max()
    require(
        drift <= subject.tolerances.drift,
        f"the total energy changes by {drift:.3g} eV/atom in {subject.steps} steps of {subject.timestep} fs",
    )
    return f"to {drift:.1e} eV/atom in {subject.steps} steps of {subject.timestep} fs"


@check(16)
def energy_error_is_of_second_order(subject: Subject) -> str:
    """Half the time step, a quarter of the error: what velocity Verlet promises for a smooth potential."""
    subject.needs("forces", "energy")
    steps = max(subject.steps // 4, 8)
    errors = [_total_energies(subject, subject.timestep / k, steps * k)[::k].std() for k in (1, 2)]
    if errors[0] < subject.tolerances.energy:
        raise NotApplicable(f"the energy is constant to {errors[0]:.1e} eV/atom, too close to round-off")
    ratio = errors[0] / errors[1]
    require(3.0 < ratio < 5.0, f"halving the time step divides the error by {ratio:.2f}, not by 4")
    return f"halving the time step divides the error by {ratio:.2f}"


@check(16)
def constant_pressure_runs(subject: Subject) -> str:
    """Martyna-Tobias-Klein dynamics with a flexible cell."""
    subject.needs("forces", "stress")
    if not subject.structure.pbc.all():
        raise NotApplicable("the structure is not periodic in three directions")
    atoms = _moving(subject)
    volume = atoms.get_volume()
    MTKNPT(
        atoms,
        timestep=subject.timestep * units.fs,
        temperature_K=TEMPERATURE,
        pressure_au=0.0,
        tdamp=100 * units.fs,
        pdamp=1000 * units.fs,
    ).run(10)
    change = atoms.get_volume() / volume - 1
    require(
        bool(np.isfinite(atoms.positions).all()) and abs(change) < 0.5, f"the volume changes by {change:.0%}"
    )
    return f"volume changes by {change:.1e} in 10 steps"


DERIVATIVE_CHECKS = (
    forces_are_the_gradient,
    stress_is_the_strain_derivative,
    dynamics_conserves_energy,
    energy_error_is_of_second_order,
    constant_pressure_runs,
)

CHECKS: tuple[Check[Subject], ...] = tuple(
    sorted(
        (
            *results.CHECKS,
            *robustness.CHECKS,
            *structures.CHECKS,
            *DERIVATIVE_CHECKS,
            *ase_drivers.CHECKS,
        ),
        key=lambda function: function.point,
    )
)
