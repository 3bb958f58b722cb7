"""Merge two fine-tuned CHGNet models: fine-tune, hand the checkpoints over, merge, run dynamics, give a checkpoint back.

Needs ``pip install chgnet`` for the pretrained weights. Copper and silver labelled by EMT stand for two crystals with their
own DFT; the fine-tuning is far shorter than one would want, since only the way is shown.
"""

import tempfile
import warnings
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from ase import Atoms, units
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write
from ase.md import thermalize_momenta
from ase.md.verlet import VelocityVerlet

from ase_gffmerge import ForceField, GFFMergeCalculator
from ase_gffmerge.errors import MergeWarning, ReferenceWarning
from ase_gffmerge.integrations.load import export, from_vendor
from ase_gffmerge.training.config import TrainConfig
from ase_gffmerge.training.train import train

CRYSTALS = {"Cu": 3.6, "Ag": 4.1}
RECIPE = {"preset": "closed-form", "readout": {"width": 64, "copies": 1}, "directions": 1}


def labelled_frames(element: str, n: int, base: GFFMergeCalculator) -> list[Atoms]:
    """Rattled and strained crystals with EMT labels, whose energies are counted from where CHGNet has them."""
    rng, frames = np.random.default_rng(len(element)), []
    perfect = bulk(element, a=CRYSTALS[element], cubic=True)
    shift = (base.get_potential_energy(perfect) - EMT().get_potential_energy(perfect)) / len(perfect)
    for _ in range(n):
        atoms = perfect.copy()
        atoms.set_cell(atoms.cell @ (np.eye(3) + 0.02 * rng.standard_normal((3, 3))), scale_atoms=True)
        atoms.rattle(0.12, rng=rng)
        atoms.calc = EMT()
        energy = atoms.get_potential_energy() + shift * len(atoms)
        atoms.calc = SinglePointCalculator(
            atoms, energy=energy, forces=atoms.get_forces(), stress=atoms.get_stress()
        )
        frames.append(atoms)
    return frames


def fine_tuned(folder: Path, element: str, frames: list[Atoms], base: ForceField) -> Path:
    """A checkpoint as CHGNet's trainer writes it."""
    write(folder / f"{element}.xyz", frames, format="extxyz")
    config = TrainConfig(epochs=6, batch_size=5, learning_rate=1e-3, ema_decay=0.9, validation=2)
    specialist, _, _ = train(
        [folder / f"{element}.xyz"], folder / f"{element}.safetensors", config, init=base
    )
    return export(specialist, folder / f"{element}.pth.tar")


def difference(calc: GFFMergeCalculator, other: GFFMergeCalculator, frames: list[Atoms]) -> float:
    """Mean absolute difference of forces, eV/Å."""
    pairs = zip(calc.evaluate(frames), other.evaluate(frames), strict=True)
    return float(np.mean([np.abs(a["forces"] - b["forces"]).mean() for a, b in pairs]))


def main() -> None:
    """Fine-tune, merge, compare, run."""
    warnings.simplefilter("ignore", MergeWarning)
    warnings.simplefilter("ignore", ReferenceWarning)
    base = from_vendor("chgnet", "0.3.0")
    pretrained = GFFMergeCalculator(base, device="cpu")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        frames = {element: labelled_frames(element, 16, pretrained) for element in CRYSTALS}
        files = [f"chgnet:{fine_tuned(folder, element, frames[element][:12], base)}" for element in CRYSTALS]
        calibration = [frames[element][:4] for element in CRYSTALS]
        options = {"calibration": calibration, "cache_dir": folder / "cache", "device": "cpu"}
        merged = GFFMergeCalculator(files, recipe=RECIPE, **options)
        mean = GFFMergeCalculator(files, recipe="mean", **options)
        for element, file in zip(CRYSTALS, files, strict=True):
            own, new = GFFMergeCalculator(file, device="cpu"), frames[element][12:]
            ours, theirs = (difference(calc, own, new) for calc in (merged, mean))
            print(
                f"{element}: {1000 * ours:.0f} meV/Å from its specialist's forces, the mean {1000 * theirs:.0f}"
            )
            assert ours < theirs

        atoms = bulk("Cu", a=CRYSTALS["Cu"], cubic=True)
        atoms.calc = merged
        thermalize_momenta(atoms, 300, rng=np.random.default_rng(0))
        start = atoms.get_total_energy()
        VelocityVerlet(atoms, timestep=2 * units.fs).run(100)
        drift = abs(atoms.get_total_energy() - start) / len(atoms)
        print(f"energy of copper after 0.2 ps of dynamics: {1000 * drift:.2f} meV per atom off")
        assert drift < 1e-3

        checkpoint = export(mean.force_field, folder / "mean.pth.tar")
        again = GFFMergeCalculator(f"chgnet:{checkpoint}", device="cpu")
        assert abs(again.get_potential_energy(atoms) - mean.get_potential_energy(atoms)) < 1e-4
        print("a merge without the wide readout is a CHGNet checkpoint again")


if __name__ == "__main__":
    if find_spec("chgnet"):
        main()
    else:
        print("skipped: CHGNet's weights come with its package, pip install chgnet")
