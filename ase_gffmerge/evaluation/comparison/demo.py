"""What ``gffmerge demo`` measures: force errors of specialists and merges, dynamics with the merged one; as a table."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from ase.calculators.calculator import Calculator

from ase_gffmerge.dynamics.ase_md import run_md
from ase_gffmerge.dynamics.integrators import Conditions
from ase_gffmerge.dynamics.trajectory import Sample, Trajectory
from ase_gffmerge.evaluation.comparison.measurement import run_timed
from ase_gffmerge.evaluation.table import Column, Table
from ase_gffmerge.forcefield.force_field import ForceField, bundled_test_frames
from ase_gffmerge.inference.errors import labels
from ase_gffmerge.inference.predict import predict_frames
from ase_gffmerge.methods import METHODS, MergeInputs
from ase_gffmerge.models import Potential
from ase_gffmerge.runtime.progress import Progress

BASELINES = ("mean", "paper", "ensemble")
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
        By model: ``specialist`` (each on its own frames), the baselines, ``gffmerge``.
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
    runs: Mapping[str, Mapping[str, Trajectory]]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the specialists."""
        return tuple(self.comparison.reference)

    @property
    def steps_per_second(self) -> dict[str, float]:
        """Over all dynamics of a molecule, trajectory writing included."""
        runs = {name: [self.runs[ensemble][name] for ensemble in self.runs] for name in self.names}
        return {name: sum(r.steps for r in row) / sum(r.seconds for r in row) for name, row in runs.items()}

    def to_dict(self) -> dict[str, object]:
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
) -> dict[str, dict[str, Trajectory]]:
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
    runs: dict[str, dict[str, Trajectory]] = {ensemble: {} for ensemble in picoseconds}
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
                Conditions(ensemble=ensemble, temperature=TEMPERATURES[ensemble], timestep=TIMESTEP),
                steps=n,
                trajectory=out / f"{name}-{ensemble}.traj",
                on_sample=watch,
            )
            done += n
    return runs


def demo_table(result: DemoResult) -> Table:
    """One row per model; dynamics are those of the default merge, one number per molecule."""
    names = [name.removeprefix("rmd17-") for name in result.names]
    columns = (
        Column("model", words=True),
        *(Column(f"{name} force MAE", "meV/Å", ".1f") for name in names),
        Column("merge", "s", ".2f"),
        Column("NVE drift", "meV/atom"),
        Column("steps/s"),
    )
    rows = tuple(
        (
            model,
            *(1000 * errors[name] for name in result.names),
            _seconds(result, model),
            *(_dynamics(result) if model == DEFAULT else (None, None)),
        )
        for model, errors in result.comparison.force_mae.items()
    )
    title = f"Merge of {' and '.join(result.names)}"
    return Table(title=title, columns=columns, rows=rows, footnotes=(conditions(result),))


def _seconds(result: DemoResult, model: str) -> float | str | None:
    seconds = result.comparison.seconds.get(model)
    if model == DEFAULT and result.cache_hit:
        return f"{seconds:.2f} (cached)"
    return seconds


def _dynamics(result: DemoResult) -> tuple[str, str]:
    drifts = [1000 * run.drift_per_atom for run in result.runs["nve"].values()]
    return (
        " / ".join(f"{drift:+.3f}" for drift in drifts),
        " / ".join(f"{speed:.0f}" for speed in result.steps_per_second.values()),
    )


def conditions(result: DemoResult) -> str:
    """Say what was run, and whether a bond broke."""
    said = [
        f"{ensemble.upper()} {run.steps * run.timestep / 1000:g} ps at {TEMPERATURES[ensemble]:g} K"
        for ensemble, runs in result.runs.items()
        for run in [next(iter(runs.values()))]
    ]
    broken = [
        f"{name} ({ensemble})"
        for ensemble, runs in result.runs.items()
        for name, run in runs.items()
        if run.broken_bonds
    ]
    bonds = f"bonds broke in {', '.join(broken)}" if broken else "no bond broke"
    return f"{', '.join(said)}, step {TIMESTEP:g} fs, one calculator for all molecules; {bonds}."


def markdown(result: DemoResult) -> str:
    """Write table, conditions and the parity plot as a Markdown document."""
    table = demo_table(result)
    pictures = "![force errors](errors.png)\n\n![forces of the models and labels](parity.png)"
    return f"# {table.title}\n\n{table.to_markdown()}\n\n{pictures}\n"
