"""Two MACE models fine-tuned from one: merged by the mean, the paper's preset and the default, on frames nobody saw.

    python md_examples/benchmarks/benchmark_mace.py --out FOLDER [--json]

Runs in the environment that ``vendor_environments.py mace`` builds. No weights of MACE can be downloaded here, so a small
one is trained first: on half of the frames of both bundled specialists (ethanol and malonaldehyde), labelled by these, and
then on all of one molecule's. Every model in FOLDER is made once and kept. Takes ten minutes on one core.
"""

import argparse
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write
from mace.modules import ScaleShiftMACE, interaction_classes

from ase_gffmerge import ForceField, merge
from ase_gffmerge.errors import MergeWarning
from ase_gffmerge.inference.errors import evaluate
from ase_gffmerge.inference.predict import predict_frames
from ase_gffmerge.integrations.load import from_vendor
from ase_gffmerge.models.layers import package_mode
from ase_gffmerge.training.config import TrainConfig
from ase_gffmerge.training.train import train

MOLECULES = ("rmd17-ethanol", "rmd17-malonaldehyde")
N_TEST, N_CALIBRATION = 20, 40
COMMON = {"batch_size": 5, "ema_decay": 0.99, "validation": 4}
BASE = TrainConfig(epochs=200, learning_rate=5e-3, **COMMON)
FINE_TUNING = TrainConfig(epochs=100, learning_rate=1e-3, **COMMON)
RECIPES: dict[str, Any] = {
    "mean": "mean",
    "paper": {"preset": "paper"},
    "closed form, plain readout": {"preset": "closed-form", "readout": None},
    "gffmerge": "gffmerge",
}


def labelled_frames(specialist: ForceField) -> list[Atoms]:
    """Its calibration frames with its own energies and forces."""
    frames = [atoms.copy() for atoms in specialist.calibration]
    found = predict_frames(specialist.potential, frames)
    for atoms, energy, forces in zip(frames, found.energies, found.forces, strict=True):
        atoms.calc = SinglePointCalculator(atoms, energy=float(energy), forces=forces)
    return frames


def untrained(like: ForceField) -> ForceField:
    """A small MACE in float32 with the reference energies of another force field."""
    from e3nn.o3 import Irreps  # after mace, without which torch refuses e3nn 0.4's file of constants

    block = interaction_classes["RealAgnosticResidualInteractionBlock"]
    with package_mode():
        torch.manual_seed(0)
        network = ScaleShiftMACE(
            r_max=4.0,
            num_bessel=8,
            num_polynomial_cutoff=5,
            max_ell=2,
            interaction_cls=block,
            interaction_cls_first=block,
            num_interactions=2,
            num_elements=len(like.species),
            hidden_irreps=Irreps("16x0e+16x1o"),
            MLP_irreps=Irreps("16x0e"),
            gate=torch.nn.functional.silu,
            atomic_energies=like.potential.references.numpy(),
            avg_num_neighbors=8.0,
            atomic_numbers=list(like.species),
            correlation=3,
            radial_MLP=[32, 32],
            atomic_inter_scale=1.0,
            atomic_inter_shift=0.0,
        )
    return from_vendor("mace", network).to(dtype=torch.float32)


def trained(out: Path, name: str, frames: list[Atoms], init: ForceField, config: TrainConfig) -> ForceField:
    """Train once; what is there is loaded."""
    path = out / f"{name}.safetensors"
    if not path.exists():
        write(out / f"{name}.xyz", frames, format="extxyz")
        train([out / f"{name}.xyz"], path, config, init=init)
    return ForceField.load(path)


def run(out: Path) -> dict[str, list[float]]:
    """Force MAE in meV/Å on the test frames of both molecules, per model."""
    bundled = [ForceField.load(name) for name in MOLECULES]
    frames = [labelled_frames(specialist) for specialist in bundled]
    seen, tests = [f[:-N_TEST] for f in frames], [f[-N_TEST:] for f in frames]
    mixed = [atoms for found in seen for atoms in found[::2]]
    base = trained(out, "base", mixed, untrained(bundled[0]), BASE)
    pair = [
        trained(out, name, found, base, FINE_TUNING).with_calibration(found[:N_CALIBRATION])
        for name, found in zip(MOLECULES, seen, strict=True)
    ]
    models = {"base": base, **dict(zip(MOLECULES, pair, strict=True))}
    for name, recipe in RECIPES.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", MergeWarning)
            models[name], _ = merge(pair, recipe, device="cpu")
    return {
        name: [1000 * evaluate(model.potential, test).force_mae for test in tests]
        for name, model in models.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    rows = run(arguments.out)
    if arguments.json:
        print(json.dumps(rows, indent=1))
        return
    print(f"{'force MAE, meV/Å':<26}" + "".join(f"{name:>22}" for name in MOLECULES))
    for name, errors in rows.items():
        print(f"{name:<26}" + "".join(f"{error:>22.1f}" for error in errors))


if __name__ == "__main__":
    main()
