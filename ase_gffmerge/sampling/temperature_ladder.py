r"""Frames from molecular dynamics on a ladder of temperatures, and how far apart they must be to count as independent.

How far apart frames of a trajectory must be to count as independent.

The statistical inefficiency of a correlated series (Chodera et al., doi:10.1021/ct0502864) times its interval,

.. math:: g\,\tau = \tau\Big(1 + 2\sum_{t=1}^{t_0}\big(1 - \tfrac tN\big)\,C(t)\Big),

where C is the autocorrelation of interatomic distances, averaged over pairs of atoms, and t_0 its first zero.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from itertools import product
from typing import Annotated

import numpy as np
from ase import Atoms
from ase.geometry import find_mic
from pydantic import BaseModel, ConfigDict, Field

from ase_gffmerge.data.frames import bare, evenly
from ase_gffmerge.dynamics.batched_md import run_replicas
from ase_gffmerge.dynamics.stopping import StoppingCriteria
from ase_gffmerge.dynamics.trajectory import Trajectory
from ase_gffmerge.models import Potential

MAX_PAIRS = 500


def decorrelation_time(trajectories: Sequence[Sequence[Atoms]], interval: float) -> float:
    """Time in fs after which interatomic distances are forgotten, the mean over trajectories.

    Parameters
    ----------
    trajectories
        Frames that were not wrapped, one sequence per trajectory; those shorter than four frames say nothing.
    interval
        From frame to frame, fs.
    """
    known = [distances(frames) for frames in trajectories if len(frames) >= 4 and len(frames[0]) > 1]
    return interval * (float(np.mean([inefficiency(series) for series in known])) if known else 1.0)


def inefficiency(series: np.ndarray) -> float:
    """Statistical inefficiency, at least 1, of a series (n_frames, n_features); constant features are left out.

    Examples
    --------
    >>> noise = np.random.default_rng(0).standard_normal((500, 20))
    >>> round(inefficiency(noise), 1), round(inefficiency(np.repeat(noise, 5, axis=0)), 1)
    (1.0, 5.0)
    """
    n = len(series)
    deviation = series - series.mean(axis=0)
    scale = deviation.std(axis=0)
    deviation = deviation[:, scale > 1e-9] / scale[scale > 1e-9]
    total = 1.0
    for lag in range(1, n):
        correlation = float((deviation[:-lag] * deviation[lag:]).mean()) if deviation.size else 0.0
        if correlation <= 0:
            break
        total += 2 * (1 - lag / n) * correlation
    return total


def distances(frames: Sequence[Atoms]) -> np.ndarray:
    """Distances (n_frames, n_pairs) in Å of at most ``MAX_PAIRS`` pairs of atoms, each to the image nearest at first."""
    first = frames[0]
    i, j = np.triu_indices(len(first), k=1)
    if len(i) > MAX_PAIRS:
        chosen = np.random.default_rng(0).choice(len(i), size=MAX_PAIRS, replace=False)
        i, j = i[chosen], j[chosen]
    vectors = np.array([atoms.positions[j] - atoms.positions[i] for atoms in frames])
    offsets = find_mic(vectors[0], first.cell, first.pbc)[0] - vectors[0]
    return np.linalg.norm(vectors + offsets, axis=2)


INTERVAL, SEGMENT = 10.0, 1000.0
"""Time in fs between candidate frames, and between two looks at whether there are enough."""


class LadderOptions(BaseModel):
    """Molecular dynamics at several temperatures.

    Attributes
    ----------
    temperatures
        The ladder, K: every structure runs at each.
    copies
        Replicas per structure and temperature.
    time
        Longest time in ps that a replica gives frames; it ends earlier when there are enough.
    equilibration
        Time before that, ps.
    timestep, friction
        fs and 1/fs.
    seed
        The same seed gives the same frames.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    temperatures: tuple[Annotated[float, Field(ge=0)], ...] = Field(
        default=(300.0, 500.0, 700.0), min_length=1
    )
    copies: int = Field(default=2, ge=1)
    time: float = Field(default=5.0, gt=0)
    equilibration: float = Field(default=0.2, ge=0)
    timestep: float = Field(default=0.5, gt=0)
    friction: float = Field(default=0.02, gt=0)
    seed: int = Field(default=0, ge=0)

    @property
    def longest(self) -> float:
        """Longest time of a replica with its equilibration, fs."""
        return 1000 * (self.equilibration + self.time)


@dataclass(frozen=True, kw_only=True)
class Ladder:
    """Frames of a ladder.

    Attributes
    ----------
    frames
        Bare structures; ``info`` holds ``source`` (``md``) and ``temperature`` (K).
    references
        Per frame, the structure that its replica started from.
    stopped
        Number of replicas that broke, per reason.
    decorrelation_fs
        The frames of one replica are at least this far apart.
    simulated_ps
        Time of all replicas together.
    """

    frames: tuple[Atoms, ...]
    references: tuple[Atoms, ...]
    stopped: Counter[str]
    decorrelation_fs: float
    simulated_ps: float


@dataclass
class _Replica:
    """One replica: where it started, where it is, its candidate frames."""

    start: Atoms
    temperature: float
    now: Atoms
    candidates: list[Atoms] = field(default_factory=list)
    stopped: str | None = None
    time: float = 0.0

    def extend(self, run: Trajectory, *, equilibration: float) -> None:
        """Take in another stretch of the trajectory; the last frame before a break is dropped."""
        frames = run.frames[1:] if run.stopped is None else run.frames[1:-1]
        times = self.time + run.times[1:]
        self.candidates += [atoms for atoms, time in zip(frames, times, strict=False) if time > equilibration]
        self.stopped = run.stopped
        self.time += float(run.times[-1]) if len(run.times) else 0.0
        self.now = run.frames[-1] if run.frames else self.now


def run_ladder(
    potential: Potential,
    structures: Sequence[Atoms],
    options: LadderOptions,
    *,
    n: int,
    criteria: StoppingCriteria,
    executor: Executor | None = None,
    progress: Callable[[float, str], None],
) -> Ladder:
    """Run every structure at every temperature until there are ``n`` decorrelated frames, or time is over.

    Parameters
    ----------
    potential, structures
        What moves, and from where.
    options
        How hot and how long.
    n
        Frames wanted; when there are more they are thinned out evenly.
    criteria
        What stops a replica; bonds are compared with those of its structure.
    executor
        Workers among which replicas are shared out; default: this process.
    progress
        Called with a fraction (0 to 1) and a description.
    """
    replicas = [
        _Replica(atoms, temperature, atoms)
        for atoms, temperature, _ in product(structures, options.temperatures, range(options.copies))
    ]
    decorrelation, chosen, segment = INTERVAL, list[tuple[_Replica, Atoms]](), 0
    while len(chosen) < n and segment * SEGMENT < options.longest:
        moving = [replica for replica in replicas if replica.stopped is None]
        if not moving:
            break
        _segment(
            potential,
            moving,
            options,
            segment=segment,
            criteria=criteria,
            executor=executor,
            progress=progress,
        )
        decorrelation = decorrelation_time([replica.candidates for replica in replicas], INTERVAL)
        stride = math.ceil(decorrelation / INTERVAL)
        chosen = [(replica, atoms) for replica in replicas for atoms in replica.candidates[::stride]]
        segment += 1
    progress(1.0, f"{min(len(chosen), n)} of {n} frames")
    kept = [chosen[k] for k in evenly(len(chosen), n)]
    return Ladder(
        frames=tuple(_sampled(atoms, replica.temperature) for replica, atoms in kept),
        references=tuple(replica.start for replica, _ in kept),
        stopped=Counter(replica.stopped for replica in replicas if replica.stopped),
        decorrelation_fs=decorrelation,
        simulated_ps=sum(replica.time for replica in replicas) / 1000,
    )


def _segment(
    potential: Potential,
    moving: Sequence[_Replica],
    options: LadderOptions,
    *,
    segment: int,
    criteria: StoppingCriteria,
    executor: Executor | None,
    progress: Callable[[float, str], None],
) -> None:
    every = max(1, round(INTERVAL / options.timestep))
    done = segment * SEGMENT / options.longest
    length = min(SEGMENT, options.longest * (1 - done))
    runs = run_replicas(
        potential,
        [replica.now for replica in moving],
        ensemble="nvt",
        temperature=[replica.temperature for replica in moving],
        timestep=options.timestep,
        steps=every * max(1, round(length / INTERVAL)),
        every=every,
        friction=options.friction,
        seed=[(options.seed, segment, k) for k in range(len(moving))],
        thermalize=segment == 0,
        references=[replica.start for replica in moving],
        criteria=criteria,
        executor=executor,
        progress=lambda fraction, text: progress(done + fraction * length / options.longest, text),
    )
    for replica, run in zip(moving, runs, strict=True):
        replica.extend(run, equilibration=1000 * options.equilibration)


def _sampled(atoms: Atoms, temperature: float) -> Atoms:
    frame = bare(atoms, wrap=True)
    frame.info |= {"source": "md", "temperature": temperature}
    return frame
