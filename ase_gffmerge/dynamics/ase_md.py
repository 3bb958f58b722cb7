"""Molecular dynamics with ASE's integrators: one call, one result that says how good the run was."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter

import numpy as np
from ase import Atoms, units
from ase.constraints import FixCom
from ase.md import MTKNPT, Langevin, VelocityVerlet
from ase.md.md import MolecularDynamics

from ase_gffmerge.dynamics.bonds import broken_bonds, find_bonds
from ase_gffmerge.dynamics.trajectory import Sample, Trajectory
from ase_gffmerge.dynamics.trajectory_io import frame_writer
from ase_gffmerge.dynamics.velocities import degrees_of_freedom, new_momenta
from ase_gffmerge.errors import DynamicsError, StructureError, first_line

ENSEMBLES = ("nve", "nvt", "npt")


def run_md(
    atoms: Atoms,
    *,
    ensemble: str,
    temperature: float,
    steps: int,
    timestep: float,
    friction: float = 0.01,
    pressure: float = 0.0,
    seed: int = 0,
    interval: int = 10,
    thermalize: bool = True,
    trajectory: str | Path | None = None,
    on_sample: Callable[[Sample], None] | None = None,
) -> Trajectory:
    """Run molecular dynamics on ``atoms`` in place.

    Parameters
    ----------
    atoms
        The structure, with a calculator.
    ensemble
        ``nve`` (velocity Verlet), ``nvt`` (Langevin, centre of mass at rest unless atoms are constrained) or
        ``npt`` (Martyna-Tobias-Klein with a flexible cell; needs a cell periodic in three directions).
    temperature
        K; of the initial velocities and of the thermostat.
    steps, timestep
        Number of steps and their length in fs.
    friction
        Langevin friction in 1/fs.
    pressure
        External pressure for ``npt`` in GPa.
    seed
        Of initial velocities and thermostat: the same seed repeats the run.
    interval
        Steps between samples, and between frames of the trajectory; the last step is always sampled.
    thermalize
        Draw new velocities; otherwise those of ``atoms`` are kept.
    trajectory
        ``.traj`` or ``.xyz``/``.extxyz`` file for the samples; created once the first energy is known.
    on_sample
        Called with every :class:`Sample`.

    Returns
    -------
    Trajectory
        Energies and temperatures of the samples; frames are in the file alone.

    Raises
    ------
    DynamicsError
        For impossible options, or when the energy is not finite any more.
    StructureError
        For ``npt`` without a cell in three directions.
    """
    _check_options(ensemble=ensemble, steps=steps, interval=interval, seed=seed)
    _check_conditions(
        timestep=timestep, temperature=temperature, friction=friction, pressure=pressure, ensemble=ensemble
    )
    _check_structure(atoms, ensemble)
    rng = np.random.default_rng(seed)
    if thermalize:
        new_momenta(atoms, temperature, rng=rng)
    atoms.get_forces()
    bonds, start = find_bonds(atoms), atoms.copy()
    samples: list[Sample] = []
    broken: set[tuple[int, int]] = set()
    with _resting_centre(atoms, ensemble), _explained(timestep), frame_writer(trajectory) as write:
        dynamics = _integrator(
            atoms, ensemble, temperature, timestep, friction=friction, pressure=pressure, rng=rng
        )
        freedom = degrees_of_freedom(atoms, at_rest=thermalize and ensemble == "nve")
        began = perf_counter()
        for done in _sampled_steps(steps, interval):
            if done:
                dynamics.run(done - samples[-1].step)
            samples.append(_sample(atoms, done, timestep, freedom))
            broken.update((i, j) for i, j in broken_bonds(atoms, bonds).tolist())
            write(atoms)
            if on_sample:
                on_sample(samples[-1])
        seconds = perf_counter() - began
    none = np.empty((0, len(atoms), 3))
    return Trajectory(
        start=start,
        ensemble=ensemble,
        timestep=timestep,
        steps=steps,
        target_temperature=temperature,
        times=np.array([sample.time for sample in samples]),
        potential_energies=np.array([sample.potential_energy for sample in samples]),
        kinetic_energies=np.array([sample.kinetic_energy for sample in samples]),
        temperatures=np.array([sample.temperature for sample in samples]),
        positions=none,
        momenta=none,
        forces=none,
        broken_bonds=tuple(sorted(broken)),
        seconds=seconds,
    )


def _check_options(*, ensemble: str, steps: int, interval: int, seed: int) -> None:
    if ensemble not in ENSEMBLES:
        raise DynamicsError(f"unknown ensemble {ensemble!r}; choose one of {', '.join(ENSEMBLES)}")
    if steps < 1 or interval < 1:
        raise DynamicsError(f"{steps} steps sampled every {interval}: both must be at least 1")
    if seed < 0:
        raise DynamicsError(f"a seed of {seed} is impossible; give a whole number that is not negative")


def _check_conditions(
    *, timestep: float, temperature: float, friction: float, pressure: float, ensemble: str
) -> None:
    if not 0 < timestep < np.inf:
        raise DynamicsError(f"a time step of {timestep} fs is impossible; it must be positive and finite")
    if not 0 <= temperature < np.inf:
        raise DynamicsError(f"{temperature} K are impossible; a temperature is not negative, and finite")
    if ensemble == "npt" and temperature == 0:
        raise DynamicsError("npt has no thermostat for 0 K; give a positive temperature, or use nve")
    if not 0 <= friction < np.inf:
        raise DynamicsError(f"a friction of {friction}/fs is impossible; it must not be negative, and finite")
    if not np.isfinite(pressure):
        raise DynamicsError(f"a pressure of {pressure} GPa is impossible; it must be finite")


def _check_structure(atoms: Atoms, ensemble: str) -> None:
    if len(atoms) == 0:
        raise StructureError("the structure has no atoms; give one with at least one")
    if ensemble == "npt" and not (atoms.pbc.all() and atoms.cell.rank == 3):
        raise StructureError(
            f"{atoms.get_chemical_formula()} is not periodic in three directions, so it has no pressure; use "
            "nvt, or give it a cell and pbc=True"
        )
    if ensemble == "npt" and atoms.constraints:
        raise DynamicsError(
            "npt does not support constraints; remove them with atoms.set_constraint(), or use nvt"
        )


def _integrator(
    atoms: Atoms,
    ensemble: str,
    temperature: float,
    timestep: float,
    *,
    friction: float,
    pressure: float,
    rng: np.random.Generator,
) -> MolecularDynamics:
    dt = timestep * units.fs
    if ensemble == "nve":
        return VelocityVerlet(atoms, dt)
    if ensemble == "nvt":
        return Langevin(
            atoms, dt, temperature_K=temperature, friction=friction / units.fs, fixcm=False, rng=rng
        )
    return MTKNPT(
        atoms,
        dt,
        temperature_K=temperature,
        pressure_au=pressure * units.GPa,
        tdamp=100 * dt,
        pdamp=1000 * dt,
    )


@contextmanager
def _explained(timestep: float) -> Iterator[None]:
    """Say what it means when an integrator ends in an operation that has no result."""
    try:
        yield
    except (ArithmeticError, np.linalg.LinAlgError) as error:
        raise DynamicsError(
            f"the integrator cannot go on ({first_line(error)}); a too long time step (now {timestep:g} fs) or a too large "
            "temperature, friction or pressure is the usual cause, so try smaller ones"
        ) from error


@contextmanager
def _resting_centre(atoms: Atoms, ensemble: str) -> Iterator[None]:
    """Fix the centre of mass during Langevin dynamics of otherwise free atoms."""
    if ensemble != "nvt" or atoms.constraints or len(atoms) == 1:
        yield
        return
    atoms.set_constraint(FixCom())
    try:
        yield
    finally:
        atoms.set_constraint()


def _sampled_steps(steps: int, interval: int) -> Iterator[int]:
    yield from range(0, steps, interval)
    yield steps


def _sample(atoms: Atoms, step: int, timestep: float, freedom: int) -> Sample:
    potential, kinetic = float(atoms.get_potential_energy()), float(atoms.get_kinetic_energy())
    if not np.isfinite(potential + kinetic):
        raise DynamicsError(
            f"the energy of {atoms.get_chemical_formula()} is not finite after {step} steps; use a shorter "
            f"time step (now {timestep:g} fs) or relax the structure first"
        )
    temperature = 2 * kinetic / (freedom * units.kB)
    return Sample(step, step * timestep, potential, kinetic, temperature)
