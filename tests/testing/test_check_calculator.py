"""Every check passes for a calculator that keeps the contract, and fails for one that breaks its line."""

import json

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.calculators.fd import FiniteDifferenceCalculator
from ase.calculators.lj import LennardJones
from ase.calculators.mixing import SumCalculator

from ase_gffmerge.testing import CheckReport, ContractError, check_calculator
from ase_gffmerge.testing.calculator import harness
from ase_gffmerge.testing.calculator.checks import CHECKS
from ase_gffmerge.testing.calculator.harness import derivative
from helpers import pairs
from helpers.pairs import Pairs

BROKEN = [
    ("Stranger", "is_an_ase_calculator"),
    ("Labelled", "has_a_name_and_no_label"),
    ("StressAnyway", "no_stress_without_a_volume"),
    ("AnswersAnything", "unknown_properties_are_refused"),
    ("TakesNothing", "an_empty_structure_is_refused"),
    ("Anchored", "unwrapped_positions"),
    ("Anchored", "translation"),
    ("FirstAtomCounts", "permutation"),
    ("Offset", "supercell"),
    ("SignedVolume", "left_handed_cells"),
    ("NeedsNeighbours", "one_atom_and_no_neighbours"),
    ("AllOrNothing", "any_boundary_conditions"),
    ("Forgets", "todict_rebuilds_it"),
    ("SpawnsItself", "spawns"),
    ("Training", "networks_are_frozen"),
    ("ForcesOff", "dynamics_conserves_energy"),
    ("ForcesOff", "energy_error_is_of_second_order"),
    ("ForcesOff", "finite_difference_calculator"),
    ("Explosive", "constant_pressure_runs"),
    ("Renamed", "files_keep_the_results"),
    ("SpawnRaises", "sums_and_logs"),
    ("OnlyInMainThread", "socket_client"),
    ("HoldsObject", "parameters_can_be_written"),
    ("Undeclared", "serves_what_it_says"),
    ("Greedy", "serves_what_it_says"),
    ("NoFreeEnergy", "free_energy_is_the_energy"),
    ("FreeEnergyOff", "free_energy_is_the_energy"),
    ("SingleForces", "types_and_shapes"),
    ("SharedBuffers", "results_are_new"),
    ("StressInGPa", "stress_has_unit_and_sign"),
    ("StressInGPa", "stress_is_the_strain_derivative"),
    ("StressFlipped", "stress_has_unit_and_sign"),
    ("StressOrder", "stress_is_the_strain_derivative"),
    ("ExtraResult", "results_are_known_to_ase"),
    ("EnergiesOff", "energies_sum_to_the_energy"),
    ("NetForce", "forces_sum_to_zero"),
    ("ReadsInfo", "watches_what_it_reads"),
    ("ReadsArray", "watches_what_it_reads"),
    ("NeverCaches", "same_structure_is_not_computed_again"),
    ("Sloppy", "same_structure_is_not_computed_again"),
    ("IgnoresElements", "unknown_elements_fail_when_attached"),
    ("LateElements", "unknown_elements_fail_when_attached"),
    ("PassesNaN", "positions_that_are_not_finite_fail"),
    ("NeverRecovers", "works_again_after_a_failure"),
    ("Scribbles", "never_changes_the_callers_atoms"),
    ("Wraps", "never_changes_the_callers_atoms"),
    ("SlowFarAway", "far_from_the_origin"),
    ("SlowInVacuum", "huge_vacuum"),
    ("OldNeighbours", "the_past_leaves_no_trace"),
    ("OldNeighbours", "edits_in_place_are_noticed"),
    ("HoldsLambda", "pickles"),
    ("CopiesNothing", "deep_copies"),
    ("SharedByAll", "works_in_threads"),
    ("DefaultDtype", "leaves_global_state_alone"),
    ("ResetsRandom", "leaves_global_state_alone"),
    ("ResetsPythonsRandom", "leaves_global_state_alone"),
    ("Noise", "same_input_gives_the_same_bits"),
    ("Leaks", "memory_is_flat"),
    ("ForcesOff", "forces_are_the_gradient"),
    ("NotInvariant", "rotation"),
    ("Abrupt", "continuous_at_the_cutoff"),
    ("OnlyWhatIsAsked", "evaluations_of_dynamics"),
    ("OnlyWhatIsAsked", "evaluations_of_relaxation"),
    ("OnlyWhatIsAsked", "evaluations_with_a_moving_cell"),
    ("OnlyWhatIsAsked", "evaluations_of_a_band"),
]


def crystal() -> Atoms:
    atoms = bulk("Cu", cubic=True)
    atoms.numbers[0] = 13
    atoms.set_cell(atoms.cell.array @ [[1, 0.02, 0], [0, 0.98, 0], [0.03, 0, 1.01]], scale_atoms=True)
    atoms.rattle(0.05, seed=1)
    return atoms


def outcome(report: CheckReport, name: str):
    return next(result for result in report.results if result.name == name)


@pytest.fixture
def restored():
    """Put back what the worst calculators leave behind."""
    state = np.random.get_state()  # noqa: NPY002
    yield
    torch.set_default_dtype(torch.float32)
    np.random.set_state(state)  # noqa: NPY002


@pytest.mark.parametrize("build", [crystal, lambda: Atoms("CuAlCu", [[0, 0, 0], [2.4, 0, 0], [1, 2.2, 0.3]])])
def test_a_calculator_that_keeps_the_contract_passes(build):
    report = check_calculator(Pairs(), build())
    report.raise_if_failed()
    assert report.passed
    skipped = {result.name for result in report.of("skipped")}
    needs_a_volume = {
        "stress_has_unit_and_sign",
        "stress_is_the_strain_derivative",
        "constant_pressure_runs",
        "evaluations_with_a_moving_cell",
        "finite_difference_calculator",
    }
    assert skipped == {"networks_are_frozen"} | (needs_a_volume if build().cell.rank < 3 else set())


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize(("broken", "name"), BROKEN)
def test_each_broken_line_is_caught_by_its_check(broken, name):
    point = next(function.point for function in CHECKS if function.__name__ == name)
    report = check_calculator(getattr(pairs, broken)(), crystal(), points=[point], steps=20, drift_tol=1e-6)
    assert outcome(report, name).outcome == "failed", outcome(report, name).detail
    assert not report.passed
    with pytest.raises(ContractError, match=name):
        report.raise_if_failed()


def test_every_check_can_fail():
    assert {name for _, name in BROKEN} == {function.__name__ for function in CHECKS}


def test_findings_are_measured():
    report = check_calculator(pairs.StressInGPa(), crystal(), points=[3, 14])
    assert "160.2" in outcome(report, "stress_has_unit_and_sign").detail
    assert "GPa" in outcome(report, "stress_has_unit_and_sign").detail
    report = check_calculator(pairs.ReadsInfo(), crystal(), points=[6])
    assert "info['charge'] changes the energy by 1 eV" in outcome(report, "watches_what_it_reads").detail
    report = check_calculator(pairs.Wraps(), crystal(), points=[9])
    assert "wrapped" in outcome(report, "never_changes_the_callers_atoms").detail


def test_what_is_read_and_watched_is_fine():
    report = check_calculator(pairs.NoticesInfo(), crystal(), points=[6])
    assert report.passed
    assert "info['charge']" in outcome(report, "watches_what_it_reads").detail


def test_one_check_that_raises_does_not_stop_the_rest():
    report = check_calculator(pairs.SpawnRaises(), crystal(), points=[11])
    assert outcome(report, "spawns").detail == "raised RuntimeError: no more calculators"
    assert {result.name for result in report.failed} == {"spawns", "works_in_threads"}


def test_no_calculator_is_ever_in_two_threads():
    report = check_calculator(pairs.OneThreadAtATime(), crystal(), points=[11])
    assert outcome(report, "works_in_threads").outcome == "passed", str(report)


def test_report():
    report = check_calculator(Pairs(), crystal(), points=[5, 2])
    document = json.loads(json.dumps(report.to_dict()))
    assert document["passed"] is True
    assert [result["point"] for result in document["results"]] == [2, 2, 5, 5, 5]
    lines = str(report).splitlines()
    assert lines[0] == "Pairs on AlCu3: 5 passed, 0 failed, 0 skipped"
    assert all(len(line) <= 110 for line in lines)
    empty = CheckReport("nothing", ())
    assert not empty.passed
    with pytest.raises(ContractError, match="0 passed"):
        empty.raise_if_failed()


@pytest.mark.parametrize(
    ("name", "point", "slightly_off"),
    [
        ("forces_are_the_gradient", 14, pairs.ForcesSlightlyOff),
        ("stress_is_the_strain_derivative", 14, pairs.StressSlightlyOff),
        ("finite_difference_calculator", 18, pairs.ForcesSlightlyOff),
    ],
)
def test_central_differences_are_trusted_as_far_as_they_agree(monkeypatch, name, point, slightly_off):
    """Right forces pass although differences err by more than the tolerance; a ten-thousandth too much fails."""

    def found(calc):
        return outcome(check_calculator(calc, crystal(), points=[point], displacement=1e-2), name)

    right, wrong = found(pairs.Stiff()), found(slightly_off())
    assert right.outcome == "passed", right.detail
    assert wrong.outcome == "failed"
    assert "for the differences" in wrong.detail
    monkeypatch.setattr(harness, "RELATIVE", 0.0)
    assert found(pairs.Stiff()).outcome == "failed"


def test_error_of_central_differences():
    def central(function, step):
        return np.array([(function(1 + step) - function(1 - step)) / (2 * step)])

    slope, error = derivative(lambda step: central(np.exp, step), 1e-2)
    assert 0 < abs(slope[0] - np.e) < error < 1e-6
    slope, error = derivative(lambda step: central(lambda x: 1e6 * (x > 1.003), step), 1e-3)
    assert error <= 1e-5 * abs(slope[0]), "a step is no excuse"


@pytest.mark.parametrize(
    ("build", "failed"),
    [
        (lambda: SumCalculator([Pairs(), Pairs()]), {"results_are_known_to_ase", "todict_rebuilds_it"}),
        (lambda: FiniteDifferenceCalculator(Pairs()), {"no_stress_without_a_volume", "todict_rebuilds_it"}),
    ],
    ids=["sum", "differences"],
)
def test_wrappers_that_are_no_calculator_of_ases_are_checked(build, failed):
    """They have no ``reset()``, and one of them declares properties that what is wrapped lacks."""
    report = check_calculator(build(), crystal()[:2], points=[1, 2, 4, 5, 8, 11])
    assert failed | {"is_an_ase_calculator", "serves_what_it_says"} <= {
        result.name for result in report.failed
    }
    assert {"energies_sum_to_the_energy", "forces_sum_to_zero"} - {r.name for r in report.of("skipped")} <= {
        result.name for result in report.of("passed")
    }
    assert not any("has no attribute" in result.detail for result in report.failed), str(report)


@pytest.mark.parametrize("nothing", [None, "emt", EMT], ids=str)
def test_what_is_no_calculator_is_reported(nothing):
    report = check_calculator(nothing, crystal())
    assert [result.name for result in report.failed] == ["is_an_ase_calculator"]
    assert len(report.results) == 1
    with pytest.raises(ContractError, match="is no calculator"):
        report.raise_if_failed()


@pytest.mark.parametrize("periodic", [True, False])
def test_structures_that_checks_make_keep_what_the_calculator_needs(periodic):
    atoms = crystal()
    if not periodic:
        atoms.cell, atoms.pbc = None, False
    atoms.info["choice"] = "bulk"
    atoms.set_array("heads", np.arange(1, len(atoms) + 1))
    check_calculator(pairs.NeedsChoice(), atoms, points=[5, 6, 7, 8, 9, 10, 15, 18]).raise_if_failed()


def test_impossible_requests():
    with pytest.raises(ValueError, match=r"no point \[19\]"):
        check_calculator(Pairs(), crystal(), points=[1, 19])
    with pytest.raises(ValueError, match="empty"):
        check_calculator(Pairs(), Atoms())


def test_properties_can_be_restricted():
    report = check_calculator(Pairs(), crystal(), properties=["energy", "forces"], points=[3, 14])
    assert report.passed
    assert outcome(report, "stress_is_the_strain_derivative").outcome == "skipped"


def test_the_callers_structure_stays():
    atoms = crystal()
    before = atoms.copy()
    check_calculator(Pairs(), atoms, points=[9])
    assert atoms == before
    assert atoms.calc is None


def test_ase_s_own_calculators_break_the_lines_they_are_known_to_break():
    emt = check_calculator(EMT(), bulk("Cu", cubic=True), points=range(1, 12))
    known = {
        "results_are_new",
        "unknown_elements_fail_when_attached",
        "positions_that_are_not_finite_fail",
        "an_empty_structure_is_refused",
        "pickles",
    }
    assert {result.name for result in emt.failed} == known, str(emt)
    lennard_jones = LennardJones(sigma=2.3, epsilon=0.4, rc=6.0)
    lj = check_calculator(lennard_jones, bulk("Cu", cubic=True), points=[14, 15])
    assert {result.name for result in lj.failed} == {"continuous_at_the_cutoff"}
    smooth = LennardJones(sigma=2.3, epsilon=0.4, rc=6.0, smooth=True)
    assert check_calculator(smooth, bulk("Cu", cubic=True), points=[14, 15]).passed
