"""Closed-loop calibration: where the merged potential goes by itself, the specialists tell it what is right.

merge -> short dynamics of the merged potential -> visited frames join the calibration frames of the specialist in whose
territory they are -> merge again. The specialists label the visited frames for free, and rows are normalised per specialist
and frame, so that more frames of one specialist do not outweigh the others.
"""

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from ase import Atoms

from ase_gffmerge.data.frames import bare, evenly
from ase_gffmerge.errors import MergeWarning
from ase_gffmerge.forcefield.force_field import ForceField
from ase_gffmerge.merging.loop_options import ClosedLoopOptions
from ase_gffmerge.merging.merge import merge
from ase_gffmerge.merging.recipe import Recipe, load_recipe
from ase_gffmerge.merging.report import MergeReport
from ase_gffmerge.runtime.devices import resolve_device
from ase_gffmerge.runtime.progress import Progress, no_progress
from ase_gffmerge.workflows.rollouts import OwnTrajectory, follow


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
    trajectories: tuple[OwnTrajectory, ...]
    seconds: dict[str, float]

    @property
    def stable(self) -> bool:
        """Whether all replicas ran to the end."""
        return all(trajectory.stable for trajectory in self.trajectories)

    @property
    def disagreement(self) -> float:
        """Force MAE between merged potential and specialists on the visited frames, the mean over specialists, eV/Å.

        Infinite when there is a specialist in whose territory no replica lasted for a single frame.
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
            "disagreement": self.disagreement,
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

    def to_dict(self) -> dict[str, Any]:
        """The rounds as JSON types."""
        return {"chosen": self.chosen, "rounds": [entry.to_dict() for entry in self.rounds]}

    def summary(self) -> str:
        """A line per round."""
        lines = []
        for k, entry in enumerate(self.rounds):
            parts = [
                f"{t.specialist} {1000 * t.disagreement.force_mae:.1f} meV/Å"
                if t.disagreement
                else f"{t.specialist} broke"
                for t in entry.trajectories
            ]
            held = sum(t.n_replicas - sum(t.stopped.values()) for t in entry.trajectories)
            total = sum(t.n_replicas for t in entry.trajectories)
            mark = " (chosen)" if k == self.chosen else ""
            lines.append(f"  round {k}: differs by {', '.join(parts)}; {held} of {total} replicas held{mark}")
        return "\n".join(["on its own trajectories", *lines])


def closed_loop(
    specialists: Sequence[ForceField],
    recipe: str | Recipe | dict[str, Any] = "gffmerge",
    options: ClosedLoopOptions | None = None,
    *,
    device: str | torch.device = "auto",
    progress: Progress | None = None,
) -> ClosedLoopResult:
    """Merge, let the merged potential move, let the specialists label where it went, and merge again.

    Parameters
    ----------
    specialists, recipe, device
        As for :func:`~ase_gffmerge.merging.merge.merge`.
    options
        How many rounds, how hot, how long; default: what the recipe says of it.
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
    recipe = recipe.model_copy(update={"closed_loop": None})
    tell, target = progress or no_progress, resolve_device(device)
    grown, merges, rounds = list(specialists), list[_Merge](), list[RoundReport]()
    while len(rounds) <= options.rounds and not _settled(rounds, options.tolerance):
        if rounds:
            visits = [trajectory.visited for trajectory in rounds[-1].trajectories]
            grown = [_with_visited(s, v, options.frames) for s, v in zip(grown, visits, strict=True)]
        stage = _Stage(tell, len(rounds), options.rounds + 1)
        done, report = _round(grown, recipe, options, len(rounds), device=target, stage=stage)
        merges.append(done)
        rounds.append(report)
    chosen = min(range(len(rounds)), key=lambda k: rounds[k].rank)
    tell(1.0, merges[chosen].report.verdict)
    return merges[chosen].result(options, rounds, chosen)


@dataclass(frozen=True)
class _Merge:
    """What :func:`merge` returned, and what it warned of."""

    merged: ForceField
    report: MergeReport
    said: list[warnings.WarningMessage]

    def result(
        self, options: ClosedLoopOptions, rounds: Sequence[RoundReport], chosen: int
    ) -> ClosedLoopResult:
        """The result, with the loop on record in the merged file; warnings are passed on."""
        for warning in self.said:
            warnings.warn(warning.message, warning.category, stacklevel=3)
        record = self.merged.merged
        assert record is not None
        recipe = {**record.recipe, "closed_loop": options.model_dump(mode="json")}
        merged = replace(self.merged, merged=replace(record, recipe=recipe))
        return ClosedLoopResult(merged=merged, report=self.report, rounds=tuple(rounds), chosen=chosen)


@dataclass(frozen=True)
class _Stage:
    """Progress of one round of several."""

    tell: Progress
    index: int
    total: int

    def part(self, start: float, end: float) -> Progress:
        """Progress of a part of the round."""
        return lambda x, text: self.tell(
            (self.index + start + (end - start) * x) / self.total, f"round {self.index}: {text}"
        )


def _round(
    specialists: Sequence[ForceField],
    recipe: Recipe,
    options: ClosedLoopOptions,
    index: int,
    *,
    device: torch.device,
    stage: _Stage,
) -> tuple[_Merge, RoundReport]:
    """Merge, and follow the merged potential."""
    clock = [time.perf_counter()]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", MergeWarning)
        done = _Merge(*merge(specialists, recipe, device=device, progress=stage.part(0.0, 0.6)), said)
    clock.append(time.perf_counter())
    went = follow(done.merged, specialists, options, seed=index, progress=stage.part(0.6, 1.0))
    clock.append(time.perf_counter())
    report = RoundReport(
        n_frames=tuple(len(specialist.calibration) for specialist in specialists),
        trajectories=went,
        seconds={"merge": clock[1] - clock[0], "dynamics": clock[2] - clock[1]},
    )
    return done, report


def _settled(rounds: Sequence[RoundReport], tolerance: float) -> bool:
    """Whether the last merge is stable, and hardly better than the best before it."""
    if len(rounds) < 2 or not rounds[-1].stable:
        return False
    return rounds[-1].disagreement >= (1 - tolerance) * min(entry.disagreement for entry in rounds[:-1])


def _with_visited(specialist: ForceField, visited: Sequence[Atoms], n: int) -> ForceField:
    """The specialist with up to ``n`` of the visited frames, spread evenly, among its calibration frames."""
    chosen = [bare(visited[k], wrap=True) for k in evenly(len(visited), n)]
    return specialist.with_calibration((*specialist.calibration, *chosen))
