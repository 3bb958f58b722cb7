"""Second derivatives, D3 dispersion and the warning of what lies beyond, through the calculator."""

import warnings

import numpy as np
import pytest
from ase import Atoms
from ase.build import molecule
from ase.calculators.calculator import PropertyNotImplementedError

from ase_gffmerge import GFFMergeCalculator, merge
from ase_gffmerge.engines.ase.dispersion import Dispersion
from ase_gffmerge.errors import ArgumentError, ExtrapolationWarning
from helpers.structures import rattled_slab
from helpers.toys import rattled, relative


def difference(calc: GFFMergeCalculator, atoms: Atoms, i: int, axis: int, step: float = 1e-4) -> np.ndarray:
    forces = []
    for sign in (1, -1):
        moved = atoms.copy()
        moved.positions[i, axis] += sign * step
        moved.calc = calc
        forces.append(moved.get_forces())
    return (forces[1] - forces[0]).ravel() / (2 * step)


def test_the_hessian_is_the_derivative_of_the_forces(force_field) -> None:
    calc = GFFMergeCalculator(force_field, dtype="float64", device="cpu")
    atoms = molecule("CH3OH")
    matrix = calc.get_hessian(atoms)
    assert matrix.shape == (18, 18)
    np.testing.assert_allclose(matrix[4], difference(calc, atoms, 1, 1), atol=1e-6 * np.abs(matrix).max())
    rows = calc.get_hessian(atoms, indices=[4, 1])
    expected = matrix.reshape(6, 3, 18)[[4, 1]].reshape(6, 18)
    np.testing.assert_allclose(rows, expected, atol=1e-10 * np.abs(matrix).max())


def test_dispersion_is_in_everything_that_is_served(painn_calc) -> None:
    pytest.importorskip("dftd3")
    slab = rattled_slab()
    plain = painn_calc.evaluate([slab])[0]
    calc = GFFMergeCalculator(painn_calc.force_field, dtype="float64", device="cpu", dispersion="d3bj:pbe")
    slab.calc = calc
    extra = Dispersion.parse("d3bj:pbe").results(slab)
    assert slab.get_potential_energy() == pytest.approx(plain["energy"] + extra["energy"])
    assert slab.get_potential_energy(force_consistent=True) == slab.get_potential_energy()
    np.testing.assert_allclose(slab.get_forces(), plain["forces"] + extra["forces"])
    np.testing.assert_allclose(slab.get_stress(), plain["stress"] + extra["stress"])
    with pytest.raises(PropertyNotImplementedError):
        slab.get_potential_energies()
    batched = calc.evaluate([slab])[0]
    assert "energies" not in batched
    assert batched["energy"] == pytest.approx(slab.get_potential_energy())
    assert calc.todict()["dispersion"] == "d3bj:pbe"
    atoms = molecule("CH3OH")
    matrix = calc.get_hessian(atoms)
    np.testing.assert_allclose(matrix[4], difference(calc, atoms, 1, 1), atol=1e-5 * np.abs(matrix).max())
    rows = calc.get_hessian(atoms, indices=[1])
    np.testing.assert_allclose(rows, matrix[3:6], atol=1e-10 * np.abs(matrix).max())


def test_dispersion_that_is_in_the_labels_is_not_added_again(force_field) -> None:
    from dataclasses import replace

    trained_with_it = replace(force_field, level_of_theory="PBE-D3(BJ)/def2-TZVP")
    with pytest.raises(ArgumentError, match=r"PBE-D3\(BJ\)/def2-TZVP, which contains dispersion already"):
        GFFMergeCalculator(trained_with_it, dispersion="d3bj:pbe")


def test_what_lies_beyond_is_said_once_of_every_kind(force_field) -> None:
    if force_field.potential.architecture != "painn":
        pytest.skip("the warning reads grades, whatever made them")
    pair = [
        relative(force_field, "ethanol", rattled("CH3CH2OH", 6), seed=1),
        relative(force_field, "methanol", rattled("CH3OH", 6), seed=2),
    ]
    calc = GFFMergeCalculator(merge(pair, "mean", device="cpu")[0], device="cpu")
    known, strange = pair[0].calibration[0].copy(), molecule("CH3OH")
    strange.numbers[strange.numbers == 8] = 13
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        calc.get_potential_energy(known)
    with pytest.warns(ExtrapolationWarning, match="the elements Al"):
        calc.get_potential_energy(strange)
    strange.rattle(0.01)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        calc.get_potential_energy(strange)
