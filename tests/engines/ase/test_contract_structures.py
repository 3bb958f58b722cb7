"""Points 9, 10, 14 and 15 of the contract: which structures work, neighbour lists, derivatives, symmetry."""

import copy

import numpy as np
import pytest
from ase import Atoms
from ase.calculators.calculator import CalculatorSetupError
from ase.calculators.fd import calculate_numerical_forces, calculate_numerical_stress

from ase_gffmerge import GFFMergeCalculator
from ase_gffmerge.graphs import graph as batches
from ase_gffmerge.inference import predict as serving
from helpers.structures import cluster, crystal, everything, slab


def test_09_never_changes_the_callers_atoms(calc, atoms):
    atoms.positions += 100.0
    atoms.info = {"note": 1}
    atoms.arrays["tag"] = np.arange(len(atoms))
    before = copy.deepcopy(atoms)
    atoms.calc = calc
    atoms.get_forces()
    assert np.array_equal(atoms.positions, before.positions)
    assert np.array_equal(atoms.cell.array, before.cell.array)
    assert atoms.info == before.info
    assert atoms.arrays.keys() == before.arrays.keys()


def test_09_unwrapped_rotated_left_handed_cells(calc):
    atoms = crystal()
    reference = everything(atoms, calc)
    unwrapped = atoms.copy()
    unwrapped.positions += np.array([[3, -2, 5], [-7, 0, 1]]) @ atoms.cell.array
    flipped = atoms.copy()
    flipped.set_cell(atoms.cell.array[[1, 0, 2]])
    assert np.linalg.det(flipped.cell.array) * np.linalg.det(atoms.cell.array) < 0
    for other in (unwrapped, flipped):
        results = everything(other, calc)
        for name in ("energies", "forces", "stress"):
            assert np.abs(results[name] - reference[name]).max() < 1e-11


def test_09_one_atom_isolated_atoms_and_mixed_boundaries(calc):
    single = everything(Atoms("H"), calc)
    assert single["forces"].tolist() == [[0, 0, 0]]
    pair = Atoms("H2", positions=[[0, 0, 0], [0, 0, 50.0]])
    assert everything(pair, calc)["energy"] == pytest.approx(2 * single["energy"], abs=1e-12)
    assert np.isfinite(everything(Atoms("Cu", cell=[2.5] * 3, pbc=True), calc)["stress"]).all()
    wire = Atoms("Cu", cell=[0, 0, 2.5], pbc=(False, False, True))
    results = everything(wire, calc)
    assert calc.extras["n_edges"] == 2
    assert "stress" not in results


def test_09_far_from_the_origin(force_field):
    for dtype, tolerance in (("float64", 1e-11), ("float32", 1e-6)):
        calc = GFFMergeCalculator(force_field, dtype=dtype, device="cpu")
        near, far = cluster(), cluster()
        far.positions += 2048.0
        far.positions -= far.positions[0] - near.positions[0] - 2048.0
        assert np.abs(everything(far, calc)["forces"] - everything(near, calc)["forces"]).max() < tolerance


@pytest.mark.parametrize("build", [crystal, slab, cluster])
def test_10_skin_and_history_leave_no_trace(force_field, build):
    """Atoms and cell walk; every step is compared, to the last bit, with a calculator that searches afresh."""
    rng = np.random.default_rng(0)
    fresh, lasting = (
        GFFMergeCalculator(force_field, dtype="float64", device="cpu", skin=skin) for skin in (0, 1.0)
    )
    atoms = build()
    for _ in range(12):
        atoms.rattle(0.04, rng=rng)
        atoms.set_cell(atoms.cell.array @ (np.eye(3) + 0.003 * rng.standard_normal((3, 3))), scale_atoms=True)
        expected, got = everything(atoms, fresh), everything(atoms, lasting)
        assert expected.keys() == got.keys()
        assert all(np.array_equal(expected[name], got[name]) for name in expected)


def test_10_a_search_lasts_for_many_steps(painn_calc, monkeypatch):
    searches = []
    plain = batches.find_neighbors
    monkeypatch.setattr(batches, "find_neighbors", lambda *args: searches.append(1) or plain(*args))
    atoms = crystal()
    for _ in range(20):
        atoms.positions[0, 0] += 0.01
        everything(atoms, painn_calc)
    assert len(searches) == 1
    twin = painn_calc.spawn()
    everything(atoms, twin)
    assert len(searches) == 2, "a spawned calculator has a list of its own"


@pytest.mark.parametrize(
    "edit",
    [
        lambda atoms: atoms.append("H"),
        lambda atoms: atoms.pop(),
        lambda atoms: atoms.numbers.__setitem__(0, 13),
        lambda atoms: atoms.pbc.__setitem__(2, False),
        lambda atoms: atoms.positions.__iadd__([[0.1, 0, 0], [0, 0.7, 0]]),
        lambda atoms: atoms.wrap(),
    ],
)
def test_10_edits_in_place_are_noticed(painn_calc, edit):
    atoms = crystal()
    atoms.positions[1] += 2 * atoms.cell[0] - atoms.cell[2]
    everything(atoms, painn_calc)
    edit(atoms)
    fresh = everything(atoms, GFFMergeCalculator(painn_calc.force_field, dtype="float64", device="cpu"))
    got = everything(atoms, painn_calc)
    assert got["energy"] == fresh["energy"]
    assert np.array_equal(got["forces"], fresh["forces"])


def test_10_neighbours_do_not_depend_on_what_ase_says_has_changed(painn_calc):
    """After an exception ``calc.atoms`` is already the new structure, and the next call reports no change."""
    atoms = crystal()
    everything(atoms, painn_calc)
    atoms.positions[0] += 1.5
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serving, "assemble", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            everything(atoms, painn_calc)
    assert painn_calc.check_state(atoms) == []
    fresh = everything(atoms, GFFMergeCalculator(painn_calc.force_field, dtype="float64", device="cpu"))
    assert everything(atoms, painn_calc)["energy"] == fresh["energy"]


def test_10_far_and_empty_space_cost_no_grid(painn_calc):
    near = everything(cluster(), painn_calc)["forces"]
    atoms = cluster()
    atoms.cell, atoms.pbc = [1e7, 1e7, 1e7], True
    atoms.positions += 2.0**14
    assert np.abs(everything(atoms, painn_calc)["forces"] - near).max() < 1e-9


def test_14_forces_are_the_gradient(calc, atoms):
    atoms.calc = calc
    analytical = atoms.get_forces()
    chosen = [0, len(atoms) - 1]
    numerical = calculate_numerical_forces(atoms, eps=1e-4, iatoms=chosen)
    assert np.abs(analytical).max() > 1e-3
    assert np.abs(numerical - analytical[chosen]).max() < 1e-7


@pytest.mark.parametrize("build", [crystal, slab])
def test_14_stress_is_the_strain_derivative(calc, build):
    atoms = build()
    if build is slab:
        atoms.center(vacuum=2.0, axis=2)
    atoms.calc = calc
    analytical = atoms.get_stress()
    assert np.abs(analytical).max() > 1e-5
    assert np.abs(calculate_numerical_stress(atoms, eps=1e-4) - analytical).max() < 1e-8


def test_15_translation_and_permutation(calc, atoms):
    reference = everything(atoms, calc)
    moved = atoms.copy()
    moved.positions += [0.3, -1.2, 4.5]
    order = np.random.default_rng(0).permutation(len(atoms))
    shuffled = everything(atoms[order], calc)
    assert np.abs(everything(moved, calc)["forces"] - reference["forces"]).max() < 1e-11
    assert np.abs(shuffled["forces"] - reference["forces"][order]).max() < 1e-11
    assert shuffled["energy"] == pytest.approx(reference["energy"], abs=1e-11)


def test_15_rotation(calc, atoms):
    reference = everything(atoms, calc)
    rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))[0]
    turned = atoms.copy()
    turned.set_cell(atoms.cell.array @ rotation)
    turned.positions = atoms.positions @ rotation
    results = everything(turned, calc)
    assert np.abs(results["forces"] - reference["forces"] @ rotation).max() < 1e-11
    assert results["energy"] == pytest.approx(reference["energy"], abs=1e-11)
    if "stress" in reference:
        turned.calc, atoms.calc = calc.spawn(), calc
        stress = atoms.get_stress(voigt=False)
        assert np.abs(turned.get_stress(voigt=False) - rotation.T @ stress @ rotation).max() < 1e-11


def test_15_supercell_and_lattice_shift(calc):
    atoms = crystal()
    reference = everything(atoms, calc)
    big = everything(atoms * (2, 1, 2), calc)
    assert big["energy"] == pytest.approx(4 * reference["energy"], abs=1e-10)
    assert np.abs(big["forces"] - np.tile(reference["forces"], (4, 1))).max() < 1e-11
    assert np.abs(big["stress"] - reference["stress"]).max() < 1e-12
    shifted = atoms.copy()
    shifted.positions[0] += atoms.cell[1]
    assert np.abs(everything(shifted, calc)["forces"] - reference["forces"]).max() < 1e-11


def test_15_continuous_at_the_cutoff(calc):
    cutoff = calc.force_field.cutoff
    results = []
    for r in (cutoff - 1e-5, cutoff + 1e-5):
        results.append(everything(Atoms("CO", positions=[[0, 0, 0], [r, 0, 0]]), calc))
    inside, outside = results
    assert abs(inside["energy"] - outside["energy"]) < 1e-12
    assert np.abs(inside["forces"]).max() < 1e-8
    assert np.abs(outside["forces"]).max() == 0


def test_09_collapsed_cells_are_named_at_once(painn_calc):
    """And the calculator goes on."""
    atoms = crystal()
    healthy = everything(atoms, painn_calc)["energy"]
    atoms.cell[2] = atoms.cell[0] + atoms.cell[1] + [0, 0, 1e-3]
    with pytest.raises(CalculatorSetupError, match="a cell that collapsed is the usual cause"):
        everything(atoms, painn_calc)
    assert everything(crystal(), painn_calc)["energy"] == healthy
