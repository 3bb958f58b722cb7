"""What every architecture must satisfy; add an architecture to the fixtures and it is tested."""

import pickle
from copy import deepcopy

import numpy as np
import pytest
import torch
from ase import Atoms

from ase_gffmerge.graphs import batch_graphs, build_graph, predict
from ase_gffmerge.graphs.graph import edge_vectors
from ase_gffmerge.models import build_potential


def evaluate(potential, atoms: Atoms):
    return predict(potential, build_graph(atoms, potential.hyper.cutoff, dtype=potential.dtype))


def assert_same(a, b, atol: float = 1e-9) -> None:
    """Equal per-atom energies and forces."""
    torch.testing.assert_close(a.energies, b.energies, rtol=0, atol=atol)
    torch.testing.assert_close(a.forces, b.forces, rtol=0, atol=atol)


def test_translation(potential, atoms, rng):
    moved = atoms.copy()
    moved.positions += 10 * rng.normal(size=3)
    assert_same(evaluate(potential, moved), evaluate(potential, atoms))


def test_rotation_and_inversion(potential, atoms, rng):
    expected = evaluate(potential, atoms)
    rotation = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    for matrix in (rotation, -rotation):
        turned = atoms.copy()
        turned.set_cell(atoms.cell.array @ matrix.T, scale_atoms=False)
        turned.positions = atoms.positions @ matrix.T
        got = evaluate(potential, turned)
        torch.testing.assert_close(got.energies, expected.energies, rtol=0, atol=1e-9)
        turned_forces = expected.forces @ torch.as_tensor(matrix).mT
        torch.testing.assert_close(got.forces, turned_forces, rtol=0, atol=1e-9)


def test_permutation(potential, atoms, rng):
    order = rng.permutation(len(atoms))
    got, expected = evaluate(potential, atoms[order]), evaluate(potential, atoms)
    torch.testing.assert_close(got.energies, expected.energies[order], rtol=0, atol=1e-9)
    torch.testing.assert_close(got.forces, expected.forces[order], rtol=0, atol=1e-9)


def test_supercell_is_extensive(potential, atoms):
    expected, got = evaluate(potential, atoms), evaluate(potential, atoms * np.where(atoms.pbc, 2, 1))
    copies = 2 ** int(atoms.pbc.sum())
    torch.testing.assert_close(got.forces, expected.forces.repeat(copies, 1), rtol=0, atol=1e-9)
    torch.testing.assert_close(got.strain_derivative, copies * expected.strain_derivative, rtol=0, atol=1e-8)


def test_lattice_shift_of_one_atom(potential, structures):
    crystal = structures[-1]
    moved = crystal.copy()
    moved.positions[1] += [2, -1, 3] @ crystal.cell.array
    assert_same(evaluate(potential, moved), evaluate(potential, crystal))


def test_far_fragments_are_additive(potential):
    pair = Atoms("OHO", [[0, 0, 0], [0.9, 0.3, 0], [0, 0, 100]])
    whole = evaluate(potential, pair)
    torch.testing.assert_close(
        whole.energy, evaluate(potential, pair[:2]).energy + evaluate(potential, pair[2:]).energy
    )


def test_continuous_at_the_cutoff(potential):
    """An atom crosses the cutoff sphere of another one: forces change by O(distance^2)."""
    cutoff, step = potential.hyper.cutoff, 1e-5

    def at(x: float):
        return evaluate(potential, Atoms("COH", [[0, 0, 0], [0, 1.1, 0.1], [x, 0, 0]]))

    inside, outside = at(cutoff - step), at(cutoff + step)
    assert inside.energies.shape == outside.energies.shape
    assert_same(inside, outside, atol=1e-7)
    assert_same(
        at(cutoff - 1e-9), at(cutoff + 1e-9), atol=1e-12 if potential.dtype == torch.float32 else 1e-10
    )


@pytest.mark.parametrize("cell", [None, 20 * np.eye(3)])
def test_no_edges(potential, cell):
    atoms = Atoms("HO", [[0, 0, 0], [0, 0, 10.0]], cell=cell, pbc=cell is not None)
    got = evaluate(potential, atoms)
    assert torch.isfinite(got.energies).all()
    assert not got.forces.any()
    assert not got.strain_derivative.any()
    singles = [evaluate(potential, Atoms(symbol)).energies for symbol in "HO"]
    torch.testing.assert_close(got.energies, torch.cat(singles))


def test_isolated_atom_feels_nothing(potential):
    got = evaluate(potential, Atoms("OHC", [[0, 0, 0], [0, 0, 0.9], [0, 0, 30.0]]))
    assert torch.isfinite(got.forces).all()
    assert not got.forces[2].any()
    assert got.forces[0].abs().max() > 0


def test_no_edges_can_be_trained(potential):
    potential.requires_grad_(True)
    graphs = [build_graph(Atoms(symbol), potential.hyper.cutoff) for symbol in "HO"]
    prediction = predict(potential, batch_graphs(graphs), differentiable=True)
    (prediction.energy.sum() + prediction.forces.square().sum()).backward()
    assert any(p.grad.abs().max() > 0 for p in potential.parameters() if p.grad is not None)


def test_float32_agrees_with_float64(potential, atoms):
    expected = evaluate(potential, atoms)
    got = evaluate(deepcopy(potential).float(), atoms)
    assert got.forces.dtype == torch.float32
    assert got.energies.dtype == torch.float64
    scale = float(expected.forces.abs().max())
    torch.testing.assert_close(got.forces.double(), expected.forces, rtol=0, atol=2e-5 * max(scale, 1.0))
    torch.testing.assert_close(got.energies, expected.energies, rtol=0, atol=2e-5 * max(scale, 1.0))


def test_constants_survive_a_change_of_precision(potential, atoms):
    """float32 weights give the same energies whether the model was always float64 or not."""
    references = potential.references.clone()
    single = deepcopy(potential).float()
    assert single.references.dtype == torch.float64
    torch.testing.assert_close(single.references, references, rtol=0, atol=0)
    weights = single.state_dict()
    fresh = build_potential(potential.architecture, potential.hyper.to_dict(), potential.species).double()
    fresh.load_state_dict(weights)
    assert_same(evaluate(single.double(), atoms), evaluate(fresh.requires_grad_(False), atoms), atol=0)


def test_copies_compute_the_same(potential, atoms):
    expected = evaluate(potential, atoms)
    for copy in (deepcopy(potential), pickle.loads(pickle.dumps(potential))):
        assert_same(evaluate(copy, atoms), expected, atol=0)
        with torch.no_grad():
            copy.embedding += 1
        assert_same(evaluate(potential, atoms), expected, atol=0)


def test_state_dict_rebuilds_the_model(potential, atoms):
    other = build_potential(potential.architecture, potential.hyper.to_dict(), potential.species).double()
    other.requires_grad_(False).load_state_dict(potential.state_dict())
    assert_same(evaluate(other, atoms), evaluate(potential, atoms), atol=0)


def test_every_weight_matters(potential, structures):
    """No parameter is dead, and the default floating-point type is left alone."""
    potential.requires_grad_(True)
    graph = batch_graphs([build_graph(atoms, potential.hyper.cutoff) for atoms in structures])
    prediction = predict(potential, graph, differentiable=True)
    (prediction.energy.sum() + prediction.forces.square().sum()).backward()
    dead = [name for name, p in potential.named_parameters() if p.grad is None or not p.grad.any()]
    assert [name for name in dead if not name.startswith("unused.")] == []
    assert torch.get_default_dtype() == torch.float32


def test_stages_emit_invariant_features(potential, atoms):
    graph = build_graph(atoms, potential.hyper.cutoff)
    vectors = edge_vectors(graph)
    features = potential.features(vectors, graph)
    assert len(features) == potential.hyper.n_blocks
    assert all(x.shape == (len(atoms), potential.hyper.channels) for x in features)
    state, geometry = potential.embed(graph), potential.geometry(vectors, graph)
    for _, stage in potential.named_stages():
        state = stage(state, geometry)
        assert len(potential.scalars(state)) == len(atoms)


def test_forward_mode(potential, atoms):
    """The directional derivative by dual numbers is the force."""
    graph = build_graph(atoms, potential.hyper.cutoff)
    direction = torch.randn(
        graph.positions.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )

    def energy(positions):
        return potential(edge_vectors(graph, positions), graph)[0].sum()

    slope = torch.func.jvp(energy, (graph.positions,), (direction,))[1]
    torch.testing.assert_close(slope, -(predict(potential, graph).forces * direction).sum())


def test_specialist_index_selects_the_embedding(architecture, atoms):
    potential = build_potential(architecture, {"channels": 8, "n_embeddings": 2}, (1, 6, 8, 13)).double()
    first, second = (
        predict(potential, build_graph(atoms, potential.hyper.cutoff, specialist=k)).energy for k in (0, 1)
    )
    assert abs(float(first - second)) > 1e-6
    atoms.set_array("specialist", np.ones(len(atoms), dtype=int))
    torch.testing.assert_close(evaluate(potential, atoms).energy, second, rtol=0, atol=0)
