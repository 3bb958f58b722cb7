"""What ``gffmerge demo`` measures: force errors of specialists and merges, and dynamics with the merged potential."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase.calculators.calculator import Calculator

from ase_gffmerge.dynamics.ase_md import run_md
from ase_gffmerge.dynamics.result import MDResult, Sample
from ase_gffmerge.evaluation.comparison.measurement import run_timed
from ase_gffmerge.forcefield.force_field import ForceField
from ase_gffmerge.forcefield.pretrained import bundled_test_frames
from ase_gffmerge.inference.metrics import labels, predict_frames
from ase_gffmerge.methods import METHODS, MergeInputs
from ase_gffmerge.models import Potential
from ase_gffmerge.runtime.progress import Progress

BASELINES = ("mean", "paper")
DEFAULT = "gffmerge"
TEMPERATURES = {"nvt": 500.0, "nve": 300.0}
TIMESTEP = 0.5

Forces = dict[str, np.ndarray]
"""Force components of all test frames, flat, in eV/Å, by name of the specialist they belong to."""


@dataclass(frozen=True, kw_only=True)
class ForceComparison:
    """Forces of several models on the same test frames.

    Attributes
    ----------
    reference
        Labels.
    predicted
        By model: ``specialist`` (each on its own frames), ``mean``, ``paper``, ``gffmerge``.
    seconds
        Wall time of each merge.
    """

    reference: Forces
    predicted: Mapping[str, Forces]
    seconds: Mapping[str, float]

    @property
    def force_mae(self) -> dict[str, dict[str, float]]:
        """Mean absolute force error in eV/Å by model and molecule."""
        return {
            model: {
                name: float(np.abs(value - self.reference[name]).mean()) for name, value in forces.items()
            }
            for model, forces in self.predicted.items()
        }


@dataclass(frozen=True, kw_only=True)
class DemoResult:
    """All that the demo measured; ``runs[ensemble][name]`` are the dynamics."""

    comparison: ForceComparison
    cache_hit: bool
    runs: Mapping[str, Mapping[str, MDResult]]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the specialists."""
        return tuple(self.comparison.reference)

    @property
    def steps_per_second(self) -> dict[str, float]:
        """Over all dynamics of a molecule, trajectory writing included."""
        runs = {name: [self.runs[ensemble][name] for ensemble in self.runs] for name in self.names}
        return {name: sum(r.steps for r in row) / sum(r.seconds for r in row) for name, row in runs.items()}

    def to_dict(self) -> dict[str, Any]:
        """JSON-able summary in eV, Å and seconds; ``merge_seconds`` is the time to load on a cache hit."""
        return {
            "force_mae": self.comparison.force_mae,
            "merge_seconds": self.comparison.seconds[DEFAULT],
            "cache_hit": self.cache_hit,
            "nve_drift_per_atom": {name: run.drift_per_atom for name, run in self.runs["nve"].items()},
            "steps_per_second": self.steps_per_second,
        }


def compare_models(
    specialists: Sequence[ForceField], merged: ForceField, seconds: float, *, device: torch.device
) -> ForceComparison:
    """Evaluate specialists, baselines (merged here) and ``merged`` on the bundled test frames.

    Parameters
    ----------
    specialists
        Bundled ones.
    merged
        Their merge by the default recipe, on ``device``.
    seconds
        What that merge took.
    """
    names = [specialist.name for specialist in specialists]
    merge_inputs = MergeInputs(specialists=tuple(specialists), device=device)
    models, taken = {}, {}
    for baseline in BASELINES:
        merge_output, taken[baseline] = run_timed(METHODS[baseline], merge_inputs)
        models[baseline] = merge_output.potential(0)
    models[DEFAULT], taken[DEFAULT] = merged.potential, seconds
    own = {s.name: _forces(s.to(device=device).potential, s.name) for s in specialists}
    return ForceComparison(
        reference={name: np.concatenate(labels(bundled_test_frames(name)).forces).ravel() for name in names},
        predicted={
            "specialist": own,
            **{
                model: {name: _forces(potential, name) for name in names}
                for model, potential in models.items()
            },
        },
        seconds=taken,
    )


def _forces(potential: Potential, name: str) -> np.ndarray:
    return np.concatenate(predict_frames(potential, bundled_test_frames(name)).forces).ravel()


def run_dynamics(
    calculator: Calculator,
    names: Sequence[str],
    picoseconds: Mapping[str, float],
    out: Path,
    *,
    progress: Progress,
) -> dict[str, dict[str, MDResult]]:
    """Run every molecule with the one calculator, from its first test frame, and write the trajectories.

    Parameters
    ----------
    calculator
        The merged potential.
    names
        Of the specialists whose molecules are run.
    picoseconds
        Length by ensemble, ``nvt`` (Langevin, 500 K) and ``nve`` (velocities drawn at 300 K); step 0.5 fs.
    out
        Folder of the trajectories ``NAME-ENSEMBLE.traj``.
    progress
        Called with a fraction (0 to 1) and a description.
    """
    runs: dict[str, dict[str, MDResult]] = {ensemble: {} for ensemble in picoseconds}
    steps = {ensemble: max(round(1000 * ps / TIMESTEP), 1) for ensemble, ps in picoseconds.items()}
    done, total = 0, len(names) * sum(steps.values())
    for ensemble, n in steps.items():
        for name in names:
            atoms = bundled_test_frames(name)[0]
            atoms.info.clear()
            atoms.calc = calculator

            def watch(sample: Sample, before: int = done, text: str = f"{ensemble} {name}") -> None:
                progress((before + sample.step) / total, f"{text}  T {sample.temperature:6.1f} K")

            runs[ensemble][name] = run_md(
                atoms,
                ensemble=ensemble,
                temperature=TEMPERATURES[ensemble],
                steps=n,
                timestep=TIMESTEP,
                trajectory=out / f"{name}-{ensemble}.traj",
                on_sample=watch,
            )
            done += n
    return runs
