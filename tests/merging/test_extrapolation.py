"""The extrapolation grade: what it measures, that 1 is the edge, and what it does not depend on."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ase_gffmerge import ForceField, merge
from ase_gffmerge.errors import FileFormatError
from ase_gffmerge.forcefield.leverage import (
    RIDGE,
    calibration_features,
    fit_extrapolation_grade,
    left_out_leverages,
)
from ase_gffmerge.graphs import batch_graphs, build_graph, predict
from ase_gffmerge.inference.predict import grades, predict_graded
from ase_gffmerge.storage.tensor_file import read_file, write_file


@pytest.fixture
def merged(family, architecture) -> tuple[ForceField, list[ForceField]]:
    specialists = family(architecture)
    return merge(specialists, "mean", device="cpu")[0], specialists


def graph(force_field: ForceField, *frames: Atoms):
    return batch_graphs([build_graph(atoms, force_field.cutoff) for atoms in frames])


def grades_of(force_field: ForceField, *frames: Atoms) -> np.ndarray:
    values = grades(force_field, graph(force_field, *frames))
    assert values is not None
    return values.numpy()


def frames_of(specialists: list[ForceField]) -> list[tuple[Atoms, ...]]:
    return [specialist.calibration for specialist in specialists]


def test_grade_is_the_left_out_leverage_by_its_definition(merged) -> None:
    """Against plain numpy: one solve for the grade, and one for every frame that is left out for the scale."""
    force_field, specialists = merged
    z, numbers, frame = (
        x.numpy() for x in calibration_features(force_field.potential, frames_of(specialists))
    )
    frames = [atoms for specialist in specialists for atoms in specialist.calibration]
    expected = np.empty(len(z))
    for number in np.unique(numbers):
        rows, home = z[numbers == number], frame[numbers == number]
        mu = RIDGE * np.trace(rows.T @ rows) / z.shape[1] * np.eye(z.shape[1])
        left_out = [
            x @ np.linalg.solve(rows[home != f].T @ rows[home != f] + mu, x) for x, f in zip(rows, home)
        ]
        leverage = np.sum(rows.T * np.linalg.solve(rows.T @ rows + mu, rows.T), axis=0)
        expected[numbers == number] = np.sqrt(leverage / max(left_out))
    force_field = force_field.to(dtype=torch.float64)
    np.testing.assert_allclose(grades_of(force_field, *frames), expected, rtol=1e-3)


@settings(deadline=None, max_examples=20)
@given(
    y=hnp.arrays(float, (7, 3), elements=st.floats(-1, 1)),
    sizes=st.sampled_from([(1,) * 7, (2, 4, 1), (3, 4)]),
)
def test_leaving_a_frame_out_by_woodbury_equals_doing_it(y: np.ndarray, sizes: tuple[int, ...]) -> None:
    frame = np.repeat(np.arange(len(sizes)), sizes)
    gram = y.T @ y + 0.1 * np.eye(3)
    whitened = y @ np.linalg.inv(np.linalg.cholesky(gram)).T
    found = left_out_leverages(torch.tensor(whitened), torch.tensor(frame))
    for f in range(len(sizes)):
        own = y[frame == f]
        rest = np.linalg.inv(gram - own.T @ own)
        np.testing.assert_allclose(
            found[frame == f], np.einsum("id,de,ie->i", own, rest, own), rtol=1e-8, atol=1e-12
        )


def test_one_is_the_edge_of_the_calibration_set(merged) -> None:
    """Inside among all frames; without its own frame, the furthest atom of each element is at 1 exactly."""
    force_field, specialists = merged
    frames = [atoms for specialist in specialists for atoms in specialist.calibration]
    assert grades_of(force_field, *frames).max() < 1
    z, numbers, frame = calibration_features(force_field.potential, frames_of(specialists))
    for whitening, number in zip(
        force_field.extrapolation_grade.whitening.double(), force_field.extrapolation_grade.species
    ):
        rows, home = z[numbers == number], frame[numbers == number]
        precision = whitening @ whitening.T
        covariance = torch.linalg.inv(precision)
        mean_eigenvalue = float(rows.square().sum() / rows.shape[1])
        square_scale = float(covariance.diagonal().mean() / (mean_eigenvalue * (1 + RIDGE)))
        worst = 0.0
        for f in home.unique():
            own = rows[home == f]
            rest = torch.linalg.inv(covariance - square_scale * own.T @ own)
            worst = max(worst, float((own @ rest * own).sum(dim=1).max()))
        assert worst == pytest.approx(1.0, rel=1e-2)


def test_an_element_in_one_frame_only_is_judged_by_that_frame(family) -> None:
    first, _ = family("painn")
    extrapolation_grade = fit_extrapolation_grade(first.potential, [[molecule("CH4")], ()])
    force_field = replace(first, extrapolation_grade=extrapolation_grade)
    np.testing.assert_allclose(grades_of(force_field, molecule("CH4")).max(), 1.0, rtol=1e-3)


def test_grade_knows_no_frame_of_reference(merged, rng) -> None:
    force_field, specialists = merged
    force_field.to(dtype=torch.float64)
    atoms = specialists[0].calibration[0].copy()
    atoms.positions += 0.05 * rng.standard_normal(atoms.positions.shape)
    expected = grades_of(force_field, atoms)
    moved = atoms.copy()
    moved.rotate(37, (1, 2, 3))
    moved.translate((100.0, -20.0, 7.0))
    np.testing.assert_allclose(grades_of(force_field, moved), expected, rtol=1e-7)
    order = rng.permutation(len(atoms))
    np.testing.assert_allclose(grades_of(force_field, atoms[order]), expected[order], rtol=1e-7)
    both = grades_of(force_field, moved, atoms)
    np.testing.assert_allclose(both, np.concatenate([expected, expected]), rtol=1e-7)


def test_grade_of_a_crystal_is_that_of_its_supercell(family) -> None:
    first, second = family("painn")
    crystal = bulk("C", "diamond", a=3.6)
    force_field = replace(
        first,
        extrapolation_grade=fit_extrapolation_grade(first.potential, [[crystal], second.calibration]),
    )
    small, large = grades_of(force_field, crystal), grades_of(force_field, crystal * (2, 1, 2))
    np.testing.assert_allclose(large, np.tile(small, 4), rtol=1e-5)


def test_stretched_bond_and_unknown_element(merged) -> None:
    force_field, specialists = merged
    inside = specialists[0].calibration[0]
    stretched = inside.copy()
    stretched.positions[2] += 1.5 * (stretched.positions[2] - stretched.positions[0])
    assert grades_of(force_field, inside).max() < 1 < grades_of(force_field, stretched).max()
    hydrocarbons = [s.with_calibration([molecule("CH4"), molecule("C2H6")]) for s in specialists]
    narrow = replace(
        force_field,
        extrapolation_grade=fit_extrapolation_grade(force_field.potential, frames_of(hydrocarbons)),
    )
    values = grades_of(narrow, inside)
    assert (np.isinf(values) == (inside.numbers == 8)).all()


def test_grade_reads_the_features_of_the_same_pass(merged) -> None:
    """The prediction with the grade is bitwise the prediction without it."""
    force_field, specialists = merged
    batch = graph(force_field, *specialists[1].calibration[:2])
    prediction, grade = predict_graded(force_field, batch)
    plain = predict(force_field.potential, batch)
    assert torch.equal(prediction.energies, plain.energies)
    assert torch.equal(prediction.forces, plain.forces)
    assert torch.equal(grade, grades(force_field, batch))
    assert not grade.requires_grad
    assert predict_graded(replace(force_field, extrapolation_grade=None), batch)[1] is None


@pytest.mark.parametrize("conditioning", ["shared", "per-specialist"])
def test_frames_are_judged_as_their_specialist_embeds_them(family, conditioning: str) -> None:
    specialists = family("painn", size=0.2)
    force_field = merge(specialists, {"preset": "mean", "conditioning": conditioning}, device="cpu")[0]
    frames = specialists[1].calibration
    as_own, as_other = (
        grades(force_field, batch_graphs([build_graph(a, force_field.cutoff, specialist=k) for a in frames]))
        for k in (1, 0)
    )
    assert float(as_own.max()) < 1
    assert torch.equal(as_own, as_other) == (conditioning == "shared")


@pytest.mark.filterwarnings("ignore::ase_gffmerge.errors.MergeWarning")
@pytest.mark.parametrize("recipe", ["paper", "gffmerge"])
def test_every_recipe_leaves_an_extrapolation_grade_of_the_final_potential(family, recipe: str) -> None:
    specialists = family("painn")
    options = {"preset": recipe}
    if recipe == "gffmerge":
        options["readout"] = {"width": 16, "copies": 1}
    force_field, report = merge(specialists, options, device="cpu")
    assert torch.equal(
        force_field.extrapolation_grade.whitening,
        fit_extrapolation_grade(force_field.potential, frames_of(specialists)).whitening,
    )
    assert report.seconds["extrapolation"] > 0


def test_files(merged, tmp_path) -> None:
    """Bitwise round trip; a file without a grade loads and has none; a garbled one is refused."""
    force_field, specialists = merged
    path = force_field.save(tmp_path / "merged.safetensors")
    loaded = ForceField.load(path)
    assert torch.equal(loaded.extrapolation_grade.whitening, force_field.extrapolation_grade.whitening)
    assert torch.equal(loaded.extrapolation_grade.species, force_field.extrapolation_grade.species)
    batch = graph(force_field, specialists[0].calibration[0])
    assert torch.equal(grades(loaded, batch), grades(force_field, batch))
    assert loaded.fingerprint == replace(force_field, extrapolation_grade=None).fingerprint
    assert loaded.save(tmp_path / "again.safetensors").read_bytes() == path.read_bytes()

    metadata, tensors = read_file(path)
    old = {name: value for name, value in tensors.items() if not name.startswith("extrapolation_grade.")}
    write_file(tmp_path / "old.safetensors", metadata, old)
    assert ForceField.load(tmp_path / "old.safetensors").extrapolation_grade is None
    assert grades(ForceField.load(tmp_path / "old.safetensors"), batch) is None
    write_file(
        tmp_path / "bad.safetensors",
        metadata,
        tensors | {"extrapolation_grade.whitening": tensors["extrapolation_grade.whitening"][:, 1:]},
    )
    with pytest.raises(FileFormatError, match="extrapolation grade"):
        ForceField.load(tmp_path / "bad.safetensors")


def test_specialist_graded_by_its_own_frames(family) -> None:
    specialist = family("nequip", 1)[0]
    assert specialist.extrapolation_grade is None
    assert grades_of(specialist.with_extrapolation_grade(), *specialist.calibration).max() < 1
    assert specialist.with_calibration(()).with_extrapolation_grade().extrapolation_grade is None


def test_bundled_pair_tells_broken_from_whole() -> None:
    """Held-out frames are inside for a realistic specialist, a torn molecule is far outside, and the file stays small."""
    from ase_gffmerge.forcefield.force_field import bundled_test_frames

    force_field = ForceField.load("rmd17-ethanol").with_extrapolation_grade()
    frames = bundled_test_frames("rmd17-ethanol")
    worst = [grades_of(force_field, atoms).max() for atoms in frames]
    assert np.quantile(worst, 0.9) < 1
    torn = frames[0].copy()
    torn.positions[torn.numbers == 8] += 1.0
    assert grades_of(force_field, torn).max() > 3 * max(worst)
    assert sum(x.numel() * x.element_size() for x in force_field.extrapolation_grade.buffers()) < 1e6
