"""The Hessian against finite differences of forces, its symmetry, and its zero modes."""

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule

from ase_gffmerge import GFFMergeCalculator
from ase_gffmerge.errors import ArgumentError
from ase_gffmerge.graphs import build_graph, predict
from ase_gffmerge.graphs.derivatives import hessian
from ase_gffmerge.models import Potential


def forces(potential: Potential, atoms: Atoms) -> np.ndarray:
    return predict(potential, build_graph(atoms, potential.hyper.cutoff)).forces.numpy()


def test_rows_are_differences_of_forces(potential: Potential, atoms: Atoms) -> None:
    atoms = atoms[:9] if not atoms.pbc.any() else atoms
    matrix = hessian(potential, build_graph(atoms, potential.hyper.cutoff))
    np.testing.assert_array_equal(matrix, matrix.T)
    step = 1e-4
    for i, axis in ((0, 0), (len(atoms) - 1, 2)):
        moved = [atoms.copy() for _ in range(2)]
        for structure, sign in zip(moved, (1, -1), strict=True):
            structure.positions[i, axis] += sign * step
        difference = (forces(potential, moved[1]) - forces(potential, moved[0])) / (2 * step)
        scale = np.abs(matrix).max()
        np.testing.assert_allclose(matrix[3 * i + axis], difference.ravel(), atol=1e-6 * scale)


def test_translations_cost_nothing(potential: Potential, atoms: Atoms) -> None:
    matrix = hessian(potential, build_graph(atoms, potential.hyper.cutoff))
    shift = np.tile(np.eye(3), (len(atoms), 1))
    np.testing.assert_allclose(matrix @ shift, 0, atol=1e-10 * np.abs(matrix).max() * len(atoms))


def test_progress_counts_rows_and_lone_atoms_have_no_curvature(potential: Potential) -> None:
    lone = hessian(potential, build_graph(Atoms("H"), potential.hyper.cutoff))
    np.testing.assert_array_equal(lone, np.zeros((3, 3)))
    said: list[float] = []
    pair = Atoms("CO", positions=[[0, 0, 0], [0, 0, 1.1]])
    hessian(
        potential,
        build_graph(pair, potential.hyper.cutoff),
        progress=lambda fraction, text: said.append(fraction),
    )
    assert said == pytest.approx([k / 6 for k in range(1, 7)])


def test_gradients_may_be_off_outside(potential: Potential) -> None:
    pair = Atoms("CO", positions=[[0, 0, 0], [0, 0, 1.1]])
    with torch.no_grad():
        assert np.abs(hessian(potential, build_graph(pair, potential.hyper.cutoff))).max() > 0


def test_atoms_are_chosen_as_numpy_does() -> None:
    calc, atoms = GFFMergeCalculator("rmd17-ethanol", device="cpu", dtype="float64"), molecule("CH4")
    first = calc.get_hessian(atoms, indices=[4])
    mask = np.arange(5) == 4
    for indices in ([-1], mask, np.array([4])):
        np.testing.assert_array_equal(calc.get_hessian(atoms, indices=indices), first)
    assert calc.get_hessian(atoms, indices=[]).shape == (0, 15)
    for indices in ([5], [True, False], [0.5]):
        with pytest.raises(ArgumentError, match="not those of 5 atoms"):
            calc.get_hessian(atoms, indices=indices)
