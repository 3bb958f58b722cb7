"""Many structures at once: the results of one after the other, whatever the batches are."""

import copy
import threading

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.calculators.calculator import (
    CalculationFailed,
    CalculatorSetupError,
    PropertyNotImplementedError,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import ase_gffmerge.inference.predict as evaluation
from ase_gffmerge import GFFMergeCalculator
from ase_gffmerge.errors import DeviceMemoryError, GFFMergeError
from ase_gffmerge.inference.predict import predict_frames
from ase_gffmerge.models import painn as painn_served
from ase_gffmerge.models.painn import BlockedSums, InferenceMessage
from helpers.structures import STRUCTURES, cluster, crystal, everything, slab
from helpers.toys import CONTRACT, random_force_field

MIXED = [
    crystal(),
    cluster(),
    Atoms("H"),
    slab(),
    crystal() * (2, 1, 1),
    Atoms("Cu", cell=[9, 9, 9], pbc=True),
]
TOY = GFFMergeCalculator(random_force_field("painn"), dtype="float64", device="cpu")


def assert_same(found: dict, expected: dict, *, atol: float = 1e-11) -> None:
    assert list(found) == list(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-11, atol=atol)
        assert type(found[name]) is type(value)


@pytest.mark.parametrize("max_edges", [None, 1, 150])
def test_as_one_after_the_other(calc, max_edges):
    found = calc.evaluate(MIXED, max_edges=max_edges)
    for atoms, results in zip(MIXED, found, strict=True):
        assert_same(results, everything(atoms, calc))
        assert results["energy"] == results["energies"].sum() == results["free_energy"]
        assert results["forces"].dtype == np.float64
        assert ("stress" in results) == (atoms.cell.rank == 3)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(0, len(MIXED) - 1), max_size=6), st.integers(1, 400))
def test_in_their_order(order, max_edges):
    energies = [results["energy"] for results in TOY.evaluate(MIXED)]
    found = TOY.evaluate((MIXED[k] for k in order), "energy", max_edges=max_edges)
    np.testing.assert_allclose(
        [results["energy"] for results in found], [energies[k] for k in order], rtol=1e-12
    )


def test_single_precision_agrees(force_field):
    calc = GFFMergeCalculator(force_field, device="cpu")
    for atoms, results in zip(MIXED, calc.evaluate(MIXED), strict=True):
        assert_same(results, everything(atoms, calc), atol=1e-5)


def test_what_is_asked_for(calc):
    (results,) = calc.evaluate([cluster()], ("forces", "energy"))
    assert list(results) == ["forces", "energy"]
    assert calc.evaluate([]) == []
    with pytest.raises(
        PropertyNotImplementedError, match=r"'dipole' is not served; there are energy, .*stress"
    ):
        calc.evaluate([], ["dipole"])
    with pytest.raises(PropertyNotImplementedError, match=r"structure 1: CH4O has no volume"):
        calc.evaluate([crystal(), cluster()], ["stress"])


def test_nothing_else_is_changed(calc):
    atoms = crystal()
    atoms.calc = calc
    atoms.get_potential_energy()
    before, extras, state = copy.deepcopy(calc.results), copy.deepcopy(calc.extras), calc.atoms
    structures = [cluster(), slab()]
    for structure in structures:
        structure.positions += 1000.0
        structure.arrays["specialist"] = np.zeros(len(structure), dtype=int)
    untouched = [structure.copy() for structure in structures]
    calc.evaluate(structures)
    assert calc.atoms is state
    assert calc.extras == extras
    assert_same(calc.results, before, atol=0)
    assert [a == b for a, b in zip(structures, untouched, strict=True)] == [True, True]
    assert all(structure.calc is None for structure in structures)


def test_specialists_of_atoms(conditioned):
    calc = GFFMergeCalculator(conditioned, dtype="float64", device="cpu", specialist=0)
    silent, second, each = cluster(), cluster(), cluster()
    second.info["specialist"] = "methanol"
    each.arrays["specialist"] = np.array([0, 1, 0, 1, 0, 1])
    found = calc.evaluate([silent, second, each])
    assert len({results["energy"] for results in found}) == 3
    for atoms, results in zip((silent, second, each), found, strict=True):
        assert_same(results, everything(atoms, calc))
    second.info["specialist"] = "water"
    with pytest.raises(CalculatorSetupError, match=r"structure 1: .* no specialist called 'water'"):
        calc.evaluate([silent, second])


@pytest.mark.filterwarnings("ignore::ase_gffmerge.errors.ExtrapolationWarning")
def test_grades_on_request(conditioned):
    calc = GFFMergeCalculator(conditioned, dtype="float64", device="cpu", specialist=0)
    assert "extrapolation" not in calc.evaluate([cluster()])[0]
    for atoms, results in zip(MIXED, calc.evaluate(MIXED, ["energy", "extrapolation"]), strict=True):
        everything(atoms, calc)
        np.testing.assert_allclose(results["extrapolation"], calc.extras["extrapolation"], rtol=1e-6)
    with pytest.raises(PropertyNotImplementedError, match="'extrapolation' is not served"):
        TOY.evaluate(MIXED, ["extrapolation"])


def test_the_network_of_single_structures_evaluates(monkeypatch):
    """Messages in blocks, here and there, and not the plain ones."""
    blocks, plain = [], BlockedSums.apply
    monkeypatch.setattr(painn_served, "BLOCK", 80)
    monkeypatch.setattr(BlockedSums, "apply", lambda *tensors: blocks.append(1) or plain(*tensors))
    (results,) = TOY.evaluate([crystal()])
    assert len(blocks) == CONTRACT["painn"]["n_blocks"]
    assert_same(results, everything(crystal(), TOY))


def test_frames_are_labelled_by_the_served_network(monkeypatch):
    monkeypatch.setattr(InferenceMessage, "forward", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        predict_frames(TOY.force_field.potential, [cluster()])


def not_finite() -> Atoms:
    atoms = cluster()
    atoms.positions[2, 1] = np.nan
    return atoms


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (Atoms(), CalculatorSetupError, "empty"),
        (Atoms("Xe"), CalculatorSetupError, "Xe"),
        (Atoms("H", pbc=True), CalculatorSetupError, "no independent cell vector"),
        (
            Atoms("Cu", cell=[[3, 0, 0], [0, 3, 0], [3, 3, 1e-3]], pbc=True),
            CalculatorSetupError,
            "too many to search",
        ),
        (not_finite(), CalculationFailed, r"positions \[2\] of CH4O contain NaN"),
    ],
    ids=["empty", "element", "cell", "flat", "nan"],
)
def test_a_bad_structure_is_named_before_anything_is_evaluated(monkeypatch, bad, error, message):
    monkeypatch.setattr(evaluation, "differentiate", lambda *_: pytest.fail("evaluated"))
    with pytest.raises(error, match=f"structure 2: .*{message}") as caught:
        TOY.evaluate([cluster(), crystal(), bad])
    assert isinstance(caught.value, GFFMergeError)


def test_overlapping_atoms_are_named(calc):
    with pytest.raises(CalculationFailed, match="structure 1: the energies of H2"):
        calc.evaluate([cluster(), Atoms("H2", positions=np.zeros((2, 3)))])
    assert len(calc.evaluate([cluster()])) == 1


@pytest.mark.parametrize("what", [cluster(), [cluster(), "H2O"]])
def test_no_list_of_structures(what):
    with pytest.raises(CalculatorSetupError, match=r"a list of structures|no Atoms object"):
        TOY.evaluate(what)


@pytest.mark.parametrize("max_edges", [0, -1, 1.5, "many"])
def test_impossible_batches(max_edges):
    with pytest.raises(CalculatorSetupError, match="no size of a batch"):
        TOY.evaluate([cluster()], max_edges=max_edges)


def test_memory_that_does_not_suffice(monkeypatch):
    expected, plain, sizes = TOY.evaluate(MIXED), evaluation.differentiate, []

    def small(potential, vectors, graph):
        if len(graph) > 6:
            raise torch.OutOfMemoryError("CUDA out of memory")
        sizes.append(len(graph))
        return plain(potential, vectors, graph)

    monkeypatch.setattr(evaluation, "differentiate", small)
    for found, results in zip(TOY.evaluate(MIXED), expected, strict=True):
        assert_same(found, results)
    assert sum(sizes) == sum(map(len, MIXED))
    with pytest.raises(CalculationFailed, match=r"\(8 atoms\) needs more memory than cpu") as caught:
        TOY.evaluate([cluster(), crystal() * (2, 2, 1)])
    assert isinstance(caught.value, DeviceMemoryError)


def test_threads(calc):
    expected, wrong = calc.evaluate(MIXED), []

    def work():
        for _ in range(3):
            for found, results in zip(calc.evaluate(MIXED), expected, strict=True):
                if not np.array_equal(found["forces"], results["forces"]):
                    wrong.append(found)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_inside_inference_mode(calc):
    atoms = STRUCTURES["slab"]()
    (expected,) = calc.evaluate([atoms])
    with torch.inference_mode():
        assert_same(calc.evaluate([atoms])[0], expected, atol=0)
