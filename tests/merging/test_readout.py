from copy import deepcopy

import pytest
import torch
from ase import Atoms

from ase_gffmerge.graphs import batch_graphs, build_graph, predict
from ase_gffmerge.graphs.graph import edge_vectors
from ase_gffmerge.least_squares.gram import Gram
from ase_gffmerge.merging.random_features import (
    MAX_UNKNOWNS,
    draw_random_features,
    random_feature_derivatives,
    with_random_feature_readout,
)
from ase_gffmerge.merging.readout_fit import fit_readout, readout_rows
from ase_gffmerge.merging.recipe import ReadoutOptions
from ase_gffmerge.merging.tangents import Directions, displacement_directions

OPTIONS = ReadoutOptions(width=12, blocks=2)
ELEMENTS = torch.tensor([0, 1, 2])


@pytest.fixture
def prepared(family, architecture):
    """A specialist, its widened copy with a random lift, and a batch of two molecules and a skewed crystal."""
    first, second = family(architecture, 2)
    wide = with_random_feature_readout(first.potential, OPTIONS)
    crystal = Atoms("CHO", positions=[[0, 0, 0], [1.1, 0.2, 0], [0, 1.3, 1.0]], pbc=True)
    crystal.set_cell([[3.0, 0.1, 0], [0.4, 3.2, 0], [0, 0.3, 2.9]])
    frames = [*first.calibration[:3], second.calibration[0], crystal]
    batch = batch_graphs([build_graph(atoms, first.cutoff) for atoms in frames])
    directions = Directions.draw(batch, 2, stress_weight=0.0, seed=0)
    draw_random_features(wide.readout, random_feature_derivatives(wide, batch, directions)[0], seed=0)
    return first, wide, batch


def gram(wide, batch, target, n_displacements: int) -> Gram:
    rows = readout_rows(
        wide,
        batch,
        target,
        Directions.draw(batch, n_displacements, stress_weight=0.5, seed=0),
        elements=ELEMENTS,
        frame_weights=torch.ones(batch.n_structures, dtype=torch.float64),
        energy_weight=1.0,
    )
    return Gram.of(*rows)


def test_widening_changes_nothing_until_theta_does(prepared) -> None:
    specialist, wide, batch = prepared
    before, after = predict(specialist.potential, batch), predict(wide, batch)
    torch.testing.assert_close(after.energy, before.energy, rtol=0, atol=1e-12)
    torch.testing.assert_close(after.forces, before.forces, rtol=0, atol=1e-12)


@pytest.mark.parametrize("directions", [200, 5])
def test_gram_is_the_normal_equation_of_energies_forces_and_stresses(prepared, directions) -> None:
    """Targets made by known coefficients leave no residual there, and the solve reproduces them."""
    _, wide, batch = prepared
    generator = torch.Generator().manual_seed(3)
    theta = torch.randn(3, 12, generator=generator, dtype=torch.float64)
    constants = torch.randn(3, generator=generator, dtype=torch.float64)
    goal = deepcopy(wide)
    with torch.no_grad():
        goal.readout.theta.copy_(theta)
        goal.readout.constants.copy_(constants)
    statistics = gram(wide, batch, predict(goal, batch), directions)
    coefficients = torch.cat([theta.flatten(), constants])[:, None]
    assert statistics.residual(coefficients) < 1e-12
    assert statistics.residual(torch.zeros_like(coefficients)) == 1.0
    fit = fit_readout(statistics, statistics)
    assert fit.solution.residual_after < 1e-6


def test_fit_prefers_the_ridge_that_generalises() -> None:
    generator = torch.Generator().manual_seed(0)
    true = torch.zeros(40, 1, dtype=torch.float64)
    true[:3] = 1.0

    def noisy(n: int) -> Gram:
        x = torch.randn(n, 40, generator=generator, dtype=torch.float64)
        return Gram.of(x, x @ true + 2.0 * torch.randn(n, 1, generator=generator, dtype=torch.float64))

    assert fit_readout(noisy(45), noisy(400)).ridge == 1e-3


def test_displacements_of_small_frames_are_unit_vectors_and_of_large_ones_average_to_the_identity(
    family,
) -> None:
    specialist = family("painn", 1)[0]
    batch = batch_graphs([build_graph(atoms, 4.0) for atoms in specialist.calibration[:2]])
    directions = displacement_directions(batch, 1000, seed=0)
    n = len(specialist.calibration[0])
    assert directions.shape == (3 * n, 2 * n, 3)
    torch.testing.assert_close(directions[:, :n].reshape(3 * n, -1), torch.eye(3 * n, dtype=torch.float64))
    mean = sum(
        d[:, :n].reshape(len(d), -1).T @ d[:, :n].reshape(len(d), -1)
        for d in (displacement_directions(batch, 10, seed=s) for s in range(400))
    )
    torch.testing.assert_close(mean / 400, torch.eye(3 * n, dtype=torch.float64), atol=0.1, rtol=0)


def test_work_is_the_change_of_energy_along_the_tangents(prepared) -> None:
    """Central differences of the energy along every displacement and strain; molecules have no strain."""
    _, wide, batch = prepared
    directions = Directions.draw(batch, 3, stress_weight=0.7, seed=0)
    work = directions.work(batch, predict(wide, batch))
    vectors = edge_vectors(batch)
    tangents = directions.tangents(batch, vectors)
    assert work.shape == (3 + 6, batch.n_structures)
    assert not work[3:, :-1].any()
    assert work[3:, -1].abs().min() > 0
    step = 1e-5
    for tangent, expected in zip(tangents, work):
        energies = []
        for sign in (1, -1):
            per_atom, _ = wide(vectors + sign * step * tangent, batch)
            energies.append(
                per_atom.new_zeros(batch.n_structures).index_add(0, batch.structure_index, per_atom)
            )
        torch.testing.assert_close((energies[0] - energies[1]) / (2 * step), expected, rtol=1e-5, atol=1e-6)


def test_batches_of_molecules_have_no_strains(family) -> None:
    batch = batch_graphs([build_graph(atoms, 4.0) for atoms in family("painn", 1)[0].calibration[:2]])
    assert len(Directions.draw(batch, 3, stress_weight=1.0, seed=0).strains) == 0


@pytest.mark.parametrize("n_elements", [1, 4, 9, 80])
def test_readout_is_narrower_for_many_elements(family, n_elements: int) -> None:
    potential = family("painn", 1)[0].potential
    readout = with_random_feature_readout(potential, ReadoutOptions(inputs=4), n_elements=n_elements).readout
    assert n_elements * readout.lift.out_features <= MAX_UNKNOWNS
    assert readout.lift.out_features == 2048 or n_elements > 4
    assert readout.lift.out_features > 0.9 * MAX_UNKNOWNS / n_elements or n_elements < 4
