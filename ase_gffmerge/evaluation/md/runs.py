"""The runs behind an evaluation by dynamics: what is run, and one batch of replicas per model and ensemble, kept on disk."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter

import numpy as np
from ase import Atoms

from ase_gffmerge.dynamics.batched_md import Ensemble, run_replicas
from ase_gffmerge.dynamics.trajectory import Trajectory, load_trajectories, save_trajectories
from ase_gffmerge.errors import DynamicsError
from ase_gffmerge.forcefield.conditioning import KEY
from ase_gffmerge.forcefield.force_field import ForceField
from ase_gffmerge.runtime.progress import Progress, no_progress

RECORD_FS = {"nvt": 10.0, "nve": 2.0}
"""Time between frames: 2 fs resolves every vibration up to 8000 cm⁻¹."""


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """Langevin dynamics of several seeds, then velocity Verlet for half that time.

    Attributes
    ----------
    temperature
        Of the thermostat and of all initial velocities, K.
    picoseconds
        Length of the NVT runs; those of constant energy are half as long.
    timestep
        fs.
    seeds
        Number of independent runs.
    friction
        Langevin friction in 1/fs; it slows diffusion down, and widens lines (these come from NVE runs).
    equilibration
        Fraction of an NVT run left out of averages.
    correlation_time
        Longest lag of the velocity autocorrelation, fs (at most half an NVE run).
    """

    temperature: float = 500.0
    picoseconds: float = 10.0
    timestep: float = 0.5
    seeds: int = 3
    friction: float = 0.01
    equilibration: float = 0.2
    correlation_time: float = 1000.0

    def __post_init__(self) -> None:
        """Refuse what cannot be run."""
        if self.seeds < 1:
            raise DynamicsError(f"{self.seeds} seeds: nothing would be run; give at least 1")
        if not all(0 < value < math.inf for value in (self.timestep, self.temperature, self.picoseconds)):
            raise DynamicsError(
                f"a time step of {self.timestep:g} fs, a temperature of {self.temperature:g} K or a time of "
                f"{self.picoseconds:g} ps is impossible; all must be positive and finite"
            )
        if self.steps("nve") < 10 * self.every("nve"):
            raise DynamicsError(
                f"{self.picoseconds:g} ps are too short to measure anything; give at least "
                f"{0.02 * self.every('nve') * self.timestep:g} ps"
            )

    def steps(self, ensemble: Ensemble) -> int:
        """Number of steps of a run."""
        length = self.picoseconds * (1.0 if ensemble == "nvt" else 0.5)
        return max(round(1000 * length / self.timestep), 1)

    def every(self, ensemble: Ensemble) -> int:
        """Steps between frames."""
        return max(int(RECORD_FS[ensemble] / self.timestep), 1)

    def length(self, ensemble: Ensemble) -> float:
        """Length of a run in ps."""
        return self.steps(ensemble) * self.timestep / 1000


TRIAL_STEPS = 20


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """A model under evaluation.

    Attributes
    ----------
    label
        What it is called in tables and plots.
    force_field
        On its device, in its type.
    specialist
        Name or index for per-specialist conditioning, where structures do not say it.
    """

    label: str
    force_field: ForceField
    specialist: str | int | None = None


def run_models(
    models: Sequence[Contestant],
    starts: Sequence[Atoms],
    protocol: Protocol,
    *,
    folder: Path | None = None,
    progress: Progress = no_progress,
) -> dict[str, dict[Ensemble, list[Trajectory]]]:
    """Run every model from the same structures with the same seeds.

    An NVE run begins at the middle frame of the NVT run of its seed, with new velocities.

    Parameters
    ----------
    starts
        One structure per seed.
    folder
        Finished batches are kept there, and found again by the content of model, protocol and structures.
    progress
        Called with a fraction (0 to 1) and a description.

    Returns
    -------
    dict
        By label and ensemble, one trajectory per seed.
    """
    runs: dict[str, dict[Ensemble, list[Trajectory]]] = {}
    for k, model in enumerate(models):

        def tell(fraction: float, text: str, before: int = k, label: str = model.label) -> None:
            progress((before + fraction) / len(models), f"{label} {text}")

        nvt = _batch(model, starts, protocol, "nvt", folder, lambda f, text: tell(2 / 3 * f, f"NVT {text}"))
        middles = [
            run.frames[len(run.times) // 2].copy() if len(run.times) else start
            for run, start in zip(nvt, starts, strict=True)
        ]
        nve = _batch(
            model, middles, protocol, "nve", folder, lambda f, text: tell((2 + f) / 3, f"NVE {text}")
        )
        runs[model.label] = {"nvt": nvt, "nve": nve}
    return runs


def _batch(
    model: Contestant,
    starts: Sequence[Atoms],
    protocol: Protocol,
    ensemble: Ensemble,
    folder: Path | None,
    progress: Progress,
) -> list[Trajectory]:
    path = folder / f"{ensemble}-{_key(model, starts, protocol, ensemble)[:20]}.npz" if folder else None
    finished = load_trajectories(path, starts) if path else None
    if finished is None:
        finished = _run(model, starts, protocol, ensemble, progress)
        if path:
            save_trajectories(finished, path)
    progress(1.0, "finished")
    return finished


def _run(
    model: Contestant, starts: Sequence[Atoms], protocol: Protocol, ensemble: Ensemble, progress: Progress
) -> list[Trajectory]:
    return run_replicas(
        model.force_field.potential,
        starts,
        ensemble=ensemble,
        temperature=protocol.temperature,
        timestep=protocol.timestep,
        steps=protocol.steps(ensemble),
        every=protocol.every(ensemble),
        friction=protocol.friction,
        seed=0 if ensemble == "nvt" else 1,
        specialist=model.specialist,
        names=model.force_field.specialist_names,
        progress=progress,
    )


def _key(model: Contestant, starts: Sequence[Atoms], protocol: Protocol, ensemble: Ensemble) -> str:
    """SHA-256 of all that the result depends on."""
    settings = {name: value for name, value in asdict(protocol).items() if name not in ANALYSIS}
    potential = model.force_field.potential
    said = (model.force_field.fingerprint, str(potential.dtype), model.specialist, ensemble, settings)
    sha = hashlib.sha256(repr(said).encode())
    for atoms in starts:
        for array in (atoms.numbers, atoms.positions, atoms.cell.array, atoms.pbc, atoms.get_masses()):
            sha.update(array.tobytes())
        for store in (atoms.info, atoms.arrays):
            if KEY in store:
                sha.update(repr(np.asarray(store[KEY]).tolist()).encode())
    return sha.hexdigest()


ANALYSIS = ("equilibration", "correlation_time")
"""What of a protocol matters only after the runs."""


def estimated_seconds(models: Sequence[Contestant], starts: Sequence[Atoms], protocol: Protocol) -> float:
    """Seconds that :func:`run_models` will take without finished runs, from a few trial steps of every model.

    Parameters
    ----------
    models, starts, protocol
        As in :func:`run_models`.
    """
    n_steps = protocol.steps("nvt") + protocol.steps("nve")
    return sum(n_steps * _seconds_per_step(model, starts, protocol) for model in models)


def _seconds_per_step(model: Contestant, starts: Sequence[Atoms], protocol: Protocol) -> float:
    def run(steps: int) -> float:
        start = perf_counter()
        run_replicas(
            model.force_field.potential,
            starts,
            ensemble="nvt",
            temperature=protocol.temperature,
            timestep=protocol.timestep,
            steps=steps,
            every=steps,
            specialist=model.specialist,
            names=model.force_field.specialist_names,
        )
        return perf_counter() - start

    run(1)
    return run(TRIAL_STEPS) / TRIAL_STEPS
