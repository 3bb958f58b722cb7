"""Your own specialists: train a base, fine-tune two specialists from it, merge them, calculate.

Everything is tiny here and labelled by ASE's EMT, so that it takes seconds; with real data only the frames, the
hyper-parameters and the epochs differ. Specialists must descend from one base: that is what makes them mergeable.
"""

import tempfile
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.build import molecule
from ase.calculators.emt import EMT
from ase.io import write

from ase_gffmerge import ForceField, GFFMergeCalculator
from ase_gffmerge.training.config import TrainConfig
from ase_gffmerge.training.train import train

HYPER = {"channels": 16, "n_blocks": 2, "n_radial": 8, "cutoff": 4.0}
RECIPE = {"preset": "closed-form", "readout": {"width": 256, "blocks": 2}}


def labelled_frames(name: str, n: int) -> list[Atoms]:
    """Rattled molecules with EMT energies and forces."""
    rng, frames = np.random.default_rng(len(name)), []
    for _ in range(n):
        atoms = molecule(name)
        atoms.rattle(0.08, rng=rng)
        atoms.calc = EMT()
        atoms.get_forces()
        frames.append(atoms)
    return frames


def trained(
    folder: Path, name: str, files: list[Path], config: TrainConfig, base: ForceField | None
) -> ForceField:
    """Train on extxyz files and leave a specialist file in ``folder``."""
    specialist, _, errors = train(
        files, folder / f"{name}.safetensors", config, init=base, n_calibration=30, test=files, device="cpu"
    )
    assert errors is not None
    print(f"{name}: force MAE {1000 * errors.force_mae:.0f} meV/Å")
    return specialist


def force_difference(frames: list[Atoms], calc: GFFMergeCalculator, other: GFFMergeCalculator) -> float:
    """Mean absolute difference of the forces of two calculators, eV/Å."""
    differences = []
    for atoms in (frame.copy() for frame in frames):
        forces = [one.get_property("forces", atoms) for one in (calc, other)]
        differences.append(np.abs(forces[0] - forces[1]).mean())
    return float(np.mean(differences))


def main() -> None:
    """Train, merge, and compare the merge with the mean of the weights."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for system in ("CH3OH", "H2CO", "H2O"):
            write(folder / f"{system}.xyz", labelled_frames(system, 40), format="extxyz")
        everything = [folder / f"{system}.xyz" for system in ("CH3OH", "H2CO", "H2O")]
        options = TrainConfig(validation=5, epochs=30, level_of_theory="EMT")
        base = trained(folder, "base", everything, options.model_copy(update={"hyper": HYPER}), None)
        for system in ("CH3OH", "H2CO"):
            trained(folder, system, [folder / f"{system}.xyz"], options, base)

        paths = [folder / "CH3OH.safetensors", folder / "H2CO.safetensors"]
        cache = folder / "cache"
        merged = GFFMergeCalculator(paths, recipe=RECIPE, dtype="float64", cache_dir=cache)
        mean = GFFMergeCalculator(paths, recipe="mean", dtype="float64", cache_dir=cache)
        for path in paths:
            frames, specialist = labelled_frames(path.stem, 5), GFFMergeCalculator(path, dtype="float64")
            ours, theirs = (force_difference(frames, calc, specialist) for calc in (merged, mean))
            print(
                f"{path.stem}: merged differs by {1000 * ours:.0f} meV/Å, the mean by {1000 * theirs:.0f} meV/Å"
            )
            assert ours < theirs


if __name__ == "__main__":
    main()
