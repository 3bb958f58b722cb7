"""Attention over padded neighbourhoods: slots, chunks, the sphere of the cutoff, and what a merge makes of it."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import eval_legendre

from ase_gffmerge import ForceField, GFFMergeCalculator, merge
from ase_gffmerge.errors import FileFormatError, MergeWarning
from ase_gffmerge.graphs import batch_graphs, build_graph, predict
from ase_gffmerge.graphs.derivatives import differentiate
from ase_gffmerge.graphs.graph import edge_vectors
from ase_gffmerge.inference.compiled import CompiledPotential
from ase_gffmerge.inference.predict import predict_frames
from ase_gffmerge.models import build_potential
from ase_gffmerge.models.affine_maps import adjustable_maps
from ase_gffmerge.models.escaip import EScAIP
from ase_gffmerge.models.layers import neighborhoods
from ase_gffmerge.testing import check_potential
from helpers.toys import SHALLOW, SMALL, family, toy


@pytest.fixture
def escaip() -> EScAIP:
    torch.manual_seed(0)
    potential = build_potential("escaip", SMALL["escaip"], (1, 6, 8, 13, 29)).double()
    return potential.requires_grad_(False).eval()


def crystal() -> Atoms:
    atoms = bulk("Cu", cubic=True) * (2, 1, 1)
    atoms.numbers[::3] = 13
    atoms.rattle(0.1, seed=1)
    return atoms


def test_it_passes_the_conformance_kit(escaip):
    check_potential(escaip).raise_if_failed()


@pytest.mark.parametrize(
    "wrong",
    [{"atten_num_heads": 3}, {"frequency_list": [0, 0]}, {"frequency_list": []}, {"frequency_list": [2.0]}],
)
def test_impossible_sizes_are_refused(wrong):
    with pytest.raises(FileFormatError, match=next(iter(wrong))):
        build_potential("escaip", {"channels": 8, **wrong}, (1,))


@given(st.lists(st.integers(0, 4), max_size=30), st.integers(5, 8), st.integers(1, 20))
@settings(max_examples=30, deadline=None)
def test_every_edge_has_a_slot_of_its_own_in_its_receivers_neighbourhood(receivers, n_atoms, size):
    receiver = torch.tensor(receivers, dtype=torch.long)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(neighborhoods, "EDGES_PER_TABLE", size)
        edges, slot = neighborhoods.neighborhoods(receiver, n_atoms)
    assert sum(map(len, edges)) == n_atoms
    flat = torch.cat([edge.flatten() for edge in edges])
    assert flat[slot].tolist() == list(range(len(receivers)))
    assert int((flat == len(receivers)).sum()) == len(flat) - len(receivers)
    assert all(bool((edge[:, 0] == len(receivers)).all()) for edge in edges)
    for edge in edges:  # the slots of a row belong to one atom
        for row in edge.tolist():
            assert len({receivers[e] for e in row if e < len(receivers)}) <= 1


@given(st.lists(st.integers(0, 4), min_size=1, max_size=30), st.integers(5, 8), st.integers(0, 3))
@settings(max_examples=30, deadline=None)
def test_a_width_that_is_given_beforehand_leaves_padding_out_and_nothing_else(receivers, n_atoms, padding):
    wide = max(map(receivers.count, receivers))
    crowd = [n_atoms] * (wide + padding if padding else 0)  # more edges than there are slots
    receiver = torch.tensor(receivers + crowd)
    (edge,), slot = neighborhoods.neighborhoods_of_width(receiver, n_atoms + 1, wide + 1)
    assert edge.shape == (n_atoms + 1, wide + 1)
    assert bool((edge[:, 0] == len(receiver)).all())
    seen = len(receiver) - padding
    assert edge.flatten()[slot[:seen]].tolist() == list(range(seen))
    assert int((edge < len(receiver)).sum()) == seen
    assert (slot[:seen] // (wide + 1)).tolist() == receiver[:seen].tolist()
    assert slot[seen:].tolist() == [n_atoms * (wide + 1)] * padding


def test_what_is_evaluated_in_chunks_is_not_compiled(escaip, monkeypatch):
    graph = build_graph(crystal(), 4.0)
    compiled, vectors = CompiledPotential(escaip, compile=True), edge_vectors(graph)
    assert compiled._offers(graph)
    monkeypatch.setattr(neighborhoods, "chunk_size", lambda device: 20)
    monkeypatch.setattr(torch, "compile", None)
    for found, expected in zip(
        compiled(vectors, graph)[:2], differentiate(escaip, vectors, graph)[:2], strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_legendre_polynomials(escaip):
    potential = build_potential(
        "escaip", {"channels": 4, "frequency_list": [1, 1, 1, 1, 1]}, (1, 6, 8)
    ).double()
    graph = build_graph(molecule("CH3CH2OH"), 5.0)
    vectors = edge_vectors(graph)
    geometry = potential.geometry(vectors, graph)
    unit = torch.nn.functional.normalize(vectors)
    (table,) = geometry.tables
    filled = torch.cat([unit, torch.zeros(1, 3)])[table.edge]
    cosine = filled @ filled.mT
    for order, found in enumerate(table.legendre, start=1):
        torch.testing.assert_close(found, torch.as_tensor(eval_legendre(order, cosine.numpy())))
    assert len(table.legendre) == 4


def test_slots_without_an_edge_bring_exactly_nothing(escaip):
    """A wider neighbourhood, as that of another structure in the batch makes it, changes round-off at most."""
    graph = build_graph(molecule("CH3CH2OH"), 4.0)
    geometry = escaip.geometry(edge_vectors(graph), graph)
    (edge,) = geometry.edges
    n, width = edge.shape
    nothing = torch.full((n, 5), graph.n_edges)
    row, column = geometry.slot // width, geometry.slot % width
    wider = replace(geometry, edges=(torch.cat([edge, nothing], 1),), slot=row * (width + 5) + column)
    narrow = wide = escaip.embed(graph)
    for _, stage in escaip.named_stages():
        narrow, wide = stage(narrow, geometry), stage(wide, wider)
        for a, b in zip(narrow, wide, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-13)


def test_neighbours_in_a_batch_do_not_matter(escaip):
    crowded, lonely = build_graph(crystal(), 4.0), build_graph(molecule("H2O"), 4.0)
    together = predict(escaip, batch_graphs([lonely, crowded, lonely]))
    alone = predict(escaip, lonely)
    torch.testing.assert_close(together.forces[:3], alone.forces, rtol=0, atol=1e-13)
    torch.testing.assert_close(together.energies[-3:], alone.energies, rtol=0, atol=1e-13)


@pytest.mark.parametrize("others", [0, 1, 3])
def test_an_atom_crosses_the_cutoff_without_a_jump(escaip, others):
    """Energy, forces and their derivatives (by differences) are continuous, also for the first neighbour of all."""
    cutoff, near = escaip.hyper.cutoff, 0.9 * molecule("CH3OH").positions[:others] + [-0.2, 0.3, 1.4]

    def at(x: float) -> tuple[float, np.ndarray]:
        positions = np.concatenate([[[0, 0, 0], [x, 0, 0]], near])
        graph = build_graph(Atoms("OH" + "CHO"[:others], positions), cutoff)
        found = predict(escaip, graph)
        return float(found.energy), found.forces.numpy()

    step = 1e-4
    energies, forces = (np.array(x) for x in zip(*map(at, cutoff + step * np.arange(-6, 7)), strict=True))
    slopes = np.diff(forces, axis=0) / step
    assert np.abs(np.diff(energies)).max() < 1.1 * step * np.abs(forces).max() + 1e-12
    assert np.abs(np.diff(forces, axis=0)).max() < 1.1 * step * np.abs(slopes).max()
    assert np.abs(np.diff(slopes, axis=0)).max() < 1e-3


@pytest.mark.parametrize("size", [7, 60])
def test_widths_of_neighbourhoods_leave_no_trace(escaip, monkeypatch, size):
    graph = batch_graphs([build_graph(atoms, 4.0) for atoms in (molecule("CH4"), Atoms("H"), crystal())])
    expected = predict(escaip, graph)
    monkeypatch.setattr(neighborhoods, "EDGES_PER_TABLE", size)
    assert len(neighborhoods.neighborhoods(graph.edge_index[1], len(graph))[0]) > 1
    found = predict(escaip, graph)
    for name in ("energies", "forces", "strain_derivative"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [1, 20, 150])
@pytest.mark.parametrize("frequencies", [(8, 4, 4), (6,), (4, 0, 3, 2)])
def test_chunks_of_atoms_leave_no_trace(monkeypatch, size, frequencies):
    monkeypatch.setattr(neighborhoods, "chunk_size", lambda device: size)
    monkeypatch.setattr(neighborhoods, "WHOLE", 0)
    hyper = SMALL["escaip"] | {"frequency_list": frequencies}
    escaip = build_potential("escaip", hyper, (1, 6, 8, 13, 29)).double().requires_grad_(False).eval()
    graph = batch_graphs([build_graph(atoms, 4.0) for atoms in (molecule("CH4"), Atoms("H"), crystal())])
    order = torch.randperm(graph.n_edges, generator=torch.Generator().manual_seed(0))
    graph = replace(graph, edge_index=graph.edge_index[:, order], shifts=graph.shifts[order])
    expected, served = predict(escaip, graph), predict(escaip.for_inference(), graph)
    for name in ("energies", "energy", "forces", "strain_derivative"):
        torch.testing.assert_close(getattr(served, name), getattr(expected, name), rtol=1e-12, atol=1e-12)


def test_an_envelope_that_round_off_takes_below_zero_is_none(escaip, monkeypatch):
    single = escaip.float()
    atoms = Atoms(
        "O5", [[0, 0, 0], *(r * np.eye(3)[i % 3] for i, r in enumerate((1.5, 3.992, 3.994, 3.996)))]
    )
    graph = build_graph(atoms, 4.0, dtype=torch.float32)
    assert float(single.geometry(edge_vectors(graph), graph).envelope.min()) < 0
    expected = predict(single, graph)
    monkeypatch.setattr(neighborhoods, "chunk_size", lambda device: 2)
    monkeypatch.setattr(neighborhoods, "WHOLE", 0)
    served = predict(single.for_inference(), graph)
    torch.testing.assert_close(served.forces, expected.forces, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(served.energy, expected.energy, rtol=1e-6, atol=1e-6)


def test_derivatives_of_several_results_are_taken_of_one_evaluation(escaip, monkeypatch):
    monkeypatch.setattr(neighborhoods, "chunk_size", lambda device: 20)
    monkeypatch.setattr(neighborhoods, "WHOLE", 0)
    graph, found = build_graph(crystal(), 4.0), list[list[torch.Tensor]]()
    for potential in (escaip, escaip.for_inference()):
        vectors = edge_vectors(graph).detach().requires_grad_()
        energies, _ = potential(vectors, graph)
        parts = (energies[:3].sum(), energies[3:].sum())
        found.append([torch.autograd.grad(part, vectors, retain_graph=True)[0] for part in parts])
    for served, expected in zip(*reversed(found), strict=True):
        torch.testing.assert_close(served, expected, rtol=1e-12, atol=1e-12)


def test_scales_of_the_norms_are_corrected_with_a_block(escaip):
    maps = adjustable_maps(escaip.stages[1])
    scale = maps["norm"]
    x = torch.randn(5, 8, dtype=torch.float64)
    scale.write(torch.arange(1.0, 9.0, dtype=torch.float64)[None])
    torch.testing.assert_close(
        scale.rows(x).view(5, 8) * scale.read(), escaip.stages[1].norm(x), rtol=1e-14, atol=1e-14
    )
    assert {"norm", "ffn_node.norm", "ffn_edge.norm", "qkv", "hidden", "out_node", "out_edge"} <= set(maps)


SMALL_RECIPE = {
    "preset": "closed-form",
    "select": False,
    "readout": {"width": 24, "blocks": 1, "copies": 1},
    "directions": 1,
}


def forces(potential, frames) -> np.ndarray:
    return np.concatenate(predict_frames(potential, frames).forces)


def test_the_default_merge_of_relatives_comes_closer_than_their_mean():
    pair = family("escaip", 2, hyper=SHALLOW["escaip"], frames=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MergeWarning)
        merged, _ = merge(pair, SMALL_RECIPE)
        mean, _ = merge(pair, "mean")
    errors = [
        sum(
            np.square(forces(made.potential, s.calibration) - forces(s.potential, s.calibration)).mean()
            for s in pair
        )
        for made in (merged, mean)
    ]
    assert errors[0] < 0.5 * errors[1]


def test_a_file_and_a_calculator(tmp_path):
    made = toy("escaip")
    made.save(tmp_path / "escaip.safetensors")
    again = ForceField.load(tmp_path / "escaip.safetensors")
    assert again.potential.hyper == made.potential.hyper
    atoms = molecule("CH3CH2OH")
    atoms.calc = GFFMergeCalculator(tmp_path / "escaip.safetensors", dtype="float64")
    expected = predict(made.potential, build_graph(atoms, made.cutoff))
    np.testing.assert_allclose(atoms.get_forces(), expected.forces.numpy(), atol=1e-12)
