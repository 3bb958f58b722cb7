"""The calculator's contract with ASE, a test or more per point, named after it.

======  ==========================================  ===============================================
points  about                                       tests
======  ==========================================  ===============================================
1-8     state, results, failures                    here
9, 10   structures, neighbour lists                 ``test_contract_structures.py``
11-13   copies, side effects, reproducibility       ``test_contract_copies.py``
14, 15  derivatives, symmetry                       ``test_contract_structures.py``
16-18   dynamics, evaluations per step, files       ``test_drivers.py``
19      ASE's own tests                             ``../ase_suite/test_ase_suite.py``
20      entry point                                 ``test_plugin.py``
21      the checks are public                       here, and ``../testing``
======  ==========================================  ===============================================
"""

import copy
import json
import re
from pathlib import Path

import ase.outputs
import numpy as np
import pytest
from ase import Atoms
from ase.build import molecule
from ase.calculators.calculator import (
    CalculationFailed,
    Calculator,
    CalculatorSetupError,
    PropertyNotImplementedError,
)
from ase.calculators.singlepoint import SinglePointCalculator

from ase_gffmerge import GFFMergeCalculator
from ase_gffmerge.errors import GFFMergeError
from ase_gffmerge.graphs.derivatives import assemble
from ase_gffmerge.inference import predict as serving
from ase_gffmerge.testing import check_calculator
from helpers.structures import cluster, crystal, everything


def test_every_point_has_a_test_named_after_it():
    here = Path(__file__).parent
    files = [*here.glob("test_*.py"), *(here.parents[1] / "ase_suite").glob("test_*.py")]
    named = {
        int(n) for file in files for n in re.findall(r"^def test_(\d\d)_", file.read_text(), re.MULTILINE)
    }
    assert named == set(range(1, 22))


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
    monkeypatch.setattr(serving, "assemble", lambda *arguments: count.append(1) or assemble(*arguments))
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


def test_06_sees_a_choice_that_is_changed_in_place(conditioned):
    calc = GFFMergeCalculator(conditioned, dtype="float64", device="cpu")
    atoms = cluster()
    atoms.info["specialist"] = [0] * len(atoms)
    atoms.calc = calc
    first = atoms.get_potential_energy()
    atoms.info["specialist"][0] = 1
    assert atoms.get_potential_energy() != first
    calc.set(specialist=np.int64(1))
    assert type(calc.todict()["specialist"]) is int


@pytest.mark.parametrize("number", [-1, 119, 200])
def test_07_atomic_numbers_that_do_not_exist(calc, number):
    atoms = crystal()
    atoms.numbers[0] = number
    with pytest.raises(CalculatorSetupError, match="do not exist"):
        atoms.calc = calc


def test_08_a_volume_that_is_no_number_has_no_stress(calc):
    atoms = cluster()
    atoms.set_cell([1e-200] * 3)
    atoms.calc = calc
    assert np.isfinite(atoms.get_forces()).all()
    with pytest.raises(PropertyNotImplementedError, match="no volume"):
        atoms.get_stress()


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


# -- the public checks --


@pytest.mark.slow_for("nequip")
def test_21_the_public_checks_pass(force_field, relatives, tmp_path):
    """All of points 1 to 18 that can be seen from outside; that each check can fail is tested in ``../testing``.

    A merge that is found in the cache has more to check: an extrapolation grade.
    """
    path = force_field.save(tmp_path / "toy.safetensors")
    report = check_calculator(GFFMergeCalculator(path, dtype="float64", device="cpu"), crystal(), steps=50)
    report.raise_if_failed()
    assert {result.point for result in report.of("passed")} == set(range(1, 19))
    assert {result.name for result in report.of("skipped")} <= {"energy_error_is_of_second_order"}
    options = {"dtype": "float64", "device": "cpu", "cache_dir": tmp_path / "cache"}
    options["recipe"] = {"preset": "mean", "core_repulsion": "none"}  # toys fall into it
    assert not GFFMergeCalculator(relatives, **options).cache_hit
    merged = GFFMergeCalculator(relatives, **options)
    assert merged.cache_hit
    assert merged.force_field.extrapolation_grade is not None
    check_calculator(merged, relatives[0].calibration[0], steps=50).raise_if_failed()
