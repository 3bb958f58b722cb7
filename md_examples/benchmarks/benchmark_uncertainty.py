"""Do the standard deviations of a merge foretell its errors? Against the specialists and against DFT labels.

    python md_examples/benchmarks/benchmark_uncertainty.py DATA_FOLDER [--model FILE] [--json] [--plot FILE]

DATA_FOLDER holds the rMD17 files ``rmd17_<molecule>_test_01.npz``. The bundled pair is merged (or its merge is found in the
cache, or given), and errors are held against standard deviations on

- test frames of both molecules, against the specialist that owns the molecule (what calibrated the deviations, on other
  frames) and against DFT labels; there also with deviations that 20 labelled frames of each molecule calibrate instead,
- dynamics of the specialists at 1000 and 1500 K and atoms displaced by 0.1 Å, against the specialist,
- test frames of toluene and aspirin, which nobody was calibrated on, against DFT labels,
- pairs of both molecules 2.5 Å apart, for which nothing is right: there are only deviations.

The baseline of the rank correlation is the disagreement of the two specialists. Energies of other molecules are off by a
constant that no deviation knows of. It takes about three minutes on one core, and a merge.
"""

import argparse
import sys
import time
import warnings
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from benchmark_extrapolation import displaced_frames, hot_frames

from ase_gffmerge import ForceField, GFFMergeCalculator
from ase_gffmerge.cli.output import print_json
from ase_gffmerge.data.readers import read_frames
from ase_gffmerge.errors import ExtrapolationWarning, MergeWarning
from ase_gffmerge.evaluation.plots import plot_reliability
from ase_gffmerge.inference.errors import difference, labels
from ase_gffmerge.inference.predict import FramePredictions, force_disagreement, predict_frames
from ase_gffmerge.inference.reliability import Deviations, Reliability, predict_deviations

INSIDE = ("ethanol", "malonaldehyde")
OUTSIDE = ("toluene", "aspirin")
TEMPERATURES = (1000, 1500)
LABELLED = 20
"""Frames of each molecule that calibrate deviations on labels."""


@dataclass(frozen=True)
class Row:
    """Errors of some frames, deviations, and the specialists' disagreement per atom (eV/Å)."""

    error: FramePredictions
    deviations: Deviations
    disagreement: np.ndarray

    def __add__(self, other: "Row") -> "Row":
        """Frames of both."""
        return Row(
            FramePredictions(
                numbers=[*self.error.numbers, *other.error.numbers],
                energies=np.concatenate([self.error.energies, other.error.energies]),
                forces=[*self.error.forces, *other.error.forces],
                stresses=[*self.error.stresses, *other.error.stresses],
            ),
            Deviations(
                np.concatenate([self.deviations.energies, other.deviations.energies]),
                [*self.deviations.forces, *other.deviations.forces],
            ),
            np.concatenate([self.disagreement, other.disagreement]),
        )

    def forces(self) -> Reliability:
        """Of the forces."""
        return Reliability.of(np.concatenate(self.error.forces), np.concatenate(list(self.deviations.forces)))

    def energies(self) -> Reliability:
        """Of the energies."""
        return Reliability.of(self.error.energies, self.deviations.energies)

    def summary(self) -> dict[str, Any]:
        """Everything that is printed."""
        atoms = np.linalg.norm(np.concatenate(self.error.forces), axis=1)
        spread = np.linalg.norm(np.concatenate(list(self.deviations.forces)), axis=1)
        return {
            "n_frames": len(self.error.energies),
            "median_force_error": float(np.median(atoms)),
            "median_force_std": float(np.median(spread)),
            "median_disagreement": float(np.median(self.disagreement)),
            "rank_correlation_of_disagreement": Reliability.of(atoms, self.disagreement).rank_correlation,
            "forces": self.forces().to_dict(),
            "energies": self.energies().to_dict(),
        }


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def row(
    field: ForceField, specialists: Sequence[ForceField], frames: Sequence[Atoms], right: FramePredictions
) -> Row:
    """Compare a force field with what is right for frames."""
    error = difference(predict_frames(field.potential, frames), right)
    apart = np.concatenate([force_disagreement(specialists, atoms) for atoms in frames])
    return Row(error, predict_deviations(field, frames), apart)


def rows_of(data: Path, field: ForceField, specialists: Sequence[ForceField], n: int) -> dict[str, Row]:
    """Rows by name; those of both molecules together."""
    found: dict[str, Row] = {}

    def add(name: str, new: Row) -> None:
        found[name] = found[name] + new if name in found else new

    test = {molecule: read_frames(data / f"rmd17_{molecule}_test_01.npz") for molecule in (*INSIDE, *OUTSIDE)}
    labelled = [atoms for m in INSIDE for atoms in test[m][:: len(test[m]) // LABELLED][:LABELLED]]
    relabelled = field.with_uncertainty(labelled)
    for molecule, specialist in zip(INSIDE, specialists, strict=True):
        frames = test[molecule][1 :: len(test[molecule]) // n]
        bare = [atoms.copy() for atoms in frames]
        kinds = {"test frames": bare}
        kinds |= {f"{t} K": hot_frames(specialist, bare, t)[::2] for t in TEMPERATURES}
        kinds["displaced 0.1 Å"] = displaced_frames(bare[:60], 0.1)
        for kind, some in kinds.items():
            right = predict_frames(specialist.potential, some)
            add(f"{kind}, specialist", row(field, specialists, some, right))
        own = row(field, specialists, frames, labels(frames))
        add("test frames, labels", own)
        add(
            "test frames, labels (calibrated on labels)",
            replace(own, deviations=predict_deviations(relabelled, bare)),
        )
        say(f"{molecule} done")
    for molecule in OUTSIDE:
        frames = test[molecule][:: len(test[molecule]) // max(n // 4, 1)]
        add("other molecules, labels", row(field, specialists, frames, labels(frames)))
    return found


def pairs(field: ForceField, specialists: Sequence[ForceField], frames: Sequence[Sequence[Atoms]]) -> Any:
    """Deviations and disagreement of both molecules side by side, their nearest atoms about 2.5 Å apart."""
    both = []
    for one, other in zip(*frames, strict=False):
        first, second = one.copy(), other.copy()
        second.positions += first.positions[:, 0].max() - second.positions[:, 0].min() + 2.5, 0, 0
        both.append(first + second)
    spread = np.linalg.norm(np.concatenate(list(predict_deviations(field, both).forces)), axis=1)
    apart = np.concatenate([force_disagreement(specialists, atoms) for atoms in both])
    return {"median_force_std": float(np.median(spread)), "median_disagreement": float(np.median(apart))}


def cost(field: ForceField, atoms: Atoms, repeats: int = 40) -> dict[str, float]:
    """Milliseconds of processor time per evaluation: without grade, with it, with deviations of energy and of forces."""
    grade = deepcopy(field.extrapolation_grade)
    assert grade is not None
    grade.deviations = None
    calculators = {
        "no_grade": GFFMergeCalculator(replace(field, extrapolation_grade=None), device="cpu"),
        "grade": GFFMergeCalculator(replace(field, extrapolation_grade=grade), device="cpu"),
        "energy_std": GFFMergeCalculator(field, device="cpu"),
        "forces_std": GFFMergeCalculator(field, device="cpu", forces_std=True),
    }
    least = dict.fromkeys(calculators, np.inf)
    for _ in range(repeats):
        for name, calc in calculators.items():
            atoms.rattle(1e-3, seed=1)
            start = time.process_time()
            calc.calculate(atoms)
            least[name] = min(least[name], time.process_time() - start)
    return {name: 1000 * seconds for name, seconds in least.items()}


def show(result: dict[str, Any]) -> None:
    """Print a table."""
    print(
        f"{'':46s}{'error':>8s}{'std':>8s}{'ratio':>8s}{'rank':>6s}{'(dis.)':>8s}{'calib.':>8s}{'| E rank':>9s}{'ratio':>8s}"
    )
    for name, found in result["rows"].items():
        forces, energies = found["forces"], found["energies"]
        print(
            f"{name:46s}{1000 * found['median_force_error']:8.1f}{1000 * found['median_force_std']:8.1f}"
            f"{forces['ratio']:8.2f}{forces['rank_correlation']:6.2f}{found['rank_correlation_of_disagreement']:8.2f}"
            f"{forces['calibration_error']:8.3f}{energies['rank_correlation']:9.2f}{energies['ratio']:8.2f}"
        )
    print({key: value for key, value in result.items() if key != "rows"})


def draw(rows: dict[str, Row], path: Path) -> None:
    """Reliability diagrams of forces against specialists and labels, and of energies."""
    against = {
        word: {
            name.removesuffix(f", {word}"): one for name, one in rows.items() if word in name.split(", ")[1]
        }
        for word in ("specialist", "labels")
    }
    short = {"test frames, labels (calibrated on labels)": "test frames, calibrated on labels"}
    panels = {
        f"forces against the {word}s" if word == "specialist" else "forces against DFT": {
            short.get(name, name): one.forces() for name, one in found.items()
        }
        for word, found in against.items()
    }
    inside = {name: one for name, one in rows.items() if name.startswith("test frames")}
    panels["energies of test frames"] = {
        short.get(name, name).replace("test frames, ", ""): one.energies() for name, one in inside.items()
    }
    plot_reliability(panels, path)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", help="a merged file; default: the bundled pair by --recipe")
    parser.add_argument("--recipe", default="gffmerge")
    parser.add_argument("--frames", type=int, default=150, help="test frames of each molecule")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore", MergeWarning)
    warnings.simplefilter("ignore", ExtrapolationWarning)
    specialists = [ForceField.load(f"rmd17-{molecule}") for molecule in INSIDE]
    sources = [options.model] if options.model else [s.name for s in specialists]
    field = GFFMergeCalculator(sources, recipe=options.recipe, device="cpu").force_field
    rows = rows_of(options.data, field, specialists, options.frames)
    test = [read_frames(options.data / f"rmd17_{molecule}_test_01.npz")[:20] for molecule in INSIDE]
    several = test[0][0].copy()
    for k in range(1, 16):
        other = Atoms(test[0][k].numbers, positions=test[0][k].positions)
        other.translate((4.5 * (k % 4), 4.5 * (k // 4), 0))
        several += other
    result = {
        "factors": field.require_uncertainty().deviations.tolist(),
        "rows": {name: one.summary() for name, one in rows.items()},
        "pairs": pairs(field, specialists, test),
        "milliseconds": {f"{len(atoms)} atoms": cost(field, atoms) for atoms in (test[0][0].copy(), several)},
    }
    if options.plot:
        draw(rows, options.plot)
    if options.json:
        print_json(result)
    else:
        show(result)


if __name__ == "__main__":
    main()
