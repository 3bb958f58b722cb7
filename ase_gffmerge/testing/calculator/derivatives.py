"""Points 14 and 16: forces and stress are derivatives of the energy, and dynamics conserves it."""

import numpy as np
from ase import Atoms, units
from ase.calculators.fd import calculate_numerical_forces, calculate_numerical_stress
from ase.md import MTKNPT, VelocityVerlet, thermalize_momenta

from ase_gffmerge.testing.calculator.harness import (
    NotApplicable,
    Subject,
    check,
    derivative,
    deviation,
    require,
)

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


CHECKS = (
    forces_are_the_gradient,
    stress_is_the_strain_derivative,
    dynamics_conserves_energy,
    energy_error_is_of_second_order,
    constant_pressure_runs,
)
