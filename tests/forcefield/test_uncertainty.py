"""Standard deviations of energies and forces: dense computations, invariances, calibration, files, and the calculator."""

from copy import deepcopy
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule
from ase.calculators.singlepoint import SinglePointCalculator

import ase_gffmerge.forcefield.uncertainty as uncertainty
from ase_gffmerge import ForceField, GFFMergeCalculator, merge
from ase_gffmerge.data.frames import hold_out_tenth
from ase_gffmerge.errors import FileFormatError, FramesError, MissingUncertaintyError
from ase_gffmerge.forcefield.leverage import calibration_features, fit_extrapolation_grade, grade_of_features
from ase_gffmerge.forcefield.uncertainty import energy_deviations, fit_uncertainty, force_deviations
from ase_gffmerge.graphs import batch_graphs, build_graph, predict
from ase_gffmerge.graphs.graph import edge_vectors
from ase_gffmerge.inference.predict import Predictor
from ase_gffmerge.storage.tensor_file import read_file, write_file
from helpers.toys import family


@cache
def mean_of(architecture: str) -> tuple[ForceField, list[ForceField]]:
    specialists = family(architecture)
    return merge(specialists, "mean", device="cpu")[0].to(dtype=torch.float64), specialists


@pytest.fixture
def merged(architecture) -> tuple[ForceField, list[ForceField]]:
    return deepcopy(mean_of(architecture))


def graph(force_field: ForceField, *frames: Atoms):
    return batch_graphs([build_graph(atoms, force_field.cutoff) for atoms in frames])


def deviations(force_field: ForceField, *frames: Atoms) -> tuple[np.ndarray, np.ndarray]:
    """Of the energies and of the forces."""
    found, _ = Predictor(force_field, compile=False)(graph(force_field, *frames), forces_std=True)
    assert found.energy_std is not None
    assert found.forces_std is not None
    return found.energy_std.numpy(), found.forces_std.numpy()


def sums_by_element(force_field: ForceField, atoms: Atoms) -> np.ndarray:
    """Features (n_species, d) summed over the atoms of every element, without anything of the module under test."""
    grade, one = force_field.extrapolation_grade, graph(force_field, atoms)
    _, scalars = force_field.potential(edge_vectors(one), one)
    z = torch.cat(list(scalars), dim=1)[:, -grade.whitening.shape[1] :].numpy()
    return np.array([z[atoms.numbers == number].sum(axis=0) for number in grade.species.numpy()])


def slopes(function, atoms: Atoms, step: float = 1e-4) -> np.ndarray:
    """Central differences (n_atoms, 3, ...) of a function of the structure."""
    rows = []
    for i in range(len(atoms)):
        for a in range(3):
            ends = []
            for sign in (1, -1):
                moved = atoms.copy()
                moved.positions[i, a] += sign * step
                ends.append(function(moved))
            rows.append((ends[0] - ends[1]) / (2 * step))
    return np.array(rows).reshape(len(atoms), 3, *np.shape(rows[0]))


def test_energies_and_forces_are_those_of_a_dense_computation(merged, monkeypatch) -> None:
    """Against numpy and finite differences of every feature, with as many probes as there are features."""
    force_field, specialists = merged
    atoms = specialists[1].calibration[0]
    grade = force_field.extrapolation_grade
    precision = grade.whitening.numpy() @ grade.whitening.numpy().transpose(0, 2, 1)
    energy_factor, force_factor = grade.deviations.numpy()
    sums = sums_by_element(force_field, atoms)
    variance = np.einsum("zi,zij,zj->", sums, precision, sums)
    slope = slopes(lambda moved: sums_by_element(force_field, moved), atoms)
    variances = np.einsum("pazi,zij,pazj->pa", slope, precision, slope)

    n_species, d, _ = grade.whitening.shape
    every = torch.zeros(n_species * d, n_species + 1, d, dtype=torch.float64)
    for z in range(n_species):
        every[z * d : (z + 1) * d, z] = grade.whitening[z].T
    monkeypatch.setattr(uncertainty, "_probes", lambda grade: every)
    energy, forces = deviations(force_field, atoms)
    np.testing.assert_allclose(energy, energy_factor * np.sqrt(variance), rtol=1e-8)
    np.testing.assert_allclose(forces, force_factor * np.sqrt(variances), rtol=1e-4, atol=1e-6 * forces.max())


@pytest.mark.parametrize("architecture", ["painn", "nequip", "chgnet", "escaip"])
def test_probes_are_forces_of_sampled_last_layers(architecture: str) -> None:
    force_field, specialists = mean_of(architecture)
    atoms = specialists[0].calibration[0]
    probes = uncertainty._probes(force_field.extrapolation_grade).numpy()[:, :-1]
    spread = slopes(lambda moved: np.einsum("kzi,zi->k", probes, sums_by_element(force_field, moved)), atoms)
    expected = force_field.extrapolation_grade.deviations[1].numpy() * np.linalg.norm(spread, axis=2)
    found = deviations(force_field, atoms)[1]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6 * found.max())


def test_probes_are_white(merged, monkeypatch) -> None:
    """With more and more of them, their second moment goes to the covariance: the error of 4096 is about 1/64."""
    grade = merged[0].extrapolation_grade
    monkeypatch.setattr(uncertainty, "PROBES", 4096)
    probes = uncertainty._probes(grade)
    assert (probes[:, -1] == 0).all()
    for z in range(len(grade.species)):
        unwhitened = torch.linalg.solve(grade.whitening[z], probes[:, z].T)
        np.testing.assert_allclose(unwhitened @ unwhitened.T, np.eye(len(unwhitened)), atol=0.12)


def test_deviations_know_no_frame_of_reference(merged, rng) -> None:
    force_field, specialists = merged
    atoms = specialists[0].calibration[0].copy()
    energy, forces = deviations(force_field, atoms)
    order = rng.permutation(len(atoms))
    turned = atoms[order]
    turned.translate((100.0, -20.0, 7.0))
    turned.positions = turned.positions[:, [1, 2, 0]]  # a rotation that only exchanges the axes
    found = deviations(force_field, turned, specialists[1].calibration[0])
    np.testing.assert_allclose(found[0][0], energy[0], rtol=1e-8)
    np.testing.assert_allclose(found[1][: len(atoms)], forces[order][:, [1, 2, 0]], rtol=1e-6, atol=1e-9)
    anyhow = atoms.copy()
    anyhow.rotate(37, (1, 2, 3))
    lengths = np.linalg.norm(deviations(force_field, anyhow)[1], axis=1)
    np.testing.assert_allclose(lengths, np.linalg.norm(forces, axis=1), rtol=1e-6)


def test_a_system_of_two_far_molecules(merged) -> None:
    """Deviations of the same molecule twice add up (not their squares); those of forces stay what they are."""
    force_field, specialists = merged
    one = specialists[0].calibration[0].copy()
    two = one.copy()
    two.translate((50.0, 0.0, 0.0))
    energy, forces = deviations(force_field, one)
    both = deviations(force_field, one + two)
    np.testing.assert_allclose(both[0], 2 * energy, rtol=1e-8)
    np.testing.assert_allclose(both[1], np.concatenate([forces, forces]), rtol=1e-6)


def test_factors_are_the_likeliest_for_held_out_frames(merged) -> None:
    """By hand: the last frame of each specialist, judged by a grade of the others."""
    force_field, specialists = merged
    for specialist in specialists:
        specialist.to(dtype=torch.float64)
    frames = [s.calibration for s in specialists]
    rest = grade_of_features(*calibration_features(force_field.potential, [list(f[:-1]) for f in frames]))
    ratios = []
    for specialist in specialists:
        batch = graph(force_field, specialist.calibration[-1])
        ours, theirs = (predict(p, batch) for p in (force_field.potential, specialist.potential))
        energy = energy_deviations(rest, rest.whitened(ours.readout_inputs, batch.atomic_numbers), batch)
        forces = force_deviations(rest, force_field.potential, batch)
        ratios.append(
            [
                float(((ours.energy - theirs.energy) / energy).square()),
                float(((ours.forces - theirs.forces) / forces).square().mean()),
            ]
        )
    found = fit_uncertainty(force_field.potential, frames, [s.potential for s in specialists])
    np.testing.assert_allclose(found.deviations, np.sqrt(np.mean(ratios, axis=0)), rtol=1e-3)
    assert torch.equal(found.whitening, fit_extrapolation_grade(force_field.potential, frames).whitening)


def test_what_is_as_its_specialists_deviates_from_none() -> None:
    first = family("painn", 1)[0]
    recipe = {"preset": "mean", "allow_identical": True}
    merged, _ = merge([first, replace(first, name="twin")], recipe, device="cpu")
    energy, forces = deviations(merged, molecule("CH3CH2OH"))
    assert energy.max() < 1e-5
    assert forces.max() < 1e-5


def test_labels_calibrate(rng) -> None:
    """Labels whose errors have the deviations that are claimed give the factors that were put in."""
    force_field, specialists = deepcopy(mean_of("painn"))
    frames = []
    for atoms in [a for s in specialists for a in s.calibration] * 2:
        frame = atoms.copy()
        frame.rattle(0.05, seed=len(frames))
        frames.append(frame)
    unit = replace(
        force_field, extrapolation_grade=fit_extrapolation_grade(force_field.potential, [frames[:12]])
    )
    unit.extrapolation_grade.deviations = torch.tensor([3.0, 0.25])
    unit.to(dtype=torch.float64)
    for frame in frames:
        energy, forces = deviations(unit, frame)
        right = predict(unit.potential, graph(unit, frame))
        frame.calc = SinglePointCalculator(
            frame,
            energy=right.energy.item() + energy[0] * rng.standard_normal(),
            forces=right.forces.numpy() + forces * rng.standard_normal(forces.shape),
        )
    found = unit.with_uncertainty(frames).extrapolation_grade.deviations
    assert found[0] == pytest.approx(3.0, rel=0.4)  # of 20 frames
    assert found[1] == pytest.approx(0.25, rel=0.08)
    with pytest.raises(FramesError, match="calibrate no uncertainty"):
        unit.with_uncertainty([])
    with pytest.raises(FramesError, match="no calibration frames"):
        replace(specialists[0], calibration=()).with_uncertainty(frames)


def test_unknown_elements_are_infinitely_uncertain(merged) -> None:
    force_field, specialists = merged
    few = [[a[a.numbers != 8] for a in s.calibration] for s in specialists]
    grade = fit_uncertainty(force_field.potential, few, [s.potential for s in specialists])
    narrow = replace(force_field, extrapolation_grade=grade.double())
    known, unknown = few[0][0], specialists[0].calibration[0]
    energy, forces = deviations(narrow, known, unknown)
    assert np.isfinite(energy[0])
    assert np.isfinite(forces[: len(known)]).all()
    assert np.isinf(energy[1])
    assert np.isinf(forces[len(known) :]).all()


def test_too_few_frames_leave_the_grade_alone() -> None:
    specialists = family("painn", frames=1)
    frames = [s.calibration for s in specialists]
    grade = fit_uncertainty(specialists[0].potential, frames, [s.potential for s in specialists])
    assert grade.deviations is None
    assert fit_uncertainty(specialists[0].potential, [(), ()], [s.potential for s in specialists]) is None


def test_held_out_frames_are_those_of_fits(merged, monkeypatch) -> None:
    """What calibrates is what selection and distillation hold out."""
    force_field, specialists = merged
    seen = []
    whole = uncertainty.calibrated_deviations
    monkeypatch.setattr(uncertainty, "calibrated_deviations", lambda *a: seen.append(a[2]) or whole(*a))
    fit_uncertainty(
        force_field.potential, [s.calibration for s in specialists], [s.potential for s in specialists]
    )
    assert seen == [[hold_out_tenth(s.calibration)[1] for s in specialists]]


def test_files(merged, tmp_path) -> None:
    """Bitwise round trip; a file of an older version has grades without deviations; a garbled one is refused."""
    force_field, specialists = merged
    path = force_field.save(tmp_path / "merged.safetensors")
    loaded, atoms = ForceField.load(path), specialists[0].calibration[0]
    for one, other in zip(deviations(loaded, atoms), deviations(force_field, atoms), strict=True):
        np.testing.assert_array_equal(one, other)
    assert loaded.save(tmp_path / "again.safetensors").read_bytes() == path.read_bytes()

    metadata, tensors = read_file(path)
    bad = tensors | {"extrapolation_grade.deviations": tensors["extrapolation_grade.deviations"][:1]}
    write_file(tmp_path / "bad.safetensors", metadata, bad)
    with pytest.raises(FileFormatError, match="standard deviations"):
        ForceField.load(tmp_path / "bad.safetensors")
    del tensors["extrapolation_grade.deviations"]
    write_file(tmp_path / "old.safetensors", metadata, tensors)
    old = tmp_path / "old.safetensors"
    calc = GFFMergeCalculator(old, device="cpu")
    calc.calculate(atoms)
    assert {"energy_std", "forces_std"}.isdisjoint(calc.extras)
    with pytest.raises(MissingUncertaintyError, match="merge again"):
        calc.evaluate([atoms], ["energy_std"])
    with pytest.raises(MissingUncertaintyError, match="merge again"):
        GFFMergeCalculator(old, device="cpu", forces_std=True)


def test_calculator_serves_them(merged) -> None:
    force_field, specialists = merged
    frames = [s.calibration[0] for s in specialists]
    energy, forces = deviations(force_field, *frames)
    cheap, full = (
        GFFMergeCalculator(force_field, dtype="float64", device="cpu", forces_std=wanted)
        for wanted in (False, True)
    )
    for calc in (cheap, full):
        calc.calculate(frames[0])
        assert calc.extras["energy_std"] == pytest.approx(energy[0], rel=1e-10)
    assert "forces_std" not in cheap.extras
    np.testing.assert_allclose(full.extras["forces_std"], forces[: len(frames[0])], rtol=1e-8)
    assert full.results["energy"] == cheap.results["energy"]
    np.testing.assert_array_equal(full.results["forces"], cheap.results["forces"])
    rows = cheap.evaluate(frames, ["energy", "energy_std", "forces_std"])
    np.testing.assert_allclose([row["energy_std"] for row in rows], energy, rtol=1e-10)
    np.testing.assert_allclose(np.concatenate([row["forces_std"] for row in rows]), forces, rtol=1e-8)
    assert all(set(row) == {"energy", "energy_std", "forces_std"} for row in rows)
    assert {"energy_std", "forces_std"}.isdisjoint(cheap.evaluate(frames)[0])


def test_torchsim_serves_them(merged) -> None:
    torch_sim = pytest.importorskip("torch_sim", reason="torch-sim-atomistic is not installed")
    from ase_gffmerge.engines.torchsim import TorchSimModel

    force_field, specialists = merged
    frames = [s.calibration[0] for s in specialists]
    state = torch_sim.io.atoms_to_state(frames, torch.device("cpu"), torch.float64)
    energy, forces = deviations(force_field, *frames)
    found = TorchSimModel(force_field, forces_std=True)(state)
    np.testing.assert_allclose(found["energy_std"], energy, rtol=1e-8)
    np.testing.assert_allclose(found["forces_std"], forces, rtol=1e-6)
    assert "forces_std" not in TorchSimModel(force_field)(state)
    old = replace(force_field, extrapolation_grade=None)
    with pytest.raises(MissingUncertaintyError, match="merge again"):
        TorchSimModel(old, forces_std=True)
