"""Closed-loop calibration: merge again with frames that the merged potential visits and the specialists label.

merge -> short dynamics of the merged potential from the calibration frames of every specialist -> visited frames join those
of the specialist that they began at -> merge again. The specialists label the visited frames for free, and rows are
normalised per specialist and frame, so that more frames of one specialist do not outweigh the others.

Rollouts: molecular dynamics of a merged potential from every specialist's calibration frames, and its errors there.
"""

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from ase import Atoms

from ase_gffmerge.data.frames import bare, evenly
from ase_gffmerge.dynamics.batched_md import run_replicas
from ase_gffmerge.dynamics.stopping import standard_criteria
from ase_gffmerge.dynamics.trajectory import Trajectory
from ase_gffmerge.errors import MergeWarning
from ase_gffmerge.forcefield.force_field import ForceField
from ase_gffmerge.inference.errors import Errors, compare, labels
from ase_gffmerge.inference.predict import predict_frames
from ase_gffmerge.merging.merge import closed_form_merge
from ase_gffmerge.merging.recipe import ClosedLoopOptions, Recipe, TrajectoryOptions, load_recipe
from ase_gffmerge.merging.report import MergeReport
from ase_gffmerge.runtime.devices import resolve_device
from ase_gffmerge.runtime.memory import Portions
from ase_gffmerge.runtime.progress import Clock, Progress, no_progress, part_of

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


@dataclass(frozen=True, kw_only=True)
class RoundReport:
    """One merge, and how it fared on its own trajectories.

    Attributes
    ----------
    n_frames
        Calibration frames that went into this merge, per specialist.
    trajectories
        Per specialist: disagreement, stability, visited frames.
    seconds
        Wall time of the ``merge`` and of the ``dynamics`` with its labels.
    """

    n_frames: tuple[int, ...]
    trajectories: tuple[RolloutReport, ...]
    seconds: dict[str, float]

    @property
    def stable(self) -> bool:
        """Whether all replicas ran to the end."""
        return all(trajectory.stable for trajectory in self.trajectories)

    @property
    def disagreement(self) -> float:
        """Force MAE between merged potential and specialists on the visited frames, the mean over specialists, eV/Å.

        Infinite when there is a specialist from whose frames no replica lasted for a single frame.
        """
        errors = [trajectory.disagreement for trajectory in self.trajectories]
        return float(np.mean([error.force_mae if error else np.inf for error in errors]))

    @property
    def rank(self) -> tuple[int, float]:
        """Smaller is better: fewer broken replicas, then less disagreement."""
        return sum(sum(t.stopped.values()) for t in self.trajectories), self.disagreement

    def to_dict(self) -> dict[str, Any]:
        """Everything but the frames, as JSON types."""
        return {
            "n_frames": list(self.n_frames),
            "stable": self.stable,
            "disagreement": self.disagreement if np.isfinite(self.disagreement) else None,
            "trajectories": [trajectory.to_dict() for trajectory in self.trajectories],
            "seconds": self.seconds,
        }


@dataclass(frozen=True, kw_only=True)
class ClosedLoopResult:
    """The best merge of a closed loop.

    Attributes
    ----------
    merged, report
        The potential and its merge report.
    rounds
        All merges in order; the first one is that without visited frames.
    chosen
        Which of them it is.
    """

    merged: ForceField
    report: MergeReport
    rounds: tuple[RoundReport, ...]
    chosen: int


def closed_loop(
    specialists: Sequence[ForceField],
    recipe: str | Recipe | Mapping[str, object] = "gffmerge",
    options: ClosedLoopOptions | None = None,
    *,
    base: ForceField | None = None,
    device: str | torch.device = "auto",
    portions: Portions | None = None,
    progress: Progress = no_progress,
) -> ClosedLoopResult:
    """Merge, let the merged potential move, let the specialists label where it went, and merge again.

    Parameters
    ----------
    specialists, recipe, base, device
        As for :func:`ase_gffmerge.merge`; a distillation that the recipe asks for is left to that.
    options
        How many rounds, how hot, how long; default: what the recipe says of it.
    portions
        See :func:`.closed_form_merge`.
    progress
        Called with a fraction (0 to 1) and a description.

    Returns
    -------
    ClosedLoopResult
        The merge with the fewest broken replicas, among those the one that disagrees least.

    Raises
    ------
    IncompatibleSpecialistsError, FramesError, RecipeError, DeviceError
        With the reason and the remedy.
    """
    recipe = load_recipe(recipe)
    options = options or recipe.closed_loop or ClosedLoopOptions()
    recipe = recipe.model_copy(update={"closed_loop": None, "refine": None})
    target = resolve_device(device)
    grown, merges, rounds = list(specialists), list[_Merge](), list[RoundReport]()
    while len(rounds) <= options.rounds and not _settled(rounds, options.tolerance):
        if rounds:
            visits = [trajectory.visited for trajectory in rounds[-1].trajectories]
            grown = [_with_visited(s, v, options.frames) for s, v in zip(grown, visits, strict=True)]
        index, total = len(rounds), options.rounds + 1
        part = part_of(progress, index / total, (index + 1) / total, prefix=f"round {index}: ")
        done, report = _round(
            grown, recipe, options, index, base=base, device=target, portions=portions, progress=part
        )
        merges.append(done)
        rounds.append(report)
    chosen = min(range(len(rounds)), key=lambda k: rounds[k].rank)
    progress(1.0, merges[chosen].report.verdict)
    return merges[chosen].result(options, rounds, chosen)


@dataclass(frozen=True)
class _Merge:
    """What :func:`.closed_form_merge` returned, and what it warned of."""

    merged: ForceField
    report: MergeReport
    caught: list[warnings.WarningMessage]

    def result(
        self, options: ClosedLoopOptions, rounds: Sequence[RoundReport], chosen: int
    ) -> ClosedLoopResult:
        """The result, with the loop on record in the merged file; warnings are passed on."""
        for warning in self.caught:
            warnings.warn(warning.message, warning.category, stacklevel=3)
        record = self.merged.merged
        assert record is not None
        loop = {"chosen": chosen, "rounds": [entry.to_dict() for entry in rounds]}
        report = replace(self.report, closed_loop=loop)
        recipe = {**record.recipe, "closed_loop": options.model_dump(mode="json")}
        merged = replace(self.merged, merged=replace(record, recipe=recipe, report=report.to_dict()))
        return ClosedLoopResult(merged=merged, report=report, rounds=tuple(rounds), chosen=chosen)


def _round(
    specialists: Sequence[ForceField],
    recipe: Recipe,
    options: ClosedLoopOptions,
    index: int,
    *,
    base: ForceField | None,
    device: torch.device,
    portions: Portions | None,
    progress: Progress,
) -> tuple[_Merge, RoundReport]:
    """Merge, and follow the merged potential."""
    clock = Clock()
    with clock("merge"), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", MergeWarning)
        part = part_of(progress, 0.0, 0.6)
        merge = closed_form_merge(
            specialists, recipe, base=base, device=device, portions=portions, progress=part
        )
        done = _Merge(*merge, caught)
    with clock("dynamics"):
        trajectories = run_rollouts(
            done.merged, specialists, options, seed=index, progress=part_of(progress, 0.6, 1.0)
        )
    n_frames = tuple(len(specialist.calibration) for specialist in specialists)
    return done, RoundReport(n_frames=n_frames, trajectories=trajectories, seconds=clock.seconds)


def _settled(rounds: Sequence[RoundReport], tolerance: float) -> bool:
    """Whether the last merge is stable, and hardly better than the best before it."""
    if len(rounds) < 2 or not rounds[-1].stable:
        return False
    return rounds[-1].disagreement >= (1 - tolerance) * min(entry.disagreement for entry in rounds[:-1])


def _with_visited(specialist: ForceField, visited: Sequence[Atoms], n: int) -> ForceField:
    """The specialist with up to ``n`` of the visited frames, spread evenly, among its calibration frames."""
    chosen = [bare(visited[k], wrap=True) for k in evenly(len(visited), n)]
    return specialist.with_calibration((*specialist.calibration, *chosen))
