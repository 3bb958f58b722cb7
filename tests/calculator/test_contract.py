"""The calculator's contract with ASE, a test or more per point."""

import copy
import gc
import json
import logging
import os
import pickle
import threading
import weakref

import ase.outputs
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule
from ase.calculators.calculator import (
    CalculationFailed,
    Calculator,
    CalculatorSetupError,
    PropertyNotImplementedError,
)
from ase.calculators.fd import calculate_numerical_forces, calculate_numerical_stress
from ase.calculators.singlepoint import SinglePointCalculator
from toys import cluster, crystal, slab

from ase_gffmerge import GFFMergeCalculator
from ase_gffmerge.errors import GFFMergeError
from ase_gffmerge.graphs import batches


def everything(atoms, calc):
    atoms = atoms.copy()
    atoms.calc = calc
    atoms.get_potential_energy()
    return calc.results


# -- state and results --


def test_01_is_an_ase_calculator_with_keyword_only_json_able_parameters(calc):
    assert isinstance(calc, Calculator)
    assert json.loads(json.dumps(calc.parameters)) == dict(calc.parameters)
    with pytest.raises(TypeError, match="positional"):
        GFFMergeCalculator("rmd17-ethanol", "gffmerge")


def test_02_serves_what_it_says(calc, atoms):
    assert calc.implemented_properties == ["energy", "free_energy", "energies", "forces", "stress"]
    assert calc.implemented_properties is not GFFMergeCalculator.implemented_properties
    results = everything(atoms, calc)
    assert set(results) == set(calc.implemented_properties) - ({"stress"} if atoms.cell.rank < 3 else set())
    assert results["free_energy"] == results["energy"]
    assert atoms.cell.rank == 3 or "stress" not in results


def test_03_types_shapes_and_a_new_dict_each_time(calc):
    atoms = crystal()
    atoms.calc = calc
    atoms.get_forces()
    first = calc.results
    before = copy.deepcopy(first)
    atoms.positions[0, 0] += 0.1
    stress = atoms.get_stress()
    assert calc.results is not first
    assert all(np.array_equal(first[key], before[key]) for key in before)
    assert type(calc.results["energy"]) is float
    shapes = {"energies": (2,), "forces": (2, 3), "stress": (6,)}
    for name, shape in shapes.items():
        assert calc.results[name].shape == shape
        assert calc.results[name].dtype == np.float64
    stress[:] = 0
    assert calc.results["stress"].any(), "callers get copies"


def test_03_one_evaluation_answers_everything(calc, monkeypatch):
    count = []
    plain = calc.force_field.potential.forward
    monkeypatch.setattr(calc.force_field.potential, "forward", lambda graph: count.append(1) or plain(graph))
    atoms = crystal()
    atoms.calc = calc
    atoms.get_stress(), atoms.get_forces(), atoms.get_potential_energies(), atoms.get_potential_energy()
    atoms.get_potential_energy(force_consistent=True)
    assert len(count) == 1


def test_03_stress_is_positive_under_tension_and_in_voigt_order(painn_calc):
    atoms = crystal()
    atoms.calc = painn_calc
    stress, tensor = atoms.get_stress(), atoms.get_stress(voigt=False)
    assert np.allclose(stress, tensor[[0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1]], atol=1e-15)
    energies = []
    for eps in (-1e-4, 1e-4):
        strained = atoms.copy()
        strained.set_cell(atoms.cell @ np.diag([1 + eps, 1, 1]), scale_atoms=True)
        strained.calc = painn_calc
        energies.append(strained.get_potential_energy())
    assert stress[0] == pytest.approx((energies[1] - energies[0]) / 2e-4 / atoms.get_volume(), abs=1e-7)


def test_04_only_properties_that_ase_knows(calc, atoms):
    results = everything(atoms, calc)
    assert set(results) <= set(ase.outputs.all_outputs)
    assert calc.export_properties()["energy"] == results["energy"]
    assert SinglePointCalculator(atoms, **results).results.keys() == results.keys()
    assert calc.extras["n_edges"] > 0
    assert calc.extras["seconds"] > 0


def test_05_energies_sum_to_the_energy_and_forces_to_zero(force_field, atoms):
    for dtype in ("float32", "float64"):
        results = everything(atoms, GFFMergeCalculator(force_field, dtype=dtype, device="cpu"))
        assert results["energies"].sum() == results["energy"]
        assert np.abs(results["forces"].sum(axis=0)).max() < 1e-12


def test_05_no_stress_without_a_volume(calc, monkeypatch):
    atoms = cluster()
    atoms.calc = calc
    atoms.get_forces()
    monkeypatch.setattr(calc, "calculate", lambda *args: pytest.fail("evaluated for nothing"))
    with pytest.raises(PropertyNotImplementedError, match="no volume"):
        atoms.get_stress()


def test_06_flags_and_name(calc):
    assert calc.name == "gffmerge"
    assert calc.nolabel
    assert calc.discard_results_on_any_change
    assert calc.ignored_changes == {"initial_charges", "initial_magmoms"}
    atoms = crystal()
    atoms.calc = calc
    atoms.get_potential_energy()
    atoms.set_initial_charges([1.0, -1.0])
    atoms.info["note"] = "not read by the model"
    atoms.arrays["specialist"] = np.array(["copper", "aluminium"])
    assert calc.check_state(atoms) == []
    assert not calc.calculation_required(atoms, ["energy", "forces", "stress"])
    energy = atoms.get_potential_energy()
    calc.reset()
    assert atoms.get_potential_energy() == energy


def test_06_watches_the_specialist_choice_only_where_it_is_read(conditioned):
    calc = GFFMergeCalculator(conditioned, dtype="float64", device="cpu")
    atoms = cluster()
    atoms.info["specialist"] = "ethanol"
    atoms.calc = calc
    ethanol = atoms.get_potential_energy()
    atoms.info["specialist"] = "methanol"
    assert calc.check_state(atoms) == ["specialist"]
    assert atoms.get_potential_energy() != ethanol
    atoms.arrays["specialist"] = np.zeros(len(atoms), dtype=int)
    assert atoms.get_potential_energy() == ethanol


def test_07_unknown_elements_fail_when_attached(calc):
    atoms = molecule("SiH4")
    with pytest.raises(CalculatorSetupError, match=r"contains Si.*it knows H, C, O, Al, Cu"):
        atoms.calc = calc


def test_07_unknown_elements_fail_when_they_appear_later(calc):
    atoms = cluster()
    atoms.calc = calc
    atoms.get_potential_energy()
    atoms.numbers[0] = 14
    with pytest.raises(CalculatorSetupError, match="Si"):
        atoms.get_potential_energy()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_08_works_again_after_a_failure(calc, bad):
    atoms = crystal()
    atoms.calc = calc
    good, position = atoms.get_potential_energy(), atoms.positions[1, 2]
    atoms.positions[1, 2] = bad
    with pytest.raises(CalculationFailed, match=r"positions \[1\]"):
        atoms.get_forces()
    assert calc.results == {}
    with pytest.raises(CalculationFailed):
        atoms.get_potential_energy()
    atoms.positions[1, 2] = position
    assert atoms.get_potential_energy() == good


def test_08_results_that_are_not_finite_fail(calc):
    atoms = cluster()
    atoms.positions[1] = atoms.positions[0]
    atoms.calc = calc
    with pytest.raises(CalculationFailed, match=r"(energies|forces) of .* NaN or infinity at atom"):
        atoms.get_potential_energy()
    atoms.positions = cluster().positions
    assert np.isfinite(atoms.get_potential_energy())


def test_08_cell_that_is_not_finite_fails(calc):
    atoms = crystal()
    atoms.calc = calc
    atoms.cell[0, 0] = np.nan
    for method in (atoms.get_stress, atoms.get_potential_energy):
        with pytest.raises(CalculationFailed, match="cell"):
            method()


def test_08_structures_that_cannot_be_evaluated(calc):
    with pytest.raises(CalculatorSetupError, match="empty"):
        Atoms(calculator=calc).get_potential_energy()
    with pytest.raises(CalculatorSetupError, match="cell") as info:
        Atoms("H2", positions=[[0, 0, 0], [0, 0, 1]], pbc=True, calculator=calc).get_potential_energy()
    assert isinstance(info.value, GFFMergeError)
    with pytest.raises(PropertyNotImplementedError):
        Atoms("H", calculator=calc).get_dipole_moment()


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
    plain = batches.neighbour_list
    monkeypatch.setattr(batches, "neighbour_list", lambda *args: searches.append(1) or plain(*args))
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
        patch.setattr(painn_calc.force_field.potential, "forward", lambda graph: 1 / 0)
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


# -- copies and side effects --


def test_11_parameters_rebuild_the_calculator(force_field, tmp_path):
    path = force_field.save(tmp_path / "with space, ä.safetensors")
    first = GFFMergeCalculator(path, dtype="float64", device="cpu")
    second = GFFMergeCalculator(**json.loads(json.dumps(first.todict())))
    assert everything(crystal(), first)["energy"] == everything(crystal(), second)["energy"]


@pytest.mark.parametrize("as_objects", [True, False])
def test_11_parameters_rebuild_a_merged_calculator(relatives, as_objects, tmp_path):
    sources = relatives if as_objects else [s.save(tmp_path / f"{s.name}.safetensors") for s in relatives]
    first = GFFMergeCalculator(
        sources, recipe="mean", weights=[1, 3], dtype="float64", cache_dir=tmp_path / "c", device="cpu"
    )
    second = GFFMergeCalculator(**json.loads(json.dumps(first.todict())))
    assert second.specialist_names == ("ethanol", "methanol")
    assert everything(cluster(), first)["energy"] == everything(cluster(), second)["energy"]


def test_11_an_object_in_memory_cannot_be_rebuilt_and_says_so(painn_calc):
    with pytest.raises(CalculatorSetupError, match="object in memory"):
        GFFMergeCalculator(**painn_calc.todict())


def test_11_pickles(calc, atoms):
    reference = everything(atoms, calc)
    twin = pickle.loads(pickle.dumps(calc))
    assert twin.results.keys() == reference.keys()
    assert everything(atoms, twin)["energy"] == reference["energy"]
    assert twin.todict() == calc.todict()


def test_11_deepcopy_and_spawn_share_weights_but_not_results(calc):
    atoms = crystal()
    atoms.calc = calc
    energy = atoms.get_potential_energy()
    for twin in (copy.deepcopy(calc), copy.deepcopy(atoms).calc, calc.spawn()):
        assert twin is not calc
        assert twin.force_field.potential is calc.force_field.potential
        assert twin.results is not calc.results
        assert twin.parameters is not calc.parameters
        moved = crystal()
        moved.positions[0] += 0.1
        moved.calc = twin
        assert moved.get_potential_energy() != energy
        assert calc.results["energy"] == energy
    assert copy.deepcopy(calc).results["energy"] == energy
    assert calc.spawn().results == {}


@pytest.mark.parametrize("spawned", [True, False])
def test_11_threads(calc, spawned):
    images = [cluster() for _ in range(6)]
    for i, image in enumerate(images):
        image.rattle(0.05, seed=i)
    expected = [everything(image, calc)["forces"] for image in images]
    wrong = []

    def work(image, forces, own):
        for _ in range(5):
            image.calc = own
            if not np.array_equal(image.get_forces(), forces):
                wrong.append(image)

    threads = [
        threading.Thread(target=work, args=(image, forces, calc.spawn() if spawned else calc))
        for image, forces in zip(images, expected, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_11_a_dropped_calculator_is_freed_at_once(calc):
    own = calc.spawn()
    everything(cluster(), own)
    watched = weakref.ref(own)
    gc.disable()
    try:
        del own
        assert watched() is None, "a reference cycle keeps the weights in memory"
    finally:
        gc.enable()


def global_state():
    return (
        torch.get_default_dtype(),
        torch.random.get_rng_state().tolist(),
        np.random.get_state()[1].tolist(),  # noqa: NPY002 - the global state is what must not change
        torch.get_float32_matmul_precision(),
        torch.backends.cuda.matmul.allow_tf32,
        torch.is_grad_enabled(),
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        dict(os.environ),
        logging.getLogger().level,
        list(logging.getLogger().handlers),
    )


def test_12_no_global_state_is_touched(force_field, relatives, tmp_path):
    path = force_field.save(tmp_path / "one.safetensors")
    before = global_state()
    for source in (force_field, path, relatives):
        everything(
            cluster(), GFFMergeCalculator(source, recipe="mean", cache_dir=tmp_path / "c", device="cpu")
        )
    assert global_state() == before


def test_12_dtype_is_explicit_and_results_are_float64(force_field):
    atoms = crystal()
    single, double = (
        GFFMergeCalculator(force_field, dtype=d, device="cpu") for d in ("float32", torch.float64)
    )
    assert (single.parameters["dtype"], double.parameters["dtype"]) == ("float32", "float64")
    low, high = everything(atoms, single), everything(atoms, double)
    assert low["forces"].dtype == np.float64
    assert 0 < np.abs(low["forces"] - high["forces"]).max() < 1e-5
    assert force_field.potential.dtype == torch.float64, "the caller's object stays as it was"


def test_12_foreign_global_state_has_no_effect(calc):
    reference = everything(cluster(), calc)["forces"]
    with torch.inference_mode():
        calc.reset()
        assert np.array_equal(everything(cluster(), calc)["forces"], reference)
        other = GFFMergeCalculator(calc.force_field, dtype="float64", device="cpu")
        assert np.array_equal(everything(cluster(), other)["forces"], reference)
    with torch.no_grad():
        calc.reset()
        assert np.array_equal(everything(cluster(), calc)["forces"], reference)
    torch.set_default_dtype(torch.float64)
    try:
        calc.reset()
        assert np.array_equal(everything(cluster(), calc)["forces"], reference)
    finally:
        torch.set_default_dtype(torch.float32)


def test_13_bitwise_reproducible_and_no_graph_retained(calc, atoms):
    first = everything(atoms, calc)
    calc.reset()
    second = everything(atoms, calc)
    assert all(np.array_equal(first[name], second[name]) for name in first)
    assert not calc.force_field.potential.training
    assert all(p.grad is None and not p.requires_grad for p in calc.force_field.potential.parameters())


def test_13_memory_is_flat(calc):
    atoms = cluster()
    atoms.calc = calc
    counts = []
    for step in range(30):
        atoms.positions[0, 0] += 1e-3
        atoms.get_forces()
        if step in (9, 29):
            gc.collect()
            counts.append(len(gc.get_objects()))
    assert counts[1] - counts[0] < 20


def test_13_later_training_of_the_specialist_does_not_leak_in(force_field):
    calc = GFFMergeCalculator(force_field, dtype="float64", device="cpu")
    energy = everything(cluster(), calc)["energy"]
    force_field.potential.embedding.mul_(2)
    calc.reset()
    assert everything(cluster(), calc)["energy"] == energy


# -- physics --


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
