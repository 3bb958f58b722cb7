"""Rollouts: molecular dynamics of a merged potential from every specialist's calibration frames, and its errors there."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from ase import Atoms

from ase_gffmerge.dynamics.batched_md import run_replicas
from ase_gffmerge.dynamics.stopping import standard_criteria
from ase_gffmerge.dynamics.trajectory import Trajectory
from ase_gffmerge.forcefield.force_field import ForceField
from ase_gffmerge.inference.batches import predict_frames
from ase_gffmerge.inference.metrics import Errors, compare, labels
from ase_gffmerge.merging.recipe import TrajectoryOptions
from ase_gffmerge.runtime.progress import Progress, no_progress

SPACING = 20.0
"""fs between visited frames."""


@dataclass(frozen=True, kw_only=True)
class RolloutReport:
    """Rollouts of a merged potential that began at calibration frames of one specialist.

    Attributes
    ----------
    specialist
        Its name.
    visited
        The frames it went through, ``SPACING`` apart, without the starts; none after a replica broke.
    disagreement
        Of merged potential and specialist on them; ``None`` when there are none.
    n_replicas
        How many there were.
    stopped
        How many broke, per reason.
    mean_time
        How long they lasted on average, ps.
    """

    specialist: str
    visited: tuple[Atoms, ...]
    disagreement: Errors | None
    n_replicas: int
    stopped: Mapping[str, int]
    mean_time: float

    @property
    def stable(self) -> bool:
        """Whether all replicas ran to the end."""
        return not self.stopped

    def to_dict(self) -> dict[str, Any]:
        """Everything but the frames, as JSON types."""
        return {
            "specialist": self.specialist,
            "n_visited": len(self.visited),
            "disagreement": self.disagreement.to_dict() if self.disagreement else None,
            "n_replicas": self.n_replicas,
            "stopped": dict(self.stopped),
            "mean_time": self.mean_time,
        }


def run_rollouts(
    merged: ForceField,
    specialists: Sequence[ForceField],
    options: TrajectoryOptions,
    *,
    seed: int = 0,
    progress: Progress = no_progress,
) -> tuple[RolloutReport, ...]:
    """Run the merged potential from every specialist's calibration frames and compare it with them where it went.

    Parameters
    ----------
    merged
        A merge of the specialists, on its device.
    specialists
        With calibration frames, in the order of their indices, on any device.
    options
        How many replicas, how hot, how long.
    seed
        Together with ``options.seed``: another number gives other starts and other noise.
    progress
        Called with a fraction (0 to 1) and a description.

    Returns
    -------
    tuple of RolloutReport
        One per specialist. All replicas of all specialists move in one batch.
    """
    starts = [_starts(s.calibration, options.replicas, seed=(options.seed, seed)) for s in specialists]
    owner = [k for k, frames in enumerate(starts) for _ in frames]
    every = max(1, round(SPACING / options.timestep))
    runs = run_replicas(
        merged.potential,
        [atoms for frames in starts for atoms in frames],
        ensemble="nvt",
        temperature=options.temperature,
        timestep=options.timestep,
        steps=max(every, round(1000 * options.time / options.timestep)),
        every=every,
        friction=options.friction,
        seed=[(options.seed, seed, k) for k in range(len(owner))],
        specialist=owner if merged.potential.hyper.n_embeddings > 1 else 0,
        criteria=standard_criteria(merged, max_grade=options.max_grade),
        progress=progress,
    )
    return tuple(
        _report(specialist, [run for run, k in zip(runs, owner, strict=True) if k == index])
        for index, specialist in enumerate(specialists)
    )


def _starts(frames: Sequence[Atoms], n: int, *, seed: tuple[int, int]) -> list[Atoms]:
    """``n`` different calibration frames, or all of them over and over when there are fewer."""
    order = np.random.default_rng(seed).permutation(len(frames))
    return [frames[order[k % len(order)]] for k in range(n)]


def _report(specialist: ForceField, runs: Sequence[Trajectory]) -> RolloutReport:
    visited = tuple(atoms for run in runs for atoms in run.frames[1:])
    predicted = predict_frames(specialist.potential, visited) if visited else None
    return RolloutReport(
        specialist=specialist.name,
        visited=visited,
        disagreement=compare(labels(visited), predicted) if predicted else None,
        n_replicas=len(runs),
        stopped=Counter(run.stopped for run in runs if run.stopped is not None),
        mean_time=float(np.mean([run.duration for run in runs])) / 1000,
    )
