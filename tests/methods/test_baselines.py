"""The arithmetic of the baselines, on examples worked by hand."""

from copy import deepcopy
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule
from hypothesis import given, settings
from hypothesis import strategies as st

from ase_gffmerge.forcefield.force_field import ForceField
from ase_gffmerge.graphs import batch_graphs, build_graph, predict
from ase_gffmerge.merging.disagreement import DisagreementMetric
from ase_gffmerge.merging.weight_space import WeightSpace
from ase_gffmerge.methods import METHODS, MergeInputs, fisher
from ase_gffmerge.methods.fisher import fisher_information, squared_derivatives
from ase_gffmerge.methods.task_vectors import (
    disjoint_mean,
    drop_and_rescale,
    elect_signs,
    elect_task_vector,
    masked_and_rescaled,
    trim,
)
from ase_gffmerge.models import Potential
from ase_gffmerge.runtime.progress import no_progress

TASK_VECTORS = torch.tensor([[3.0, -1.0, 0.5, 0.1, 2.0], [-1.0, -4.0, 0.2, 2.0, -2.0]])
ALL = torch.ones(2, 5, dtype=torch.bool)


def run(name: str, merge_inputs: MergeInputs):
    return METHODS[name].run(merge_inputs, no_progress)


def test_ties_by_hand() -> None:
    trimmed = trim(TASK_VECTORS, ALL, density=0.6)
    assert trimmed.tolist() == [[3.0, -1.0, 0.0, 0.0, 2.0], [0.0, -4.0, 0.0, 2.0, -2.0]]
    signs = elect_signs(trimmed)
    assert signs.tolist() == [1.0, -1.0, 0.0, 1.0, 0.0]
    assert disjoint_mean(trimmed, signs).tolist() == [3.0, -2.5, 0.0, 2.0, 0.0]


def test_trimming_counts_what_a_specialist_knows() -> None:
    known = torch.tensor([[True, True, False, False, False], [True] * 5])
    trimmed = trim(torch.where(known, TASK_VECTORS, 0.0), known, density=0.4)
    assert (trimmed != 0).sum(1).tolist() == [
        1,
        3,
    ]  # 0.8 of 2, rounded up; 2 of 5, and one as large as the second


def test_task_arithmetic_by_hand() -> None:
    base = torch.arange(5.0)
    expected = [0 + 1.0, 1 - 2.5, 2 + 0.35, 3 + 1.05, 4 + 0.0]
    vectors = base + TASK_VECTORS
    known = torch.ones_like(vectors, dtype=torch.bool)
    space = WeightSpace(specialists=(), vectors=vectors, known=known, base=base, _blank=None)
    assert space.task_arithmetic(0.5).tolist() == pytest.approx(expected)


def test_emr_by_hand() -> None:
    elected = elect_task_vector(TASK_VECTORS)
    assert elected.tolist() == [3.0, -4.0, 0.5, 2.0, 0.0]
    first, second = masked_and_rescaled(TASK_VECTORS, elected)
    torch.testing.assert_close(first, 6.6 / 9.5 * torch.tensor([3.0, -4.0, 0.5, 2.0, 0.0]))
    torch.testing.assert_close(second, 9.2 / 6.5 * torch.tensor([0.0, -4.0, 0.5, 2.0, 0.0]))


vectors = st.lists(st.lists(st.floats(-1, 1), min_size=6, max_size=6), min_size=2, max_size=4)


@settings(deadline=None, max_examples=30)
@given(vectors, st.sampled_from([0.2, 0.5, 1.0]))
def test_ties_stays_between_the_entries_of_its_task_vectors(rows, density) -> None:
    task_vectors = torch.tensor(rows, dtype=torch.float64)
    trimmed = trim(task_vectors, torch.ones_like(task_vectors, dtype=torch.bool), density=density)
    mean = disjoint_mean(trimmed, elect_signs(trimmed))
    assert (mean <= task_vectors.amax(0).clamp(min=0) + 1e-12).all()
    assert (mean >= task_vectors.amin(0).clamp(max=0) - 1e-12).all()
    assert ((trimmed == task_vectors) | (trimmed == 0)).all()


@settings(deadline=None, max_examples=30)
@given(vectors)
def test_emr_keeps_the_mean_size_of_every_task_vector(rows) -> None:
    task_vectors = torch.tensor(rows, dtype=torch.float64)
    kept = masked_and_rescaled(task_vectors, elect_task_vector(task_vectors))
    agree = (kept != 0).any(1)
    torch.testing.assert_close(kept.abs().sum(1)[agree], task_vectors.abs().sum(1)[agree])
    assert (kept * task_vectors >= 0).all()


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_dare_is_unbiased(rate) -> None:
    """The mean over evenly spaced noise is the expectation; entries are dropped or grow by 1 / (1 - p)."""
    n = 1000
    noise = ((torch.arange(n, dtype=torch.float64) + 0.5) / n)[:, None].expand(-1, 5)
    entries = TASK_VECTORS[0].double()
    dropped = drop_and_rescale(entries.expand(n, -1), noise, rate=rate)
    torch.testing.assert_close(dropped.mean(0), entries)
    assert set(dropped[:, 0].tolist()) == {0.0, 3.0 / (1 - rate)}


def test_dare_drops_the_promised_fraction_and_is_reproducible(make_merge_inputs, architecture) -> None:
    merge_inputs = make_merge_inputs(architecture, 2)
    first, second = (run("dare", merge_inputs).potential(0) for _ in range(2))
    base = dict(merge_inputs.base.potential.named_parameters())
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters()))
    untouched = torch.cat([(p == base[name]).flatten() for name, p in first.named_parameters()])
    rate = run("dare", merge_inputs).settings["rate"]
    assert untouched.double().mean() == pytest.approx(rate**2, abs=0.05)  # dropped in both specialists


def stretched(seed: int) -> Atoms:
    atoms = molecule("H2")
    atoms.positions += np.random.default_rng(seed).normal(scale=0.1, size=(2, 3))
    return atoms


def exact_information(model: Potential, atoms: Atoms) -> torch.Tensor:
    """Sum over one energy and 3n forces of the squared derivatives, one backward pass each."""
    graph = batch_graphs([build_graph(atoms, model.hyper.cutoff)])
    prediction = predict(model, graph, differentiable=True)
    outputs = torch.cat(
        [prediction.energy / len(atoms), prediction.forces.flatten() / (3 * len(atoms)) ** 0.5]
    )
    rows = [
        torch.autograd.grad(y, list(model.parameters()), retain_graph=True, materialize_grads=True)
        for y in outputs
    ]
    return sum(torch.cat([g.flatten() for g in row]).square() for row in rows)


def test_fisher_information_is_that_of_the_explicit_jacobian(make_merge_inputs, architecture) -> None:
    """Averaged over all sign vectors of H2 (one energy, six force components) the estimate is exact."""
    model = make_merge_inputs(architecture, 2).specialists[0].potential.requires_grad_(True)
    batch = batch_graphs([build_graph(stretched(0), model.hyper.cutoff)])
    signs = torch.tensor(list(product([-1.0, 1.0], repeat=7)), dtype=torch.float64)[
        :64
    ]  # -v gives what v gives
    estimates = [squared_derivatives(model, batch, s[:1], s[1:].reshape(2, 3)) for s in signs]
    torch.testing.assert_close(torch.stack(estimates).mean(0), exact_information(model, stretched(0)))


def test_fisher_information_is_the_mean_over_frames(make_merge_inputs) -> None:
    """Two frames in one batch: their signs are independent, so what one adds to the other averages out."""
    potential = make_merge_inputs("painn", 2).specialists[0].potential
    frames = [stretched(seed) for seed in (0, 1)]
    estimate = fisher_information(potential, frames, probes=200)
    assert not any(parameter.requires_grad for parameter in potential.parameters())
    trainable = deepcopy(potential).requires_grad_(True)
    exact = sum(exact_information(trainable, atoms) for atoms in frames) / 2
    assert float(estimate.sum()) == pytest.approx(float(exact.sum()), rel=0.15)
    assert float((estimate - exact).norm() / exact.norm()) < 0.2


def test_a_weight_goes_to_the_specialist_whose_outputs_depend_on_it(make_merge_inputs, monkeypatch) -> None:
    """Oxygen, which only the second one's frames contain, gets the second one's row; the floor says how nearly."""
    merge_inputs = make_merge_inputs("painn", 2)
    alkanes = merge_inputs.specialists[0].with_calibration((molecule("CH4"), molecule("C2H6")))
    merge_inputs = replace(merge_inputs, specialists=(alkanes, merge_inputs.specialists[1]))
    ours, theirs = (s.potential.embedding[0, 2] for s in merge_inputs.specialists)
    for floor, share in ((1e-9, 1.0), (1e9, 0.5)):
        monkeypatch.setattr(fisher, "FLOORS", (floor,))
        merge_output = run("fisher", merge_inputs)
        assert merge_output.settings == {"floor": floor}
        expected = share * theirs + (1 - share) * ours
        torch.testing.assert_close(merge_output.potential(0).embedding[0, 2], expected, atol=1e-5, rtol=0)


def test_bundled_specialists() -> None:
    """Masks keep more of both specialists than the mean; tuning never loses against the mean that it includes."""
    merge_inputs = MergeInputs(
        specialists=tuple(ForceField.load(name) for name in ("rmd17-ethanol", "rmd17-malonaldehyde")),
        base=ForceField.load("rmd17-base"),
    )
    yardsticks = [DisagreementMetric.of([specialist], n_frames=10) for specialist in merge_inputs.specialists]

    def disagreements(name: str) -> np.ndarray:
        merge_output = run(name, merge_inputs)
        return np.array([y.disagreement(merge_output.potential(k)) for k, y in enumerate(yardsticks)])

    mean = disagreements("mean")
    assert (disagreements("emr") < mean).all()
    assert disagreements("task_arithmetic").mean() <= 1.02 * mean.mean()
    assert METHODS["emr"].per_specialist
