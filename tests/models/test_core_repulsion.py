"""The core repulsion: nothing within what is known, smooth at its onset, bounded beyond it, stored in files."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from ase import Atoms, units
from ase.build import bulk, molecule
from ase.data import covalent_radii
from ase.io import write

from ase_gffmerge import ForceField, GFFMergeCalculator, load_force_field, merge
from ase_gffmerge.errors import FileFormatError
from ase_gffmerge.forcefield.force_field import bundled_test_frames, repelling
from ase_gffmerge.forcefield.provenance import Provenance
from ase_gffmerge.graphs import build_graph, predict
from ase_gffmerge.graphs.derivatives import hessian
from ase_gffmerge.inference.compiled import CompiledPotential
from ase_gffmerge.models import Potential
from ase_gffmerge.models.core_repulsion import BONDED, MARGIN, WIDTH, zbl_derivatives, zbl_energy
from ase_gffmerge.storage.tensor_file import read_file, write_file
from ase_gffmerge.training.config import TrainConfig
from ase_gffmerge.training.train import train


def known_frames() -> list[Atoms]:
    frames = []
    for seed in range(3):
        for make in (lambda: molecule("CH3CH2OH"), lambda: bulk("Al", cubic=True)):
            atoms = make()
            atoms.rattle(0.05, seed=seed)
            frames.append(atoms)
    return frames


@pytest.fixture
def field(potential) -> ForceField:
    return ForceField(name="toy", potential=potential, calibration=tuple(known_frames()))


@pytest.fixture
def guarded(field) -> ForceField:
    return field.with_core_repulsion()


def squeezed() -> Atoms:
    """A molecule with one pair in the middle of its onset, one far below it and others as they are."""
    atoms = molecule("CH3CH2OH")
    atoms.positions[3] = atoms.positions[2] + [0.0, 0.45, 0.1]
    return atoms


def evaluated(potential: Potential, atoms: Atoms):
    return predict(potential, build_graph(atoms, potential.hyper.cutoff))


def test_zbl_is_the_published_potential() -> None:
    """Against the formula in ASE's constants (the screening length there is 0.8854 Bohr radii)."""
    r = np.array([0.2, 0.5, 1.0, 2.0])
    a = 0.8854 * units.Bohr / (6**0.23 + 8**0.23)
    screening = sum(
        c * np.exp(-d * r / a)
        for c, d in ((0.18175, 3.1998), (0.50986, 0.94229), (0.28022, 0.4029), (0.02817, 0.20162))
    )
    expected = 48 * units.Hartree * units.Bohr / r * screening
    found = zbl_energy(torch.tensor(r), torch.tensor(6.0), torch.tensor(8.0))
    np.testing.assert_allclose(found, expected, rtol=5e-4)


def test_zbl_and_its_derivatives() -> None:
    r, carbon, oxygen = (torch.tensor(x, dtype=torch.float64) for x in ([0.2, 0.5, 1.0, 2.0], 6.0, 8.0))
    value, slope, curvature = zbl_derivatives(r, carbon, oxygen)
    r.requires_grad_()
    energy = zbl_energy(r, carbon, oxygen)
    (first,) = torch.autograd.grad(energy.sum(), r, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), r)
    for ours, expected in ((value, energy), (slope, first), (curvature, second)):
        torch.testing.assert_close(ours, expected.detach())


def test_the_onset_is_no_stiffer_than_zbl(guarded) -> None:
    """A switch over a short way is: 1400 eV/Å² for carbon, which steps of 0.5 fs do not follow."""
    core, species = guarded.potential.core_repulsion, guarded.species
    pair = [species.index(6), species.index(8)]
    outer = float(core.outer[*pair])
    r = torch.linspace(0.2, 1.1 * outer, 400, dtype=torch.float64, requires_grad=True)
    lengths = torch.stack([r, torch.zeros_like(r), torch.zeros_like(r)], dim=1)
    edges = torch.arange(800).reshape(2, 400)
    graph = replace(build_graph(Atoms("CO", positions=[[0, 0, 0], [1, 0, 0]]), 3.0), edge_index=edges)
    energies = core(lengths, graph, torch.tensor(pair).repeat_interleave(400))[1][400:]
    (slope,) = torch.autograd.grad(energies.sum(), r, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), r)
    zbl = zbl_derivatives(r.detach(), torch.tensor(6.0), torch.tensor(8.0))[2]
    inside = r < outer
    assert (energies[inside] > 0).all()
    assert (slope[inside] < 0).all()
    assert (curvature[inside] > 0).all()
    assert (2 * curvature <= zbl).all()
    assert not energies[~inside].any()
    assert not curvature[~inside].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_known_frames_are_unchanged_to_the_bit(field, guarded, dtype) -> None:
    for own in (field, guarded):
        own.to(dtype=dtype)
    for atoms in known_frames():
        ours, bare = (evaluated(own.potential, atoms) for own in (guarded, field))
        for name in ("energies", "energy", "forces", "strain_derivative"):
            assert torch.equal(getattr(ours, name), getattr(bare, name)), name
        assert all(map(torch.equal, ours.readout_inputs, bare.readout_inputs))


def test_onsets_lie_below_the_shortest_distances(guarded) -> None:
    core, species = guarded.potential.core_repulsion, list(guarded.species)
    distances = {}
    for atoms in known_frames():
        pairs = build_graph(atoms, guarded.cutoff).edge_index.T.tolist()
        graph = build_graph(atoms, guarded.cutoff)
        shifts = graph.shifts @ graph.cell[0]
        for (j, i), shift in zip(pairs, shifts, strict=True):
            key = tuple(sorted((atoms.numbers[i], atoms.numbers[j])))
            length = float(np.linalg.norm(atoms.positions[j] - atoms.positions[i] + shift.numpy()))
            distances[key] = min(distances.get(key, np.inf), length)
    assert core.known == pytest.approx(distances)
    for (first, second), length in distances.items():
        assert core.outer[species.index(first), species.index(second)] == pytest.approx(MARGIN * length)
    unseen = BONDED * (covalent_radii[13] + covalent_radii[8])
    assert core.outer[species.index(13), species.index(8)] == pytest.approx(unseen)


def test_foundation_models_keep_their_bonds(field) -> None:
    broad = replace(field, provenance=Provenance(origin="another package")).with_core_repulsion()
    radii = torch.as_tensor(covalent_radii[list(field.species)])
    outer = broad.potential.core_repulsion.outer
    assert (outer <= BONDED * (radii[:, None] + radii) + 1e-12).all()


def test_forces_and_stress_are_derivatives(guarded) -> None:
    atoms = bulk("Al", cubic=True) * (1, 1, 1)
    atoms.rattle(0.05, seed=0)
    atoms.positions[1] = atoms.positions[0] + [1.5, 0.8, 0.3]
    found = evaluated(guarded.potential, atoms)
    step = 1e-5

    def energy(structure: Atoms) -> float:
        return float(evaluated(guarded.potential, structure).energy)

    for i, k in ((0, 0), (1, 1), (2, 2)):
        sides = []
        for sign in (1, -1):
            moved = atoms.copy()
            moved.positions[i, k] += sign * step
            sides.append(energy(moved))
        assert found.forces[i, k].item() == pytest.approx(
            -(sides[0] - sides[1]) / (2 * step), abs=2e-6, rel=1e-6
        )
    strain = found.strain_derivative[0]
    assert torch.equal(strain, strain.T)
    sides = []
    for sign in (1, -1):
        moved = atoms.copy()
        deformation = np.eye(3)
        deformation[0, 1] += sign * step
        moved.set_cell(atoms.cell.array @ deformation, scale_atoms=True)
        sides.append(energy(moved))
    assert strain[0, 1].item() == pytest.approx((sides[0] - sides[1]) / (2 * step), abs=2e-6, rel=1e-6)


def test_smooth_at_onset_and_at_the_inner_radius(guarded) -> None:
    """Energy, force and second derivative are continuous: jumps shrink with the distance between the two sides."""
    core, species = guarded.potential.core_repulsion, guarded.species
    outer = float(core.outer[species.index(1), species.index(8)])

    def derivatives(r: float) -> np.ndarray:
        atoms = Atoms("OH", positions=[[0, 0, 0], [r, 0, 0]])
        graph = build_graph(atoms, guarded.cutoff)
        found = predict(guarded.potential, graph)
        second = hessian(guarded.potential, graph)[0, 0]
        return np.array([float(found.energy), float(found.forces[0, 0]), second])

    for radius in (outer, (1 - WIDTH) * outer):
        coarse, fine = (np.abs(derivatives(radius + h) - derivatives(radius - h)) for h in (1e-3, 1e-4))
        assert (fine < 0.2 * coarse + 1e-7).all()


def test_atoms_repel_and_the_network_cannot_collapse(guarded, field) -> None:
    distances = np.linspace(0.05, 0.6, 12)
    energies = [
        float(evaluated(guarded.potential, Atoms("OH", positions=[[0, 0, 0], [r, 0, 0]])).energy)
        for r in distances
    ]
    assert (np.diff(energies) < 0).all()
    crowd = Atoms("C4H4O4", positions=np.random.default_rng(0).random((12, 3)) * 2.0)
    core, species = guarded.potential.core_repulsion, guarded.potential.species_row[crowd.numbers]
    low = (core.bounds[0] - core.bounds[2])[species] + guarded.potential.references[species]
    assert (evaluated(guarded.potential, crowd).energies >= low).all()


def test_hessian_is_the_derivative_of_forces(guarded) -> None:
    atoms, step = squeezed(), 1e-5
    graph = build_graph(atoms, guarded.cutoff)
    matrix = hessian(guarded.potential, graph)
    np.testing.assert_allclose(matrix, matrix.T, atol=1e-8)
    sides = []
    for sign in (1, -1):
        moved = atoms.copy()
        moved.positions[3, 1] += sign * step
        sides.append(evaluated(guarded.potential, moved).forces.flatten().numpy())
    np.testing.assert_allclose(matrix[10], -(sides[0] - sides[1]) / (2 * step), atol=2e-4, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.nightly_for("m3gnet", "tensornet")
def test_compiled_equals_eager(guarded) -> None:
    if not guarded.potential.compilable:
        pytest.skip("not compilable")
    compiled = CompiledPotential(guarded.potential, compile=True, backend="eager")
    graph = build_graph(squeezed(), guarded.cutoff)
    from ase_gffmerge.graphs.derivatives import differentiate
    from ase_gffmerge.graphs.graph import edge_vectors

    found = compiled(edge_vectors(graph), graph)
    expected = differentiate(guarded.potential, edge_vectors(graph), graph)
    assert not compiled._failed
    for ours, theirs in zip(found[:2], expected[:2], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-9)


def test_files_keep_it_and_refuse_impossible_tables(guarded, tmp_path) -> None:
    path = guarded.save(tmp_path / "field.safetensors")
    again = ForceField.load(path)
    assert again.fingerprint == guarded.fingerprint != guarded.without_core_repulsion().fingerprint
    one, other = (evaluated(own.potential, squeezed()).forces for own in (again, guarded))
    assert torch.equal(one, other)
    metadata, tensors = read_file(path)
    tensors["potential.core_repulsion.outer"][0, 0] = -1.0
    write_file(tmp_path / "broken.safetensors", metadata, tensors)
    with pytest.raises(FileFormatError, match="core repulsion are impossible"):
        ForceField.load(tmp_path / "broken.safetensors")


def test_distances_of_specialists_trained_with_it_count(field) -> None:
    close = field.calibration[0].copy()
    close.positions[3] = close.positions[2] + [0.0, 0.6, 0.0]
    trained = field.with_calibration([close]).with_core_repulsion().with_calibration(field.calibration)
    core = repelling(field.potential, [field, trained]).core_repulsion
    numbers = sorted((int(close.numbers[2]), int(close.numbers[3])))
    assert core.known[tuple(numbers)] == pytest.approx(0.6)


def test_calculator_turns_it_on_and_off(guarded, field) -> None:
    atoms = squeezed()
    energy = {}
    for name, (own, choice) in {
        "as it is": (guarded, None),
        "off": (guarded, "none"),
        "on": (field, "auto"),
        "bare": (field, None),
    }.items():
        atoms.calc = GFFMergeCalculator([own], core_repulsion=choice, dtype="float64")
        energy[name] = atoms.get_potential_energy()
    assert energy["as it is"] == energy["on"]
    assert energy["off"] == energy["bare"] != energy["on"]
    with pytest.raises(RuntimeError, match="use 'auto' or 'none'"):
        GFFMergeCalculator([field], core_repulsion="zbl")


def test_merges_have_it_by_default() -> None:
    pair = [load_force_field(name) for name in ("rmd17-ethanol", "rmd17-malonaldehyde")]
    few = [s.with_calibration(s.calibration[::50]) for s in pair]
    recipe = {"preset": "mean"}
    guarded, bare = (merge(few, {**recipe, "core_repulsion": c}, device="cpu")[0] for c in ("auto", "none"))
    assert bare.potential.core_repulsion is None
    assert guarded.potential.core_repulsion is not None
    for atoms in few[0].calibration:
        ours, theirs = (evaluated(own.potential, atoms) for own in (guarded, bare))
        assert torch.equal(ours.forces, theirs.forces)
    atoms = Atoms("CC", positions=[[0, 0, 0], [0.3, 0, 0]])
    energies = [float(evaluated(own.potential, atoms).energy) for own in (guarded, bare)]
    assert energies[0] > energies[1] + 100
    assert energies[0] - float(2 * guarded.potential.references[1]) == pytest.approx(340, abs=50)


@pytest.mark.slow
def test_training_and_distillation_end_with_it(tmp_path) -> None:
    """Onsets cover all training frames, not only those that are stored; distillation fits the bounds anew."""
    frames = bundled_test_frames("rmd17-ethanol")[:6]
    data = tmp_path / "frames.extxyz"
    write(data, frames)
    hyper = {"cutoff": 3.0, "channels": 4, "n_blocks": 1, "n_radial": 4}
    config = TrainConfig(epochs=1, validation=1, hyper=hyper, core_repulsion="auto")
    base, _, _ = train([data], tmp_path / "base.safetensors", config, n_calibration=2)
    distances = [atoms.get_all_distances()[np.triu_indices(len(atoms), 1)].min() for atoms in frames]
    assert min(base.potential.core_repulsion.known.values()) == pytest.approx(min(distances))
    child = TrainConfig(epochs=1, validation=1, seed=1)
    pair = [base, train([data], tmp_path / "child.safetensors", child, init=base, n_calibration=2)[0]]
    assert pair[1].potential.core_repulsion is not None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        refine = {"epochs": 1, "copies": 0}
        merged, _ = merge(pair, {"readout": None, "refine": refine}, device="cpu")
    core, expected = merged.potential.core_repulsion, repelling(merged.potential, pair).core_repulsion
    assert torch.equal(core.shortest, expected.shortest)
    torch.testing.assert_close(core.bounds, expected.bounds)


def test_what_is_known_of_the_onsets_follows_the_tables(guarded) -> None:
    core = guarded.potential.core_repulsion
    again = type(core).blank(guarded.species)
    assert again.onsets.isfinite().all()
    again.load_state_dict(core.state_dict())
    assert torch.equal(again.float().onsets, core.onsets)
    radii, first, second = core.outer, core.atomic_numbers[:, None], core.atomic_numbers
    torch.testing.assert_close(core.onsets[0], zbl_energy(radii, first, second), rtol=1e-12, atol=0)
