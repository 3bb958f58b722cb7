"""Does the extrapolation grade rank errors? Rank correlation with the force error, inside and outside the calibration set.

    python md_examples/benchmarks/benchmark_extrapolation.py DATA_FOLDER [--json] [--plot FILE]

DATA_FOLDER holds the rMD17 files ``rmd17_<molecule>_test_01.npz``. Ethanol and malonaldehyde specialists are merged (or
their merge is found in the cache) and evaluated on three kinds of frames:

- inside: test frames of both molecules (DFT labels);
- hotter: both molecules in dynamics at 1000 and 1500 K until a bond breaks, and with atoms displaced by 0.05 and 0.1 Å. No
  DFT labels exist: the error is that against the specialist which knows the molecule;
- outside: test frames of toluene, salicylic acid, aspirin and uracil (DFT labels), which neither specialist was calibrated
  on.

The baseline is the specialists' disagreement. It takes about two minutes on one core, and 30 s more for the merge.
"""

import argparse
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms
from scipy.stats import spearmanr

from ase_gffmerge import ForceField, GFFMergeCalculator
from ase_gffmerge.cli.output import print_json
from ase_gffmerge.data.readers import read_frames
from ase_gffmerge.dynamics.batched_md import run_replicas
from ase_gffmerge.errors import MergeWarning
from ase_gffmerge.graphs import batch_graphs, build_graph
from ase_gffmerge.inference.errors import labels
from ase_gffmerge.inference.predict import force_disagreement, grades, predict_frames
from ase_gffmerge.runtime.devices import chunks

INSIDE = ("ethanol", "malonaldehyde")
OUTSIDE = ("toluene", "salicylic", "aspirin", "uracil")
TEMPERATURES = (1000, 1500)
DISPLACEMENTS = (0.05, 0.1)


@dataclass(frozen=True)
class Part:
    """Frames of one kind, with what is known about every atom.

    Attributes
    ----------
    kind
        ``inside``, ``hotter`` or ``outside``.
    sizes
        Atoms per frame.
    errors, grades, disagreements
        Per atom: size of the force error (eV/Å), extrapolation grade, spread of the specialists' forces (eV/Å).
    """

    kind: str
    sizes: np.ndarray
    errors: np.ndarray
    grades: np.ndarray
    disagreements: np.ndarray

    def per_frame(self, values: np.ndarray, how: Any) -> np.ndarray:
        """One number per frame."""
        return np.array([how(part) for part in np.split(values, np.cumsum(self.sizes)[:-1])])

    def frame_errors(self) -> np.ndarray:
        """Root mean square of the force error over the atoms of a frame."""
        return np.sqrt(self.per_frame(self.errors**2, np.mean))


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def measure(
    kind: str,
    frames: Sequence[Atoms],
    forces: Sequence[np.ndarray],
    force_field: ForceField,
    specialists: Sequence[ForceField],
) -> Part:
    """Compare a force field with the right forces (eV/Å) of the frames."""
    found = predict_frames(force_field.potential, frames).forces
    cutoff, dtype = force_field.cutoff, force_field.potential.dtype
    batches = [batch_graphs([build_graph(a, cutoff, dtype=dtype) for a in c]) for c in chunks(frames, 500)]
    graded = [grades(force_field, batch) for batch in batches]
    return Part(
        kind=kind,
        sizes=np.array([len(atoms) for atoms in frames]),
        errors=np.linalg.norm(np.concatenate(found) - np.concatenate(forces), axis=1),
        grades=torch.cat([grade for grade in graded if grade is not None]).double().numpy(),
        disagreements=np.concatenate([force_disagreement(specialists, atoms) for atoms in frames]),
    )


def hot_frames(specialist: ForceField, starts: Sequence[Atoms], temperature: float) -> list[Atoms]:
    """Frames of eight runs with the specialist (0.5 ps each, every 20 fs after the first 0.1 ps), as long as they hold."""
    runs = run_replicas(
        specialist.potential,
        starts[:8],
        ensemble="nvt",
        temperature=temperature,
        timestep=0.5,
        steps=1000,
        every=40,
        seed=int(temperature),
    )
    return [frame for run in runs for frame in run.frames[5:]]


def displaced_frames(frames: Sequence[Atoms], size: float) -> list[Atoms]:
    """Copies with normally distributed displacements of ``size`` Å."""
    copies = [atoms.copy() for atoms in frames]
    for seed, atoms in enumerate(copies):
        atoms.rattle(size, seed=seed)
    return copies


def hotter(specialist: ForceField, test: Sequence[Atoms]) -> dict[str, list[Atoms]]:
    """Frames of a molecule away from where its specialist was calibrated, by name."""
    bare = [atoms.copy() for atoms in test]
    frames = {f"{t} K": hot_frames(specialist, bare, t) for t in TEMPERATURES}
    return frames | {f"displaced {size} Å": displaced_frames(bare[:60], size) for size in DISPLACEMENTS}


def parts_of(data: Path, force_field: ForceField, specialists: Sequence[ForceField]) -> dict[str, Part]:
    """Every kind of frames, measured."""
    parts: dict[str, Part] = {}

    def add(name: str, kind: str, frames: Sequence[Atoms], forces: Sequence[np.ndarray]) -> None:
        parts[name] = measure(kind, frames, forces, force_field, specialists)
        say(f"{name:32s} {len(frames):4d} frames, force error {median_error(parts[name]):6.3f} eV/Å")

    for molecule in (*INSIDE, *OUTSIDE):
        frames = read_frames(data / f"rmd17_{molecule}_test_01.npz")
        frames = frames[:: len(frames) // (200 if molecule in INSIDE else 100)]
        kind = "inside" if molecule in INSIDE else "outside"
        add(molecule, kind, frames, labels(frames).forces)
        if molecule in INSIDE:
            specialist = specialists[INSIDE.index(molecule)]
            for name, hot in hotter(specialist, frames).items():
                right = predict_frames(specialist.potential, hot).forces
                add(f"{molecule}, {name}", "hotter", hot, right)
    return parts


def median_error(part: Part) -> float:
    """Median size of an atom's force error, eV/Å (overlapping atoms would dominate the mean)."""
    return float(np.median(part.errors))


def correlations(parts: Sequence[Part], what: str) -> dict[str, float]:
    """Spearman's rank correlation of ``grades`` or ``disagreements`` with the error: per atom, and per frame."""
    errors = np.concatenate([part.frame_errors() for part in parts])
    columns = {
        "atom": (np.concatenate([getattr(p, what) for p in parts]), np.concatenate([p.errors for p in parts]))
    }
    for name, how in (("frame_mean", np.mean), ("frame_max", np.max)):
        columns[name] = (np.concatenate([p.per_frame(getattr(p, what), how) for p in parts]), errors)
    return {name: float(spearmanr(*pair).statistic) for name, pair in columns.items()}


def summary(parts: dict[str, Part]) -> dict[str, Any]:
    """Correlations per kind and over everything, and how far out each kind of frames is."""
    kinds = {kind: [p for p in parts.values() if p.kind == kind] for kind in ("inside", "hotter", "outside")}
    kinds |= {"inside + outside": kinds["inside"] + kinds["outside"], "everything": list(parts.values())}
    worst = {name: part.per_frame(part.grades, np.max) for name, part in parts.items()}
    return {
        "spearman": {
            kind: {what: correlations(group, what) for what in ("grades", "disagreements")}
            for kind, group in kinds.items()
            if group
        },
        "frames": {
            name: {
                "n_frames": len(part.sizes),
                "median_force_error": median_error(part),
                "median_of_largest_grade": float(np.median(worst[name])),
                "share_beyond_1": float((worst[name] > 1).mean()),
                "share_beyond_2": float((worst[name] > 2).mean()),
            }
            for name, part in parts.items()
        },
    }


def plot(parts: dict[str, Part], path: Path) -> None:
    """Force error of every frame over its mean grade; what is further out than nearly all stands at the edge."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    x = {name: part.per_frame(part.grades, np.mean) for name, part in parts.items()}
    y = {name: part.frame_errors() for name, part in parts.items()}
    x_edge, y_edge = (1.3 * _nearly_all(np.concatenate(list(values.values()))) for values in (x, y))
    figure, axes = plt.subplots(figsize=(6, 4.5), layout="constrained")
    for colour, kind in zip(("C0", "C1", "C3"), ("inside", "hotter", "outside")):
        for i, name in enumerate(name for name, part in parts.items() if part.kind == kind):
            points = np.minimum(x[name], x_edge), np.minimum(y[name], y_edge)
            axes.loglog(*points, ".", color=colour, ms=4, alpha=0.6, label=None if i else kind)
    axes.axvline(1, color="0.6", lw=1, zorder=0)
    axes.set_xticks([0.2, 0.5, 1, 2, 4], labels=["0.2", "0.5", "1", "2", "4"])
    axes.set_xticks([], minor=True)
    axes.set(xlabel="mean extrapolation grade of the frame", ylabel="RMS force error of the frame (eV/Å)")
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _nearly_all(values: np.ndarray) -> float:
    return float(np.quantile(values[np.isfinite(values)], 0.99))


def show(result: dict[str, Any]) -> None:
    """Print the two tables."""
    print(f"{'Spearman correlation with the force error':44s}{'grade':^24s}{'disagreement':^24s}")
    print(f"{'':44s}" + 2 * f"{'atom':>8s}{'mean':>8s}{'max':>8s}")
    for kind, row in result["spearman"].items():
        values = [x for what in ("grades", "disagreements") for x in row[what].values()]
        print(f"{kind:44s}" + "".join(f"{x:8.2f}" for x in values))
    print(f"\n{'frames':30s}{'error eV/Å':>12s}{'grade':>8s}{'> 1':>8s}{'> 2':>8s}")
    for name, row in result["frames"].items():
        print(
            f"{name:30s}{row['median_force_error']:12.3f}{row['median_of_largest_grade']:8.2f}"
            f"{row['share_beyond_1']:8.0%}{row['share_beyond_2']:8.0%}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", MergeWarning)
    specialists = [ForceField.load(f"rmd17-{molecule}") for molecule in INSIDE]
    force_field = GFFMergeCalculator([s.name for s in specialists], device="cpu").force_field
    parts = parts_of(arguments.data, force_field, specialists)
    result = summary(parts)
    if arguments.plot:
        plot(parts, arguments.plot)
    if arguments.json:
        print_json(result)
    else:
        show(result)


if __name__ == "__main__":
    main()
