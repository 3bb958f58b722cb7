"""Forces and stress against finite differences; batches against single structures."""

import numpy as np
import torch
from ase import Atoms

from ase_gffmerge.graphs import Prediction, batch_graphs, build_graph, predict


def evaluate(potential, atoms: Atoms) -> Prediction:
    return predict(potential, build_graph(atoms, potential.hyper.cutoff))


def energy(potential, atoms: Atoms) -> float:
    return float(evaluate(potential, atoms).energy)


def central(function, step: float) -> float:
    """Fourth-order central difference at zero."""
    near, far = function(step) - function(-step), function(2 * step) - function(-2 * step)
    return (8 * near - far) / (12 * step)


def displaced(atoms: Atoms, i: int, k: int, step: float) -> Atoms:
    moved = atoms.copy()
    moved.positions[i, k] += step
    return moved


def strained(atoms: Atoms, a: int, b: int, step: float) -> Atoms:
    strain = np.eye(3)
    strain[a, b] += step / 2
    strain[b, a] += step / 2
    moved = atoms.copy()
    moved.set_cell(atoms.cell @ strain, scale_atoms=False)
    moved.positions = atoms.positions @ strain
    return moved


def test_forces_are_derivatives(potential, atoms):
    forces = evaluate(potential, atoms).forces.numpy()
    for i, k in [(0, 0), (1, 2), (len(atoms) - 1, 1)]:
        slope = central(lambda h, i=i, k=k: energy(potential, displaced(atoms, i, k, h)), 2e-3)
        assert abs(slope + forces[i, k]) < 1e-7
    np.testing.assert_allclose(forces.sum(axis=0), 0, atol=1e-10)


def test_strain_derivative(potential, atoms):
    derivative = evaluate(potential, atoms).strain_derivative[0].numpy()
    for a, b in [(0, 0), (1, 1), (2, 2), (1, 2), (0, 2), (0, 1)]:
        slope = central(lambda h, a=a, b=b: energy(potential, strained(atoms, a, b, h)), 1e-3)
        assert abs(slope - derivative[a, b]) / max(atoms.cell.volume, 1.0) < 1e-8
    np.testing.assert_allclose(derivative, derivative.T, atol=1e-12)


def test_stress_is_positive_under_tension_and_blind_to_handedness(potential, structures):
    crystal = structures[-1]
    graph = build_graph(crystal, potential.hyper.cutoff)
    stress = predict(potential, graph).stress(graph.cell)
    left = crystal.copy()
    left.set_cell(crystal.cell[[1, 0, 2]], scale_atoms=False)
    graph = build_graph(left, potential.hyper.cutoff)
    assert torch.linalg.det(graph.cell[0]) < 0
    torch.testing.assert_close(predict(potential, graph).stress(graph.cell), stress, rtol=0, atol=1e-10)
    slope = central(lambda h: energy(potential, strained(crystal, 0, 0, h)), 1e-3)
    assert slope * float(stress[0, 0, 0]) > 0


def test_batch_equals_singles(potential, structures):
    structures = [*structures, Atoms("H"), Atoms("OH", [[0, 0, 0], [0, 0, 50]])]
    graphs = [build_graph(atoms, potential.hyper.cutoff) for atoms in structures]
    together = predict(potential, batch_graphs(graphs))
    singles = [predict(potential, graph) for graph in graphs]
    for name in ("energies", "energy", "forces", "strain_derivative"):
        expected = torch.cat([getattr(single, name) for single in singles])
        torch.testing.assert_close(getattr(together, name), expected, rtol=1e-12, atol=1e-10)


def test_energies_sum_and_nothing_is_kept_for_another_derivative(potential, atoms):
    graph = build_graph(atoms, potential.hyper.cutoff)
    prediction = predict(potential, graph)
    torch.testing.assert_close(prediction.energies.sum()[None], prediction.energy)
    tensors = (
        prediction.energies,
        prediction.forces,
        prediction.strain_derivative,
        *prediction.readout_inputs,
    )
    assert not any(x.requires_grad for x in tensors)


def test_forces_can_be_differentiated(potential, atoms):
    potential.requires_grad_(True)
    graph = build_graph(atoms, potential.hyper.cutoff)
    loss = predict(potential, graph, differentiable=True).forces.square().sum()
    weight = potential.embedding
    (gradient,) = torch.autograd.grad(loss, weight)
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1), dtype=weight.dtype)

    def shifted(step: float) -> float:
        with torch.no_grad():
            weight.add_(step * direction)
            value = float(predict(potential, graph).forces.square().sum())
            weight.sub_(step * direction)
        return value

    slope = float((gradient * direction).sum())
    assert abs(central(shifted, 1e-4) - slope) < 1e-6 * max(1.0, abs(slope))
