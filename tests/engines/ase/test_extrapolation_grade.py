"""The grade as the calculator serves it, and the observer that acts on it."""

import copy
import pickle
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms, units
from ase.calculators.calculator import CalculatorSetupError
from ase.calculators.mixing import SumCalculator
from ase.io import read
from ase.md import VelocityVerlet
from ase.md.velocitydistribution import thermalize_momenta

from ase_gffmerge import ExtrapolationMonitor, ForceField, GFFMergeCalculator, merge
from ase_gffmerge.errors import (
    ExtrapolationError,
    ExtrapolationWarning,
    GFFMergeError,
    MissingExtrapolationGradeError,
)
from ase_gffmerge.graphs import build_graph
from ase_gffmerge.inference.predict import grades
from helpers.structures import cluster, crystal


@pytest.fixture
def merged(relatives) -> ForceField:
    return merge(relatives, "mean", device="cpu")[0]


@pytest.fixture
def calc(merged) -> GFFMergeCalculator:
    return GFFMergeCalculator(merged, dtype="float64", device="cpu")


@pytest.fixture
def inside(merged, relatives) -> Atoms:
    return relatives[0].calibration[0].copy()


def test_grade_per_atom_after_every_calculation(calc, merged, inside) -> None:
    inside.calc = calc
    inside.get_potential_energy()
    found = calc.extras["extrapolation"]
    assert found.shape == (len(inside),)
    assert found.dtype == np.float64
    expected = grades(merged, build_graph(inside, merged.cutoff))
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    inside.positions[0, 0] += 2.0
    inside.get_forces()
    assert calc.extras["extrapolation"].max() > 2 * found.max()


def test_results_stay_what_ase_knows(calc, inside) -> None:
    """The grade is an extra; results are bitwise those of the same potential without one."""
    inside.calc = calc
    inside.get_potential_energy()
    assert set(calc.results) <= {"energy", "free_energy", "energies", "forces", "stress"}
    calc.export_properties()
    plain = GFFMergeCalculator(
        replace(calc.force_field, extrapolation_grade=None), dtype="float64", device="cpu"
    )
    plain.calculate(inside)
    assert "extrapolation" not in plain.extras
    assert calc.results["energy"] == plain.results["energy"]
    np.testing.assert_array_equal(calc.results["forces"], plain.results["forces"])


@pytest.mark.filterwarnings("ignore::ase_gffmerge.errors.ExtrapolationWarning")
def test_periodic_structures_and_single_precision(calc, merged) -> None:
    atoms = crystal()
    single = GFFMergeCalculator(merged, dtype="float32", device="cpu")
    for calculator in (calc, single):
        calculator.calculate(atoms)
    assert np.isinf(calc.extras["extrapolation"]).all()  # neither Cu nor Al was ever calibrated on
    molecule = cluster()
    for calculator in (calc, single):
        calculator.calculate(molecule)
    np.testing.assert_allclose(
        single.extras["extrapolation"], calc.extras["extrapolation"], rtol=2e-3, atol=1e-4
    )


def test_copies_carry_the_grade(calc, inside) -> None:
    calc.calculate(inside)
    for twin in (copy.deepcopy(calc), pickle.loads(pickle.dumps(calc))):
        np.testing.assert_array_equal(twin.extras["extrapolation"], calc.extras["extrapolation"])
    twin = calc.spawn()
    assert twin.extras == {}
    twin.calculate(inside)
    np.testing.assert_array_equal(twin.extras["extrapolation"], calc.extras["extrapolation"])


def test_disagreement_is_the_spread_of_the_specialists_forces(relatives, inside, tmp_path) -> None:
    calc = GFFMergeCalculator(relatives, recipe="mean", dtype="float64", device="cpu", cache_dir=tmp_path)
    forces = []
    for specialist in relatives:
        one = GFFMergeCalculator(specialist, dtype="float64", device="cpu")
        one.calculate(inside)
        forces.append(one.results["forces"])
    expected = np.sqrt(np.var(forces, axis=0).sum(axis=1))
    np.testing.assert_allclose(calc.disagreement(inside), expected, rtol=1e-10)
    np.testing.assert_allclose(pickle.loads(pickle.dumps(calc)).disagreement(inside), expected, rtol=1e-10)
    assert calc.results == {}
    alone = GFFMergeCalculator(relatives[0], dtype="float64", device="cpu")
    with pytest.raises(CalculatorSetupError, match="from the specialists"):
        alone.disagreement(inside)


def hot(calc: GFFMergeCalculator, atoms: Atoms) -> VelocityVerlet:
    atoms.calc = calc
    thermalize_momenta(atoms, temperature_K=300, rng=np.random.default_rng(0))
    return VelocityVerlet(atoms, 0.5 * units.fs)


def fly(atoms: Atoms) -> None:
    """Let one hydrogen leave the molecule."""
    momenta = np.zeros((len(atoms), 3))
    h = int(np.flatnonzero(atoms.numbers == 1)[0])
    momenta[h] = 1.0 * (atoms.positions[h] - atoms.get_center_of_mass())
    atoms.set_momenta(momenta)


def test_warn_once_in_a_while(calc, inside) -> None:
    dynamics = hot(calc, inside)
    fly(inside)
    monitor = ExtrapolationMonitor(inside, threshold=0.9, quiet=10)
    dynamics.attach(monitor, interval=2)
    with pytest.warns(
        ExtrapolationWarning, match=r"atom \d+ \(\w+\) of C2H6O has extrapolation grade"
    ) as caught:
        dynamics.run(60)
    assert monitor.n_calls == 31
    assert monitor.n_beyond > len(caught)
    assert 2 <= len(caught) <= 3
    assert monitor.largest >= monitor.grade > 0.9


def test_watching_costs_no_evaluation(calc, inside, monkeypatch) -> None:
    dynamics = hot(calc, inside)
    count = []
    calculate = calc.calculate
    monkeypatch.setattr(
        calc, "calculate", lambda *args, **kwargs: (count.append(1), calculate(*args, **kwargs))
    )
    dynamics.attach(ExtrapolationMonitor(inside, threshold=1e9))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dynamics.run(10)
    assert len(count) == 11


def test_stop_leaves_a_run_that_can_go_on(calc, inside) -> None:
    dynamics = hot(calc, inside)
    fly(inside)
    dynamics.attach(ExtrapolationMonitor(inside, action="stop", threshold=1.5))
    with pytest.raises(ExtrapolationError, match=r"above 1\.5") as stopped:
        dynamics.run(500)
    steps = dynamics.get_number_of_steps()
    assert 0 < steps < 500
    grade = calc.extras["extrapolation"]
    assert stopped.value.grade == grade.max()
    assert stopped.value.atom == grade.argmax()
    dynamics.observers.clear()
    dynamics.run(3)
    assert dynamics.get_number_of_steps() == steps + 3


def test_record_keeps_frames_to_be_labelled(calc, inside, tmp_path: Path) -> None:
    dynamics = hot(calc, inside)
    fly(inside)
    monitor = ExtrapolationMonitor(inside, action="record", threshold=1.2, file=tmp_path / "far.extxyz")
    dynamics.attach(monitor, interval=5)
    dynamics.run(60)
    frames = read(tmp_path / "far.extxyz", ":")
    assert len(frames) == monitor.n_beyond > 0
    for frame in frames:
        assert frame.calc is None
        assert frame.arrays["extrapolation"].max() == pytest.approx(frame.info["extrapolation_max"])
        assert frame.info["extrapolation_max"] > 1.2
    np.testing.assert_allclose(frames[-1].positions, inside.positions, atol=1e-7)


def test_monitor_of_a_combined_calculator(calc, inside) -> None:
    inside.calc = SumCalculator([calc, GFFMergeCalculator(calc.force_field, device="cpu")])
    with pytest.raises(MissingExtrapolationGradeError, match="calculator="):
        ExtrapolationMonitor(inside)
    monitor = ExtrapolationMonitor(inside, threshold=1e9, calculator=calc)
    monitor()
    inside.positions[0, 0] += 1.0
    before = monitor.grade
    monitor()
    assert monitor.grade > before > 0


def test_what_a_monitor_refuses(calc, painn_calc, inside, tmp_path: Path) -> None:
    inside.calc = painn_calc
    with pytest.raises(MissingExtrapolationGradeError, match="with_extrapolation_grade"):
        ExtrapolationMonitor(inside)
    inside.calc = calc
    for options, message in (
        ({"action": "shout"}, "unknown action"),
        ({"threshold": 0.0}, "threshold"),
        ({"action": "record"}, "file goes with"),
        ({"action": "stop", "file": tmp_path / "x.extxyz"}, "file goes with"),
        ({"action": "record", "file": tmp_path}, "is a folder"),
    ):
        with pytest.raises(GFFMergeError, match=message):
            ExtrapolationMonitor(inside, **options)


def test_specialist_with_grades_of_its_own(relatives, inside) -> None:
    calc = GFFMergeCalculator(relatives[0].with_extrapolation_grade(), device="cpu")
    calc.calculate(inside)
    assert calc.extras["extrapolation"].max() < 1
