import pytest
import torch

from ase_gffmerge.graphs import batch_graphs, build_graph, predict
from ase_gffmerge.merging.force_matching import widen
from ase_gffmerge.merging.readout import fit_readout, lifted_derivatives, probe_directions, random_lift, readout_gram
from ase_gffmerge.merging.recipe import ReadoutOptions
from ase_gffmerge.merging.statistics import Gram

OPTIONS = ReadoutOptions(width=12, blocks=2, probes=200)


def prepared(family, architecture):
    specialist = family(architecture, 2)[0]
    wide = widen(specialist.potential, OPTIONS)
    graphs = [build_graph(atoms, specialist.cutoff) for atoms in specialist.calibration[:3]]
    graphs.append(build_graph(family(architecture, 2)[1].calibration[0], specialist.cutoff))
    batch = batch_graphs(graphs)
    graph = predict(wide, batch.clone()), batch
    with torch.no_grad():
        derivatives = lifted_derivatives(wide, batch.clone(), probe_directions(batch, 200, seed=0))
    random_lift(wide.readout, [derivatives[0]], seed=0)
    return specialist, wide, graph[1]


def test_widening_changes_nothing_until_theta_does(family, architecture) -> None:
    specialist, wide, batch = prepared(family, architecture)
    before, after = predict(specialist.potential, batch.clone()), predict(wide, batch.clone())
    torch.testing.assert_close(after.energy, before.energy, rtol=0, atol=1e-12)
    torch.testing.assert_close(after.forces, before.forces, rtol=0, atol=1e-12)


@pytest.mark.parametrize("probes", [200, 5])
def test_gram_is_the_normal_equation_of_energies_and_forces(family, architecture, probes) -> None:
    """With targets made by known coefficients the residual at those coefficients vanishes, and the solve finds them."""
    _, wide, batch = prepared(family, architecture)
    generator = torch.Generator().manual_seed(3)
    theta = torch.randn(12 + len(wide.species), generator=generator, dtype=torch.float64)
    goal = widen_with(wide, theta)
    target = predict(goal, batch.clone())
    options = OPTIONS.model_copy(update={"probes": probes})
    gram = readout_gram(wide, batch.clone(), target.energy, target.forces, options, torch.ones(4, dtype=torch.float64))
    assert gram.residual(theta[:, None]) < 1e-12
    assert gram.residual(torch.zeros_like(theta)[:, None]) == 1.0
    fit = fit_readout(gram, gram, torch.zeros_like(theta)[:, None])
    assert fit.solution.residual_after < 1e-7


def test_fit_prefers_the_ridge_that_generalises() -> None:
    generator = torch.Generator().manual_seed(0)
    true = torch.zeros(40, 1, dtype=torch.float64)
    true[:3] = 1.0

    def noisy(n: int) -> Gram:
        x = torch.randn(n, 40, generator=generator, dtype=torch.float64)
        return Gram.of(x, x @ true + 2.0 * torch.randn(n, 1, generator=generator, dtype=torch.float64))

    fit = fit_readout(noisy(45), noisy(400), torch.zeros(40, 1, dtype=torch.float64))
    assert fit.ridge == 1e-3


def widen_with(wide, theta):
    from copy import deepcopy

    goal = deepcopy(wide)
    with torch.no_grad():
        goal.readout.theta.copy_(theta[:12])
        goal.readout.constants.copy_(theta[12:])
    return goal


def test_probes_of_small_frames_are_unit_vectors_and_of_large_ones_average_to_the_identity(family) -> None:
    specialist = family("painn", 1)[0]
    batch = batch_graphs([build_graph(atoms, 4.0) for atoms in specialist.calibration[:2]])
    directions = probe_directions(batch, 1000, seed=0)
    n = len(specialist.calibration[0])
    assert directions.shape == (3 * n, 2 * n, 3)
    torch.testing.assert_close(directions[:, :n].reshape(3 * n, -1), torch.eye(3 * n, dtype=torch.float64))
    mean = sum(
        d[:, :n].reshape(len(d), -1).T @ d[:, :n].reshape(len(d), -1)
        for d in (probe_directions(batch, 10, seed=s) for s in range(400))
    )
    torch.testing.assert_close(mean / 400, torch.eye(3 * n, dtype=torch.float64), atol=0.1, rtol=0)
