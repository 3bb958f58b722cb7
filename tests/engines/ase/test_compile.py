"""``compile=``: the same results, no compilation after the first, and a warning where there is no compiler."""

import warnings

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule
from ase.calculators.calculator import CalculatorSetupError
from torch._dynamo.utils import counters

from ase_gffmerge import GFFMergeCalculator
from ase_gffmerge.errors import CompileWarning
from ase_gffmerge.graphs import build_graph, predict
from ase_gffmerge.graphs.derivatives import assemble
from ase_gffmerge.graphs.graph import edge_vectors
from ase_gffmerge.inference.compiled import EAGER_STEPS, CompiledPotential
from ase_gffmerge.models import build_potential
from helpers.structures import STRUCTURES, crystal, everything
from helpers.toys import CONTRACT, SPECIES, random_force_field


@pytest.fixture
def fresh_counters():
    torch._dynamo.reset()
    counters.clear()
    yield counters
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "first",
    [
        pytest.param(Atoms("H2", [[0, 0, 0], [0, 0, 0.8]]), id="H2"),
        pytest.param(molecule("H2O"), id="H2O", marks=pytest.mark.slow),
        pytest.param(crystal(), id="crystal", marks=pytest.mark.slow),
    ],
)
def test_one_compilation_serves_every_size(architecture, first, fresh_counters) -> None:
    """What torch traces is what it would compile: once, without breaks, whatever the numbers of atoms and edges."""
    hyper = {**CONTRACT[architecture], "n_blocks": 1, "cutoff": 4.0}
    potential = build_potential(architecture, hyper, SPECIES).double().requires_grad_(False)
    compiled = CompiledPotential(potential, compile=True, backend="eager")
    for atoms in (first, *(crystal() * repeats for repeats in ((2, 1, 1), (1, 2, 2), (3, 1, 1)))):
        graph = build_graph(atoms, potential.hyper.cutoff)
        expected = predict(potential, graph)
        vectors = edge_vectors(graph)
        prediction = assemble(graph, vectors, compiled(vectors, graph))
        for name in ("energies", "energy", "forces", "strain_derivative"):
            torch.testing.assert_close(getattr(prediction, name), getattr(expected, name), rtol=0, atol=1e-12)
        assert len(prediction.readout_inputs) == potential.hyper.n_blocks
    assert fresh_counters["stats"]["unique_graphs"] == 1
    assert not fresh_counters["graph_break"]


def test_without_a_compiler_one_warning_and_the_same_results(monkeypatch, fresh_counters) -> None:
    def no_compiler(*_, **__):
        raise RuntimeError("no C++ compiler\nwas found")

    monkeypatch.setattr(torch, "compile", lambda function, **_: no_compiler)
    force_field = random_force_field("painn")
    calc = GFFMergeCalculator(force_field, dtype="float64", device="cpu", compile=True)
    eager = GFFMergeCalculator(force_field, dtype="float64", device="cpu", compile=False)
    with pytest.warns(CompileWarning, match=r"no C\+\+ compiler; install") as caught:
        first = everything(crystal(), calc)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = everything(STRUCTURES["cluster"](), calc)
    assert np.array_equal(first["forces"], everything(crystal(), eager)["forces"])
    assert np.array_equal(again["forces"], everything(STRUCTURES["cluster"](), eager)["forces"])


def test_running_out_of_memory_is_no_reason_to_give_up_compiling(monkeypatch) -> None:
    def exhausted(*_, **__):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(torch, "compile", lambda function, **_: exhausted)
    compiled = CompiledPotential(random_force_field("painn").potential, compile=True)
    graph = build_graph(crystal(), 4.0)
    with pytest.raises(torch.OutOfMemoryError):
        compiled(edge_vectors(graph), graph)


def test_auto_never_compiles_on_a_cpu(monkeypatch) -> None:
    def never(*_, **__):
        raise AssertionError("compiled")

    monkeypatch.setattr(torch, "compile", never)
    compiled = CompiledPotential(random_force_field("painn").potential, compile="auto")
    graph = build_graph(crystal(), 4.0)
    for _ in range(EAGER_STEPS + 2):
        compiled(edge_vectors(graph), graph)
    assert not compiled._functions


def test_compile_is_a_parameter(painn_calc) -> None:
    assert painn_calc.todict()["compile"] == "auto"
    for unknown in ("yes", 1, 0, None):
        with pytest.raises(CalculatorSetupError, match="'auto', True or False"):
            GFFMergeCalculator(random_force_field("painn"), compile=unknown)
    calc = GFFMergeCalculator(random_force_field("painn"), device="cpu", compile=np.False_)
    assert calc.todict()["compile"] is False
