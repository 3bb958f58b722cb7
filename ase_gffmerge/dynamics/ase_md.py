"""Molecular dynamics and geometry optimisation with ASE: one call each, and a result that says how it went.

Geometry optimisation by ASE's optimisers: atoms alone or with the cell, under pressure, with symmetry kept.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from ase import Atoms, units
from ase.constraints import FixCom, FixSymmetry
from ase.filters import FrechetCellFilter
from ase.io.trajectory import Trajectory as TrajectoryFile
from ase.md import MDLogger
from ase.optimize import BFGS, FIRE, LBFGS, BFGSLineSearch

from ase_gffmerge.dynamics.integrators import (
    Conditions,
    RestartPoint,
    degrees_of_freedom,
    new_momenta,
    set_temperature,
)
from ase_gffmerge.dynamics.stopping import broken_bonds, find_bonds
from ase_gffmerge.dynamics.trajectory import Sample, Trajectory, frame_writer
from ase_gffmerge.errors import ArgumentError, DynamicsError, StructureError, first_line

TOO_HOT = 10
"""A run stops where it is hotter than so many times the temperature asked for, or than so many times 300 K."""


def run_md(
    atoms: Atoms,
    conditions: Conditions,
    *,
    steps: int,
    seed: int = 0,
    interval: int = 10,
    thermalize: bool = True,
    trajectory: str | Path | None = None,
    append: bool = False,
    restart: Path | None = None,
    resume: bool = False,
    log: Path | None = None,
    on_sample: Callable[[Sample], None] | None = None,
) -> Trajectory:
    """Run molecular dynamics on ``atoms`` in place.

    Parameters
    ----------
    atoms
        The structure, with a calculator.
    conditions
        Ensemble, temperature, time step, thermostat and barostat.
    steps
        Number of steps, those before a resumed run included.
    seed
        Of initial velocities and thermostat: the same seed repeats the run.
    interval
        Steps between samples, and between frames of the trajectory; the last step is always sampled.
    thermalize
        Draw new velocities; otherwise those of ``atoms`` are kept.
    trajectory
        ``.traj`` or ``.xyz``/``.extxyz`` file for the samples; created once the first energy is known.
    append
        Add frames to a trajectory that is there instead of replacing it.
    restart
        File that is rewritten after every sample, from which the run can be resumed.
    resume
        Go on from ``restart`` exactly as if the run had not stopped; frames after that moment are taken off the trajectory.
    log
        Text file with a line for every sample: time in ps, energies in eV, temperature in K, stresses in GPa (``npt``).
    on_sample
        Called with every new :class:`Sample`.

    Returns
    -------
    Trajectory
        Energies and temperatures of the samples; frames are in the file alone. ``stopped`` says ``too hot`` where the run
        exploded: the samples so far are kept.

    Raises
    ------
    DynamicsError
        For impossible options, a restart file of another run or force field, or when the energy is not finite any more.
    StructureError
        For ``npt`` without a cell in three directions.
    """
    if steps < 1 or interval < 1:
        raise DynamicsError(f"{steps} steps sampled every {interval}: both must be at least 1")
    if seed < 0:
        raise DynamicsError(f"a seed of {seed} is impossible; give a whole number that is not negative")
    conditions.check_structure(atoms)
    rng, start = np.random.default_rng(seed), atoms.copy()
    identity = _identity(atoms, conditions, steps=steps, seed=seed, interval=interval)
    point = RestartPoint.load(_named(restart), identity) if resume else None
    if point is not None:
        start.set_cell(point.start_cell)
        start.positions = point.start_positions
        point.place(atoms)
    elif thermalize:
        new_momenta(atoms, conditions.temperature, rng=rng)
    atoms.get_forces()
    bonds = find_bonds(start)
    samples = list(point.samples) if point else []
    broken = {(int(i), int(j)) for i, j in point.broken_bonds} if point else set()
    stopped: str | None = None
    kept = point.n_frames if point else None
    with _resting_centre(atoms, conditions), _explained(conditions.timestep), ExitStack() as stack:
        write = stack.enter_context(frame_writer(trajectory, append=append, keep=kept))
        dynamics = conditions.integrator(atoms, rng)
        if point is not None:
            point.resume(dynamics, rng)
        logger = None
        if log is not None:
            stress = conditions.ensemble == "npt"
            logger = MDLogger(
                dynamics, atoms, str(log), header=not resume, stress=stress, mode="a" if resume else "w"
            )
            stack.callback(logger.close)
        freedom = degrees_of_freedom(atoms, at_rest=thermalize and conditions.ensemble == "nve")
        began = perf_counter() - (point.seconds if point else 0.0)
        for done in _sampled_steps(steps, interval, after=samples[-1].step if samples else -1):
            if done:
                before = samples[-1].step
                set_temperature(dynamics, conditions.temperature_at(before / steps))
                dynamics.run(done - before)
            samples.append(_sample(atoms, done, conditions, freedom))
            broken.update((int(i), int(j)) for i, j in broken_bonds(atoms, bonds))
            write(atoms)
            if logger is not None:
                logger()
            if restart is not None:
                RestartPoint.of(
                    dynamics,
                    identity=identity,
                    samples=samples,
                    start=start,
                    broken_bonds=list(broken),
                    rng=rng,
                    n_frames=write.n_frames,
                    seconds=perf_counter() - began,
                ).save(restart)
            if on_sample:
                on_sample(samples[-1])
            if stopped := _exploded(samples[-1], conditions):
                break
        seconds = perf_counter() - began
    none = np.empty((0, len(atoms), 3))
    npt = conditions.ensemble == "npt"
    return Trajectory(
        start=start,
        ensemble=conditions.ensemble,
        timestep=conditions.timestep,
        steps=steps,
        target_temperature=conditions.temperature,
        times=np.array([sample.time for sample in samples]),
        potential_energies=np.array([sample.potential_energy for sample in samples]),
        kinetic_energies=np.array([sample.kinetic_energy for sample in samples]),
        temperatures=np.array([sample.temperature for sample in samples]),
        positions=none,
        momenta=none,
        forces=none,
        volumes=np.array([sample.volume for sample in samples]) if npt else None,
        pressures=np.array([sample.pressure for sample in samples]) if npt else None,
        stopped="too hot" if stopped else None,
        detail=stopped or "",
        stopped_at=samples[-1].time if stopped else None,
        broken_bonds=tuple(sorted(broken)),
        seconds=seconds,
    )


def _identity(
    atoms: Atoms, conditions: Conditions, *, steps: int, seed: int, interval: int
) -> dict[str, object]:
    """What a resumed run must have in common with the one before; the number of steps only where it decides a ramp."""
    ramp = {} if conditions.final_temperature is None else {"steps": steps}
    fixed = {
        "formula": atoms.get_chemical_formula("reduce"),
        "periodic directions": atoms.pbc.tolist(),
        "constraints": "; ".join(str(c.todict() or type(c).__name__) for c in atoms.constraints) or "none",
        "seed": seed,
        "interval": interval,
    }
    return {**asdict(conditions), **fixed, **_source_of_forces(atoms.calc), **ramp}


def _source_of_forces(calculator: Any) -> dict[str, object]:
    """Class of a calculator; of ours the force field, and the options that decide its forces."""
    force_field = getattr(calculator, "force_field", None)
    if force_field is None:
        return {"calculator": type(calculator).__name__}
    options = {name: calculator.parameters.get(name) for name in ("dtype", "specialist", "dispersion")}
    return {"force field": f"{force_field.name} ({force_field.fingerprint[:12]})", **options}


def _named(restart: Path | None) -> Path:
    if restart is None:
        raise DynamicsError("a run is resumed from its restart file; name it")
    return restart


def _exploded(sample: Sample, conditions: Conditions) -> str | None:
    """Say what happened where the run became far too hot."""
    asked = max(conditions.temperature, conditions.final_temperature or 0.0, 300.0)
    if sample.temperature <= TOO_HOT * asked:
        return None
    return (
        f"after {sample.time:g} fs the temperature is {sample.temperature:.3g} K, though {conditions.temperature:g} K were "
        f"asked for; use a shorter time step (now {conditions.timestep:g} fs), relax the structure first, or look whether "
        "the force field knows it"
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
def _resting_centre(atoms: Atoms, conditions: Conditions) -> Iterator[None]:
    """Fix the centre of mass of otherwise free atoms under thermostats that would move it."""
    if not conditions.rests or atoms.constraints or len(atoms) == 1:
        yield
        return
    atoms.set_constraint(FixCom())
    try:
        yield
    finally:
        atoms.set_constraint()


def _sampled_steps(steps: int, interval: int, *, after: int) -> Iterator[int]:
    """Steps at which samples are taken, those of a run before left out."""
    yield from (step for step in (*range(0, steps, interval), steps) if step > after)


def _sample(atoms: Atoms, step: int, conditions: Conditions, freedom: int) -> Sample:
    potential, kinetic = float(atoms.get_potential_energy()), float(atoms.get_kinetic_energy())
    if not np.isfinite(potential + kinetic):
        raise DynamicsError(
            f"the energy of {atoms.get_chemical_formula()} is not finite after {step} steps; use a shorter "
            f"time step (now {conditions.timestep:g} fs) or relax the structure first"
        )
    temperature = 2 * kinetic / (freedom * units.kB)
    sample = Sample(step, step * conditions.timestep, potential, kinetic, temperature)
    if conditions.ensemble != "npt":
        return sample
    pressure = -atoms.get_stress(include_ideal_gas=True)[:3].mean() / units.GPa
    return replace(sample, volume=float(atoms.cell.volume), pressure=float(pressure))


OPTIMIZERS = {"bfgs": BFGS, "lbfgs": LBFGS, "bfgs-linesearch": BFGSLineSearch, "fire": FIRE}
STRAINS = ("xx", "yy", "zz", "yz", "xz", "xy")


@dataclass(frozen=True, kw_only=True)
class CellFreedom:
    """How the cell may change during a relaxation.

    Attributes
    ----------
    pressure
        External pressure in GPa.
    constant_volume
        Let only the shape change.
    strains
        The strain components that may change, some of :data:`STRAINS`.
    """

    pressure: float = 0.0
    constant_volume: bool = False
    strains: tuple[str, ...] = STRAINS

    def __post_init__(self) -> None:
        """Raise :class:`ArgumentError` for what is no strain component."""
        unknown = [strain for strain in self.strains if strain not in STRAINS]
        if unknown or not self.strains:
            raise ArgumentError(
                f"{', '.join(unknown) or 'nothing'} is no strain of the cell; name some of {', '.join(STRAINS)}"
            )

    def filter(self, atoms: Atoms) -> FrechetCellFilter:
        """Give ASE's view of atoms and cell for an optimiser.

        Raises
        ------
        StructureError
            For structures that are not periodic in three directions.
        """
        if not (atoms.pbc.all() and atoms.cell.rank == 3):
            raise StructureError(
                f"--cell needs a structure periodic in three directions; {atoms.get_chemical_formula()} has "
                f"pbc {atoms.pbc.tolist()} and {atoms.cell.rank} cell vectors; leave --cell out"
            )
        return FrechetCellFilter(
            atoms,
            mask=[strain in self.strains for strain in STRAINS],
            scalar_pressure=self.pressure * units.GPa,
            constant_volume=self.constant_volume,
        )


def relax(
    atoms: Atoms,
    *,
    fmax: float = 0.01,
    steps: int = 1000,
    optimizer: str = "bfgs",
    cell: CellFreedom | None = None,
    fix_symmetry: bool = False,
    trajectory: Path | None = None,
    on_step: Callable[[int], None] | None = None,
) -> tuple[int, bool]:
    """Relax ``atoms`` in place; returns the number of steps and whether it converged.

    Parameters
    ----------
    atoms
        The structure, with a calculator.
    fmax
        Largest force at the end in eV/Å; with a cell also what the stress amounts to.
    steps
        Largest number of steps.
    optimizer
        One of :data:`OPTIMIZERS`.
    cell
        How the cell may change; default: not at all.
    fix_symmetry
        Keep the space group that the structure has at the beginning.
    trajectory
        ``.traj`` file that gets every step.
    on_step
        Called after every step with its number.

    Raises
    ------
    ArgumentError
        For an unknown optimiser, or when the symmetry cannot be found.
    StructureError
        For ``cell`` without three periodic directions.
    """
    if optimizer not in OPTIMIZERS:
        raise ArgumentError(f"unknown optimizer {optimizer!r}; choose one of {', '.join(OPTIMIZERS)}")
    if fix_symmetry:
        try:
            atoms.set_constraint([*atoms.constraints, FixSymmetry(atoms)])
        except Exception as error:  # whatever spglib and its absence may say
            raise ArgumentError(
                f"the symmetry of {atoms.get_chemical_formula()} cannot be kept ({first_line(error)}); it needs a periodic "
                "structure and the package spglib: pip install spglib"
            ) from None
    target = atoms if cell is None else cell.filter(atoms)
    with OPTIMIZERS[optimizer](target, logfile=None) as run:
        if trajectory is not None:
            writer = run.closelater(TrajectoryFile(trajectory, "w", atoms))
            run.attach(writer)
        if on_step is not None:
            run.attach(lambda: on_step(run.nsteps))
        converged = run.run(fmax=fmax, steps=steps)
        return run.nsteps, bool(converged)
