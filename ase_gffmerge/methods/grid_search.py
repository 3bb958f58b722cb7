r"""Hyper-parameters chosen by disagreement with the specialists on their own calibration frames: no labels, no test frames.

.. math::

   D(f) = \frac1K \sum_k
          \frac{\bigl\|F_f - F_k\bigr\|_{C_k}}{\bigl\|F_k\bigr\|_{C_k}}

where :math:`F_k` are the forces that specialist k itself predicts on some of its calibration frames :math:`C_k`; they are
evaluated once, whatever the number of trials.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Self

import numpy as np
import torch
from ase import Atoms
from torch import Tensor

from ase_gffmerge.forcefield.force_field import ForceField
from ase_gffmerge.graphs import batch_graphs, build_graph, predict
from ase_gffmerge.graphs.graph import AtomGraph
from ase_gffmerge.inference.batches import check_frames
from ase_gffmerge.methods.base import MergeOutput
from ase_gffmerge.models import Potential
from ase_gffmerge.runtime.batching import chunks
from ase_gffmerge.runtime.progress import Progress

N_FRAMES = 20
"""Calibration frames per specialist that trials are measured on."""

MAX_ATOMS = 2000

Settings = Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class DisagreementMetric:
    """Disagreement with the specialists' own forces on some of their calibration frames.

    Attributes
    ----------
    batches
        Per specialist, its frames.
    forces
        Per specialist, its forces (n_atoms, 3) in eV/Å on them.
    """

    batches: tuple[tuple[AtomGraph, ...], ...]
    forces: tuple[Tensor, ...]

    @classmethod
    def of(cls, specialists: Sequence[ForceField], *, n_frames: int = N_FRAMES) -> Self:
        """Evaluate the specialists, all on one device, on at most ``n_frames`` evenly chosen frames each.

        Raises
        ------
        FramesError
            When a specialist has no calibration frames.
        """
        for specialist in specialists:
            check_frames(specialist.potential, specialist.calibration)
        batches = tuple(_batches(s.potential, _evenly(s.calibration, n_frames)) for s in specialists)
        forces = [_forces(s.potential, own) for s, own in zip(specialists, batches, strict=True)]
        return cls(batches=batches, forces=tuple(forces))

    def disagreement(self, potential: Potential) -> float:
        """D of a potential that knows all elements of all frames; infinite when its forces are not finite."""
        ratios = [
            float((_forces(potential, own) - forces).norm() / forces.norm().clamp(min=1e-12))
            for own, forces in zip(self.batches, self.forces, strict=True)
        ]
        return float(np.nan_to_num(np.mean(ratios), nan=np.inf))


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One choice of hyper-parameters.

    Attributes
    ----------
    settings
        The hyper-parameters.
    potential
        What they make.
    disagreement
        D, see the module.
    """

    settings: Settings
    potential: Potential
    disagreement: float

    def merge_output(self) -> MergeOutput:
        """The potential with its settings, as a method returns it."""
        return MergeOutput(potentials=(self.potential,), settings=dict(self.settings))


def tune(
    build: Callable[..., Potential],
    grid: Sequence[Settings],
    metric: DisagreementMetric,
    *,
    progress: Progress,
) -> Trial:
    """Try every point of a grid and keep the one of least disagreement, the first one among equals.

    Parameters
    ----------
    build
        Makes a potential from settings given as keyword arguments.
    grid
        Settings to try, at least one.
    metric
        Measures what they make.
    progress
        Called with a fraction (0 to 1) and the settings.
    """
    best: Trial | None = None
    for i, settings in enumerate(grid):
        progress(i / len(grid), ", ".join(f"{name} {value:g}" for name, value in settings.items()))
        potential = build(**settings)
        disagreement = metric.disagreement(potential)
        if best is None or disagreement < best.disagreement:
            best = Trial(settings=settings, potential=potential, disagreement=disagreement)
    assert best is not None
    return best


def grid_of(**values: Sequence[float]) -> list[Settings]:
    """All combinations of the values of several settings."""
    return [dict(zip(values, choice, strict=True)) for choice in product(*values.values())]


def _evenly(frames: Sequence[Atoms], n_frames: int) -> list[Atoms]:
    """At most ``n_frames`` frames, evenly spaced from the first to the last."""
    chosen = np.linspace(0, len(frames) - 1, min(n_frames, len(frames))).round().astype(int)
    return [frames[i] for i in chosen]


def _batches(potential: Potential, frames: Sequence[Atoms]) -> tuple[AtomGraph, ...]:
    cutoff, dtype = potential.hyper.cutoff, potential.dtype
    groups = [
        [build_graph(atoms, cutoff, dtype=dtype) for atoms in group] for group in chunks(frames, MAX_ATOMS)
    ]
    return tuple(batch_graphs(graphs).to(potential.device) for graphs in groups)


def _forces(potential: Potential, batches: Sequence[AtomGraph]) -> Tensor:
    return torch.cat([predict(potential, batch).forces for batch in batches]).double()
