"""Molecular dynamics of many structures at once with one potential."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator

from ase_gffmerge.dynamics.langevin import BatchedLangevin
from ase_gffmerge.dynamics.stopping import Stop, StoppingCriteria, StoppingTracker
from ase_gffmerge.dynamics.velocities import degrees_of_freedom, new_momenta
from ase_gffmerge.errors import DynamicsError, StructureError
from ase_gffmerge.inference.metrics import check_frames
from ase_gffmerge.models import Potential
from ase_gffmerge.runtime.progress import Progress, no_progress

Ensemble = Literal["nve", "nvt"]


@dataclass(frozen=True, kw_only=True)
class ReplicaRun:
    """What one replica did.

    Attributes
    ----------
    frames
        Structures with momenta, potential energy (eV) and forces (eV/Å), not wrapped into the cell.
    times_fs, potential_energies, kinetic_energies, temperatures : (n_frames,)
        fs, eV, eV, K; of the frames.
    target_temperature
        K.
    stopped
        ``None`` for a replica that ran to the end; else ``bond broken``, ``atoms too close``, ``too hot``,
        ``extrapolation`` or ``not finite``. The structure that was the reason is not among the frames.
    detail
        Which atoms or what value it was.
    stopped_at_fs
        When.
    """

    frames: tuple[Atoms, ...]
    times_fs: np.ndarray
    potential_energies: np.ndarray
    kinetic_energies: np.ndarray
    temperatures: np.ndarray
    target_temperature: float
    stopped: str | None = None
    detail: str = ""
    stopped_at_fs: float | None = None

    @property
    def total_energies(self) -> np.ndarray:
        """Potential plus kinetic energy (n_frames,) in eV."""
        return self.potential_energies + self.kinetic_energies


def run_replicas(
    potential: Potential,
    structures: Sequence[Atoms],
    *,
    ensemble: Ensemble,
    temperature: float | Sequence[float],
    timestep: float,
    steps: int,
    every: int = 10,
    friction: float = 0.01,
    seed: int | Sequence[int | Sequence[int]] = 0,
    thermalize: bool = True,
    references: Sequence[Atoms] | None = None,
    specialist: str | int | Sequence[str | int | None] | None = None,
    names: Sequence[str] | None = None,
    skin: float = 1.0,
    monitor: StoppingCriteria | None = None,
    on_progress: Progress | None = None,
) -> list[ReplicaRun]:
    """Run every structure as a replica of its own, all of them in one batch.

    A replica that breaks leaves the batch; the others go on and notice nothing: its noise and velocities come from
    its own generator.

    Parameters
    ----------
    potential
        For example ``calculator.force_field.potential``. It is evaluated in its own floating-point type on its own device;
        geometry and integration are float64.
    structures
        Molecules or crystals (cells stay fixed) of any sizes, without constraints; they are not changed.
    ensemble
        ``nve``: velocity Verlet. ``nvt``: Langevin dynamics by BAOAB (doi:10.1093/amrx/abs010), which heats overall
        motion and rotation too.
    temperature
        Of initial velocities and thermostat in K, for all or for each.
    timestep, steps, every
        Time step in fs, number of steps, and steps from one recorded frame to the next; step 0 is recorded.
    friction
        Of the thermostat, 1/fs.
    seed
        Of velocities and noise; one number for all (replica k then uses the pair seed, k) or one for each.
    thermalize
        Draw new velocities, without overall motion and, for molecules, rotation; else keep the structures' momenta.
    references
        One intact structure per replica, whose bonds must hold; default: the structures.
    specialist
        For potentials with per-specialist embeddings and structures that do not say which specialist they belong to: for
        all or for each.
    names
        Names of the specialists in the order of their indices (``force_field.specialist_names``), where structures or
        ``specialist`` name them.
    skin
        Of the neighbour lists, Å; it changes the speed, not the result.
    monitor
        What stops a replica; default: broken bonds, atoms too close, runaway temperature.
    on_progress
        Called with a fraction (0 to 1) and a description.

    Returns
    -------
    list of ReplicaRun
        In the order of the structures.

    Raises
    ------
    DynamicsError
        For impossible options.
    FramesError, StructureError
        For no structures, unknown elements or specialists, constraints, a missing cell vector.
    """
    check_frames(potential, structures)
    _check(
        structures,
        ensemble=ensemble,
        timestep=timestep,
        steps=steps,
        every=every,
        friction=friction,
        skin=skin,
    )
    n = len(structures)
    temperatures = [float(t) for t in _each(temperature, n, "temperatures")]
    if not all(0 <= t < np.inf for t in temperatures):
        raise DynamicsError(f"temperatures {temperatures[:5]} K: all must be finite and not negative")
    seeds = [(seed, k) for k in range(n)] if isinstance(seed, int) else _each(seed, n, "seeds")
    generators = [np.random.default_rng(s) for s in seeds]
    starts = [
        _start(s, t, g, thermalize) for s, t, g in zip(structures, temperatures, generators, strict=True)
    ]
    swarm = BatchedLangevin(
        potential,
        starts,
        temperatures=temperatures,
        generators=generators,
        specialist=_each(specialist, n, "specialists"),
        names=names,
        skin=skin,
    )
    at_rest = thermalize and ensemble == "nve"
    freedom = [degrees_of_freedom(atoms, at_rest=at_rest) for atoms in starts]
    intact = starts if references is None else _each(list(references), n, "references")
    watch = StoppingTracker(monitor or StoppingCriteria(), swarm, intact, freedom=freedom)
    records = [_Record(atoms, t) for atoms, t in zip(starts, temperatures, strict=True)]
    tell = on_progress or no_progress
    friction = friction if ensemble == "nvt" else 0.0
    _run(swarm, watch, records, timestep=timestep, steps=steps, every=every, friction=friction, tell=tell)
    return [record.close() for record in records]


def _run(
    swarm: BatchedLangevin,
    watch: StoppingTracker,
    records: list["_Record"],
    *,
    timestep: float,
    steps: int,
    every: int,
    friction: float,
    tell: Progress,
) -> None:
    """Integrate, stop what breaks, record the rest."""
    moving = list(records)
    for step in range(steps + 1):
        if step:
            swarm.step(timestep, friction=friction)
        recording = step % every == 0
        stops = watch.stops(recording=recording)
        if stops:
            for k, stop in stops.items():
                moving[k].stop(stop, step * timestep)
            kept = [k for k in range(len(moving)) if k not in stops]
            moving = [moving[k] for k in kept]
            if not moving:
                return
            swarm.keep(kept)
            watch.keep(kept)
        if recording:
            _record(swarm, watch, moving, step * timestep)
            tell(step / steps, f"{len(moving)} of {len(records)} replicas at {step * timestep / 1000:.2f} ps")


def _record(swarm: BatchedLangevin, watch: StoppingTracker, moving: Sequence["_Record"], time: float) -> None:
    arrays = [x.cpu().numpy() for x in (swarm.positions, swarm.momenta, swarm.forces)]
    rows = np.stack(
        [x.cpu().numpy() for x in (swarm.energies, swarm.kinetic_energies(), watch.temperatures())], axis=1
    )
    for record, part, row in zip(moving, swarm.slices, rows, strict=True):
        record.add(time, row, *(array[part] for array in arrays))


@dataclass
class _Record:
    """A replica's diary."""

    start: Atoms
    target: float
    frames: list[Atoms] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    rows: list[np.ndarray] = field(default_factory=list)
    stopped: Stop | None = None
    stopped_at: float | None = None

    def add(
        self, time: float, row: np.ndarray, positions: np.ndarray, momenta: np.ndarray, forces: np.ndarray
    ) -> None:
        atoms = self.start.copy()
        atoms.positions = positions
        atoms.set_momenta(momenta)
        atoms.calc = SinglePointCalculator(atoms, energy=float(row[0]), forces=forces.copy())
        self.frames.append(atoms)
        self.times.append(time)
        self.rows.append(row)

    def stop(self, stop: Stop, time: float) -> None:
        self.stopped, self.stopped_at = stop, time

    def close(self) -> ReplicaRun:
        potential, kinetic, temperature = np.array(self.rows).reshape(-1, 3).T
        return ReplicaRun(
            frames=tuple(self.frames),
            times_fs=np.array(self.times),
            potential_energies=potential,
            kinetic_energies=kinetic,
            temperatures=temperature,
            target_temperature=self.target,
            stopped=self.stopped.reason if self.stopped else None,
            detail=self.stopped.detail if self.stopped else "",
            stopped_at_fs=self.stopped_at,
        )


def _start(atoms: Atoms, temperature: float, generator: np.random.Generator, thermalize: bool) -> Atoms:
    """A copy of the structure, with velocities."""
    start = atoms.copy()
    if thermalize:
        new_momenta(start, temperature, rng=generator)
    return start


def _each(value: Any, n: int, what: str) -> list[Any]:
    """One value per replica."""
    if value is None or isinstance(value, str | int | float | np.number):
        return [value] * n
    if len(value) != n:
        raise DynamicsError(f"{len(value)} {what} were given for {n} structures; give one, or one for each")
    return list(value)


def _check(
    structures: Sequence[Atoms],
    *,
    ensemble: str,
    timestep: float,
    steps: int,
    every: int,
    friction: float,
    skin: float,
) -> None:
    if ensemble not in get_args(Ensemble):
        raise DynamicsError(f"unknown ensemble {ensemble!r}; choose one of {', '.join(get_args(Ensemble))}")
    if steps < 1 or every < 1:
        raise DynamicsError(f"{steps} steps recorded every {every}: both must be at least 1")
    if not timestep > 0 or not friction >= 0 or not skin >= 0:
        raise DynamicsError(
            f"a time step of {timestep} fs, a friction of {friction}/fs or a skin of {skin} Å is impossible; "
            "the first must be positive, the others not negative"
        )
    for k, atoms in enumerate(structures):
        if len(atoms) == 0:
            raise StructureError(f"structure {k} has no atoms; leave it out")
        if atoms.constraints:
            raise StructureError(
                f"structure {k} ({atoms.get_chemical_formula()}) has constraints, which replicas do not obey; "
                "remove them with atoms.set_constraint(), or use run_md"
            )
