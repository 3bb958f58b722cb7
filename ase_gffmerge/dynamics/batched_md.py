"""Molecular dynamics of many structures at once with one potential."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter
from typing import Any, Literal, Protocol, TypeVar, cast, get_args

import numpy as np
from ase import Atoms
from ase.calculators.calculator import Calculator

from ase_gffmerge.dynamics.integrators import degrees_of_freedom, new_momenta
from ase_gffmerge.dynamics.langevin import BatchedLangevin
from ase_gffmerge.dynamics.stopping import Stop, StoppingCriteria, StoppingTracker
from ase_gffmerge.dynamics.trajectory import Trajectory
from ase_gffmerge.errors import DynamicsError, StructureError
from ase_gffmerge.forcefield.force_field import ForceField
from ase_gffmerge.inference.predict import check_frames
from ase_gffmerge.models import Potential
from ase_gffmerge.runtime.devices import chunks
from ase_gffmerge.runtime.executors import OncePerWorker, run_chunks
from ase_gffmerge.runtime.progress import Progress, no_progress

Ensemble = Literal["nve", "nvt"]
T = TypeVar("T")


class ForceFieldCalculator(Protocol):
    """What is needed of a :class:`~ase_gffmerge.GFFMergeCalculator`."""

    force_field: ForceField
    parameters: Mapping[str, Any]


def run_replicas(
    model: Potential | ForceField | ForceFieldCalculator,
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
    criteria: StoppingCriteria | None = None,
    executor: Executor | None = None,
    progress: Progress = no_progress,
) -> list[Trajectory]:
    """Run every structure as a replica of its own, all of them in one batch.

    A replica that breaks leaves the batch; the others go on and notice nothing: its noise and velocities come from
    its own generator.

    Parameters
    ----------
    model
        A :class:`~ase_gffmerge.GFFMergeCalculator` (without dispersion), a force field or its potential, evaluated in its
        own floating-point type on its own device; geometry and integration are float64.
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
        all or for each. Default: the calculator's.
    names
        Names of the specialists in the order of their indices, where structures or ``specialist`` name them and ``model``
        is a potential, which does not know them.
    skin
        Of the neighbour lists, Å; it changes the speed, not the result.
    criteria
        What stops a replica; default: broken bonds, atoms too close, runaway temperature.
    executor
        Workers among which replicas are shared out, in batches of at most :data:`SHARED_ATOMS` atoms, however many workers
        there are; default: one batch in this process.
    progress
        Called with a fraction (0 to 1) and a description.

    Returns
    -------
    list of Trajectory
        In the order of the structures.

    Raises
    ------
    DynamicsError
        For impossible options, or a calculator that adds dispersion.
    FramesError, StructureError
        For no structures, unknown elements or specialists, constraints, a missing cell vector.
    """
    potential, specialist, names = _unpacked(model, specialist, names)
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
    hot = [temperature] * n if isinstance(temperature, int | float) else temperature
    temperatures = [float(t) for t in _each(hot, n, "temperatures")]
    if not all(0 <= t < np.inf for t in temperatures):
        raise DynamicsError(f"temperatures {temperatures[:5]} K: all must be finite and not negative")
    seeds = [(seed, k) for k in range(n)] if isinstance(seed, int) else _each(seed, n, "seeds")
    chosen = _each(
        [specialist] * n if specialist is None or isinstance(specialist, str | int) else specialist,
        n,
        "specialists",
    )
    if executor is not None:
        run = partial(
            run_replicas,
            ensemble=ensemble,
            timestep=timestep,
            steps=steps,
            every=every,
            friction=friction,
            thermalize=thermalize,
            names=names,
            skin=skin,
            criteria=criteria,
        )
        intact = [None] * n if references is None else _each(references, n, "references")
        replicas_apart = list(zip(structures, temperatures, seeds, intact, chosen, strict=True))
        return _by_workers(_Share(OncePerWorker.of(potential), run), replicas_apart, executor, progress)
    generators = [np.random.default_rng(s) for s in seeds]
    starts = [
        _start(s, t, g, thermalize) for s, t, g in zip(structures, temperatures, generators, strict=True)
    ]
    replicas = BatchedLangevin(
        potential,
        starts,
        temperatures=temperatures,
        generators=generators,
        specialist=chosen,
        names=names,
        skin=skin,
    )
    at_rest = thermalize and ensemble == "nve"
    freedom = [degrees_of_freedom(atoms, at_rest=at_rest) for atoms in starts]
    unbroken = starts if references is None else _each(references, n, "references")
    tracker = StoppingTracker(criteria or StoppingCriteria(), replicas, unbroken, freedom=freedom)
    records = [_Record(atoms, t) for atoms, t in zip(starts, temperatures, strict=True)]
    began = perf_counter()
    moving = list(records)
    for step in range(steps + 1):
        if step:
            replicas.step(timestep, friction=friction if ensemble == "nvt" else 0.0)
        recording = step % every == 0
        moving = _without_stopped(replicas, tracker, moving, time=step * timestep, recording=recording)
        if not moving:
            break
        if recording:
            _record(replicas, tracker, moving, step * timestep)
            progress(step / steps, f"{len(moving)} of {n} replicas at {step * timestep / 1000:.2f} ps")
    seconds = perf_counter() - began
    return [
        record.trajectory(ensemble=ensemble, timestep=timestep, steps=steps, seconds=seconds)
        for record in records
    ]


SHARED_ATOMS = 100
"""Atoms of the replicas that a worker runs in one batch."""

Replica = tuple[Atoms, float, int | Sequence[int], Atoms | None, str | int | None]
"""Structure, temperature, seed, intact structure and specialist."""


@dataclass(frozen=True)
class _Share:
    """What a worker does: run batches of replicas."""

    potential: OncePerWorker[Potential]
    run: Callable[..., list[Trajectory]]

    def __call__(self, batches: Sequence[Sequence[Replica]]) -> list[list[Trajectory]]:
        return [self._run(batch) for batch in batches]

    def _run(self, batch: Sequence[Replica]) -> list[Trajectory]:
        structures, temperatures, seeds, intact, chosen = zip(*batch, strict=True)
        return self.run(
            self.potential(),
            structures,
            temperature=temperatures,
            seed=seeds,
            references=None if intact[0] is None else intact,
            specialist=chosen,
        )


def _by_workers(
    share: _Share, replicas: Sequence[Replica], executor: Executor, progress: Progress
) -> list[Trajectory]:
    batches = list(chunks(replicas, SHARED_ATOMS, size=lambda replica: len(replica[0])))
    keys = [str(k) for k in range(len(batches))]
    found = run_chunks(
        share, batches, keys=keys, executor=executor, chunk=1, progress=progress, what="batches of replicas"
    )
    return [run for runs in found for run in runs]


Choice = str | int | Sequence[str | int | None] | None


def _unpacked(
    model: Potential | ForceField | ForceFieldCalculator, specialist: Choice, names: Sequence[str] | None
) -> tuple[Potential, Choice, Sequence[str] | None]:
    """Potential of a force field or calculator, with what it says about specialists where the caller says nothing."""
    if isinstance(model, ForceField):
        return model.potential, specialist, names or model.specialist_names
    if not hasattr(model, "force_field"):
        if isinstance(model, Calculator):
            raise DynamicsError(
                f"{type(model).__name__} is not evaluated in batches; give a GFFMergeCalculator, a ForceField or its "
                "potential, or run ASE's dynamics"
            )
        return cast("Potential", model), specialist, names
    calculator = cast("ForceFieldCalculator", model)
    field = calculator.force_field
    if calculator.parameters.get("dispersion") is not None:
        raise DynamicsError(
            "the calculator adds dispersion, which replicas in one batch do without; run ASE's dynamics with it, or give "
            "its force field alone (calc.force_field)"
        )
    chosen = calculator.parameters.get("specialist") if specialist is None else specialist
    return field.potential, chosen, names or field.specialist_names


def _without_stopped(
    replicas: BatchedLangevin,
    tracker: StoppingTracker,
    moving: list["_Record"],
    *,
    time: float,
    recording: bool,
) -> list["_Record"]:
    """Take the replicas that have to stop out of the batch; the records of the others."""
    stops = tracker.stops(recording=recording)
    if not stops:
        return moving
    for k, stop in stops.items():
        moving[k].stopped, moving[k].stopped_at = stop, time
    kept = [k for k in range(len(moving)) if k not in stops]
    if kept:
        replicas.keep(kept)
        tracker.keep(kept)
    return [moving[k] for k in kept]


def _record(
    replicas: BatchedLangevin, tracker: StoppingTracker, moving: Sequence["_Record"], time: float
) -> None:
    """Add the present frame to every record."""
    vectors = [x.cpu().numpy() for x in (replicas.positions, replicas.momenta, replicas.forces)]
    scalars = (replicas.energies, replicas.kinetic_energies(), tracker.temperatures())
    rows = np.stack([x.cpu().numpy() for x in scalars], axis=1)
    for record, part, row in zip(moving, replicas.slices, rows, strict=True):
        record.times.append(time)
        record.scalars.append(row)
        record.vectors.append(np.array([vector[part] for vector in vectors]))


@dataclass
class _Record:
    """What is recorded of one replica: scalars (3,) and vectors (3, n_atoms, 3) per frame."""

    start: Atoms
    target: float
    times: list[float] = field(default_factory=list)
    scalars: list[np.ndarray] = field(default_factory=list)
    vectors: list[np.ndarray] = field(default_factory=list)
    stopped: Stop | None = None
    stopped_at: float | None = None

    def trajectory(self, *, ensemble: str, timestep: float, steps: int, seconds: float) -> Trajectory:
        """All frames as arrays; options as for :class:`Trajectory`."""
        potential, kinetic, temperatures = np.array(self.scalars).reshape(-1, 3).T
        vectors = np.array(self.vectors).reshape(-1, 3, len(self.start), 3)
        return Trajectory(
            start=self.start,
            ensemble=ensemble,
            timestep=timestep,
            steps=steps,
            target_temperature=self.target,
            times=np.array(self.times),
            potential_energies=potential,
            kinetic_energies=kinetic,
            temperatures=temperatures,
            positions=vectors[:, 0],
            momenta=vectors[:, 1],
            forces=vectors[:, 2],
            stopped=self.stopped.reason if self.stopped else None,
            detail=self.stopped.detail if self.stopped else "",
            stopped_at=self.stopped_at,
            seconds=seconds,
        )


def _start(atoms: Atoms, temperature: float, generator: np.random.Generator, thermalize: bool) -> Atoms:
    """A copy of the structure, with velocities."""
    start = atoms.copy()
    if thermalize:
        new_momenta(start, temperature, rng=generator)
    return start


def _each(values: Sequence[T], n: int, what: str) -> list[T]:
    """The values, one per replica."""
    if len(values) != n:
        raise DynamicsError(f"{len(values)} {what} were given for {n} structures; give one, or one for each")
    return list(values)


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
