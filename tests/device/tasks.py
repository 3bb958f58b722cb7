"""What is meant to run on any device, carried out on the CPU and on a second one; prints the differences as JSON."""

import json
import sys
import tempfile
import warnings
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.build import molecule
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write

from ase_gffmerge import GFFMergeCalculator
from ase_gffmerge.dynamics.batched_md import run_replicas
from ase_gffmerge.errors import MergeWarning
from ase_gffmerge.forcefield.force_field import ForceField
from ase_gffmerge.forcefield.provenance import Provenance
from ase_gffmerge.inference.compiled import CompiledPotential
from ase_gffmerge.inference.cuda_graphs import VISITS, CudaGraphs
from ase_gffmerge.merging import blockwise
from ase_gffmerge.merging import tangents as duals
from ase_gffmerge.merging.recipe import DistillOptions
from ase_gffmerge.models import build_potential
from ase_gffmerge.training.config import TrainConfig
from ase_gffmerge.training.distill import distill
from ase_gffmerge.training.train import train
from ase_gffmerge.workflows.merge import merge
from helpers.rerun import Rerun
from helpers.second_device import numbers, second_device, slopes_by_differences

HYPER = {
    "painn": {"channels": 6, "n_blocks": 2, "n_radial": 5, "cutoff": 4.0},
    "nequip": {"channels": 4, "n_blocks": 2, "n_radial": 5, "cutoff": 4.0, "l_max": 1, "radial_hidden": 6},
}
READOUT = {"width": 8, "groups": 2, "inputs": 6, "blocks": 2, "copies": 1, "directions": 2}
DEFAULT = {"preset": "closed-form", "readout": READOUT, "directions": 1}
RECIPES: dict[str, dict[str, Any]] = {
    "painn": {"paper": "paper", "default": {**DEFAULT, "conditioning": "per-specialist"}},
    "nequip": {"default": {**DEFAULT, "select": False}},
}


def rattled(name: str, n: int) -> tuple[Atoms, ...]:
    frames = []
    for seed in range(n):
        atoms = molecule(name)
        atoms.rattle(0.08, seed=seed)
        atoms.center(vacuum=2.0)
        frames.append(atoms)
    return tuple(frames)


def specialists(architecture: str) -> list[ForceField]:
    torch.manual_seed(0)
    potential = (
        build_potential(architecture, HYPER[architecture], (1, 6, 8)).double().eval().requires_grad_(False)
    )
    base = ForceField(name="base", potential=potential, level_of_theory="toy")
    family = []
    for seed, name in enumerate(("CH3OH", "CH3CHO")):
        own = deepcopy(potential)
        for parameter in own.parameters():
            parameter += 0.05 * parameter.abs().mean() * torch.randn(parameter.shape, dtype=torch.float64)
        family.append(
            ForceField(
                name=f"s{seed}",
                potential=own,
                level_of_theory="toy",
                calibration=rattled(name, 2),
                provenance=Provenance(lineage=(base.fingerprint,)),
            )
        )
    return family


def served(force_field: ForceField, device: str) -> list[Any]:
    """Results of structures one by one and in batches, with grades."""
    structures = [*rattled("CH3OH", 2), *rattled("CH3CHO", 1)]
    choice = 1 if force_field.potential.hyper.n_embeddings > 1 else None
    calc = GFFMergeCalculator(force_field, device=device, dtype="float64", compile=False, specialist=choice)
    found: list[Any] = []
    for atoms in structures:
        atoms.calc = calc
        found.append([atoms.get_forces(), atoms.get_stress(), atoms.get_potential_energies()])
        found.append(calc.extras.get("extrapolation", 0.0))
        atoms.set_cell(1.02 * atoms.cell.array, scale_atoms=True)
        found.append(atoms.get_forces())
    found.append([list(results.values()) for results in calc.evaluate(structures)])
    return found


def recorded(force_field: ForceField, device: str) -> list[Any]:
    """Results as on a GPU, where structures are filled up with ghosts."""
    calc = GFFMergeCalculator(force_field, device=device, dtype="float64", compile="auto")
    found: list[Any] = []
    for seed, name in enumerate(("CH3OH", "CH3CHO") * (VISITS + 1)):
        atoms = rattled(name, 1)[0]
        atoms.rattle(0.02, seed=seed)
        atoms.calc = calc
        found.append([atoms.get_forces(), atoms.get_stress(), atoms.get_potential_energies()])
    return found


def dynamics(force_field: ForceField, device: str) -> list[Any]:
    """Trajectories of replicas, one of which stops."""
    potential = deepcopy(force_field.potential).to(device)
    starts = [*rattled("CH3OH", 2), *rattled("CH3CHO", 1)]
    starts[1].positions[0] += 3.0  # a broken bond, compared to the references
    runs = run_replicas(
        potential,
        starts,
        ensemble="nvt",
        temperature=300.0,
        timestep=0.5,
        steps=4,
        every=2,
        references=[*rattled("CH3OH", 2), *rattled("CH3CHO", 1)],
    )
    assert [run.stopped is not None for run in runs] == [False, True, False]
    return [[frame.positions for frame in run.frames] for run in runs]


def trained(device: str) -> list[Any]:
    """Weights after two epochs on made-up labels."""
    with tempfile.TemporaryDirectory() as folder:
        frames = []
        for seed, atoms in enumerate(rattled("CH3OH", 6)):
            forces = np.random.default_rng(seed).normal(size=(len(atoms), 3))
            atoms.calc = SinglePointCalculator(atoms, energy=0.1 * seed, forces=forces)
            frames.append(atoms)
        source = Path(folder) / "frames.xyz"
        write(source, frames)
        config = TrainConfig(model="painn", hyper=HYPER["painn"], epochs=2, batch_size=4, validation=2)
        specialist, _, _ = train([source], Path(folder) / "out.safetensors", config, device=device)
        return list(specialist.potential.state_dict().values())


def results(device: str) -> dict[str, torch.Tensor]:
    """Numbers of every task."""
    found: dict[str, Any] = {}
    for architecture, recipes in RECIPES.items():
        family = specialists(architecture)
        for name, recipe in recipes.items():
            merged, _ = merge(family, recipe, device=device)
            found[f"{architecture} merged by {name}"] = served(merged, device)
    family = specialists("painn")
    found["recorded"] = recorded(family[0], device)
    found["dynamics"] = dynamics(family[0], device)
    student, _ = distill(
        merge(family, "mean", device=device)[0], family, DistillOptions(epochs=1, copies=1), device=device
    )
    found["distilled"] = served(student, device)
    found["training"] = trained(device)
    return {name: numbers(value) for name, value in found.items()}


def main() -> None:
    warnings.simplefilter("ignore", MergeWarning)
    CompiledPotential._on_gpu, CudaGraphs.__call__ = True, Rerun()  # type: ignore[method-assign,assignment]
    duals.differentiable_pushforward = blockwise.differentiable_pushforward = slopes_by_differences
    expected = results("cpu")
    with second_device() as device:
        found = results(device)
    differences = {
        name: float((found[name] - value).abs().max() / value.abs().max()) for name, value in expected.items()
    }
    json.dump(differences, sys.stdout)


if __name__ == "__main__":
    main()
