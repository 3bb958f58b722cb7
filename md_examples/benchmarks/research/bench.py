"""What all trials share: specialists, frames, test frames, the folder of results, and one cached trunk."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms

from ase_gffmerge.forcefield.force_field import ForceField
from ase_gffmerge.graphs import batch_graphs, build_graph, predict
from ase_gffmerge.inference.errors import evaluate
from ase_gffmerge.merging.recipe import Recipe
from ase_gffmerge.models import Potential
from research.trunk import Trunk, build_trunk

REPEATS = 25
"""Evaluations per model when inference is timed."""


@dataclass(frozen=True)
class Bench:
    """The fixed question of all trials.

    Attributes
    ----------
    specialists
        To be merged, with their calibration frames.
    pools
        For each specialist more frames of its territory (its training frames), used without their labels.
    tests
        For each specialist labelled frames that it never saw.
    folder
        Where the trunk and the results are kept.
    """

    specialists: tuple[ForceField, ...]
    pools: tuple[tuple[Atoms, ...], ...]
    tests: tuple[tuple[Atoms, ...], ...]
    folder: Path
    samples: dict[Any, Any] = field(default_factory=dict)

    @property
    def identity(self) -> str:
        """What results depend on beside the trial."""
        prints = "-".join(s.fingerprint[:12] for s in self.specialists)
        return f"{prints}-{len(self.tests[0])}"

    def pool_frames(self, n: int) -> tuple[tuple[Atoms, ...], ...]:
        """``n`` frames of every pool, evenly spread over it (all of it when it is smaller)."""
        spread = [np.linspace(0, len(pool) - 1, min(n, len(pool))).astype(int) for pool in self.pools]
        return tuple(tuple(pool[i] for i in chosen) for pool, chosen in zip(self.pools, spread, strict=True))

    def calibrated(self, n: int) -> list[ForceField]:
        """The specialists with ``n`` calibration frames from their pools."""
        frames = self.pool_frames(n)
        return [s.with_calibration(f) for s, f in zip(self.specialists, frames, strict=True)]

    @cached_property
    def trunk(self) -> Trunk:
        """Steps 1-4 of the default recipe, kept in the folder; trials that change only step 5 share it."""
        path = self.folder / f"trunk-{self.identity}.pt"
        if path.exists():
            return torch.load(path, weights_only=False)
        trunk = build_trunk(self.specialists, Recipe())
        torch.save(trunk, path)
        return trunk


@dataclass(frozen=True, kw_only=True)
class MergeOutput:
    """What a trial leaves.

    Attributes
    ----------
    potentials
        For each specialist the model on its territory; the same object K times for one shared surface.
    seconds
        Processor seconds of the whole merge, a shared trunk included.
    note
        Whatever else should be known (ridge chosen, effective rank, ...).
    """

    potentials: tuple[Potential, ...]
    seconds: float
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One row of the table.

    Attributes
    ----------
    name, family
        Unique name; rows are grouped by family.
    changes
        What differs from the cheap reference: steps 1-4, then 1024 dense features on frames with two rattled copies each.
    run
        Does it.
    order
        Trials with smaller numbers run first.
    costs
        Whether inference costs something else than the reference's, so that it is timed.
    """

    name: str
    family: str
    changes: str
    run: Callable[[Bench], MergeOutput]
    order: int = 50
    costs: bool = False


def measure(trial: Trial, bench: Bench) -> dict[str, Any]:
    """Run a trial and return its row: errors in meV/Å and meV/atom per specialist, seconds, inference cost."""
    outcome = trial.run(bench)
    errors = [
        evaluate(potential, test, specialist=k)
        for k, (potential, test) in enumerate(zip(outcome.potentials, bench.tests, strict=True))
    ]
    names = [s.name for s in bench.specialists]
    return {
        "name": trial.name,
        "family": trial.family,
        "changes": trial.changes,
        "force_mae": {name: 1000 * e.force_mae for name, e in zip(names, errors, strict=True)},
        "energy_mae": {name: 1000 * e.energy_mae for name, e in zip(names, errors, strict=True)},
        "seconds": outcome.seconds,
        "inference": inference_ratio(outcome.potentials[0], bench) if trial.costs else None,
        "note": outcome.note,
    }


def inference_ratio(potential: Potential, bench: Bench) -> float:
    """Processor time of one energy and force call relative to the first specialist's, evaluated in turn (medians)."""
    atoms, specialist = bench.tests[0][0], bench.specialists[0]
    graph = batch_graphs([build_graph(atoms, specialist.cutoff, dtype=potential.dtype)])
    ratios = []
    for _ in range(REPEATS):
        times = []
        for model in (potential, specialist.potential):
            start = time.process_time()
            predict(model, graph)
            times.append(time.process_time() - start)
        ratios.append(times[0] / times[1])
    return statistics.median(ratios)


def mean_force_mae(row: dict[str, Any]) -> float:
    """Mean over specialists of the force MAE in meV/Å."""
    return statistics.fmean(row["force_mae"].values())


def shared(potential: Potential, specialists: Sequence[ForceField]) -> tuple[Potential, ...]:
    """One surface for all specialists."""
    return (potential,) * len(specialists)
