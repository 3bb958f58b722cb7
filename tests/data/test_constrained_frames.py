"""Frames of a run with constraints: their labels are the forces of the theory, not what the constraint leaves of them."""

import numpy as np
import torch
from ase.build import molecule
from ase.calculators.emt import EMT
from ase.constraints import FixAtoms

from ase_gffmerge.data.readers import read_frames
from ase_gffmerge.dynamics.ase_md import run_md
from ase_gffmerge.dynamics.integrators import Conditions
from ase_gffmerge.inference.errors import labels
from ase_gffmerge.models import build_potential
from ase_gffmerge.training.loss import labelled_graph


def trained_on(atoms) -> np.ndarray:
    torch.manual_seed(0)
    potential = build_potential("painn", {"channels": 4, "n_blocks": 1}, (1, 6, 8)).double()
    return labelled_graph(atoms, potential, potential.references.numpy()).forces.numpy()


def test_fixed_atoms_keep_their_label() -> None:
    atoms = molecule("CH3OH")
    atoms.calc = EMT()
    free = atoms.get_forces()
    atoms.set_constraint(FixAtoms([0, 1]))
    assert not np.allclose(atoms.get_forces(), free)
    np.testing.assert_array_equal(labels([atoms]).forces[0], free)
    np.testing.assert_array_equal(trained_on(atoms), free)


def test_a_trajectory_of_our_own_dynamics_can_be_trained_on(tmp_path) -> None:
    """The thermostat holds the centre of mass, and ASE's trajectory remembers that."""
    atoms = molecule("CH3OH")
    atoms.calc = EMT()
    path = tmp_path / "run.traj"
    conditions = Conditions(ensemble="nvt", temperature=300, timestep=0.5)
    run_md(atoms, conditions, steps=10, interval=5, trajectory=path)
    for frame in read_frames(path):
        free = molecule("CH3OH")
        free.positions = frame.positions
        free.calc = EMT()
        np.testing.assert_allclose(labels([frame]).forces[0], free.get_forces(), atol=1e-10)
        np.testing.assert_allclose(trained_on(frame), free.get_forces(), atol=1e-10)
