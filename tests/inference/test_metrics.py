"""Errors of a potential against labels."""

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import read, write
from ase.units import GPa

from ase_gffmerge.errors import FramesError
from ase_gffmerge.inference.errors import compare, evaluate, labels, with_predictions
from ase_gffmerge.inference.predict import FramePredictions, predict_frames
from ase_gffmerge.models import Potential, build_potential
from ase_gffmerge.runtime.devices import chunks
from helpers.toys import rattled


@pytest.fixture(scope="module")
def potential() -> Potential:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        built = build_potential("painn", {"channels": 8, "n_blocks": 1, "n_radial": 4}, (1, 6, 8))
    return built.to(dtype=torch.float64).eval().requires_grad_(False)


def structures() -> list[Atoms]:
    return [molecule("CH3OH"), molecule("H2O"), bulk("C", "diamond", a=3.57) * 2, Atoms("H"), molecule("CH4")]


def test_batches_give_what_single_frames_give(potential: Potential) -> None:
    together = predict_frames(potential, structures())
    for max_edges in (1, 100, 1000):
        split = predict_frames(potential, structures(), max_edges=max_edges)
        np.testing.assert_allclose(split.energies, together.energies, atol=1e-10)
        for one, other, atoms in zip(split.forces, together.forces, structures(), strict=True):
            assert one.shape == (len(atoms), 3)
            np.testing.assert_allclose(one, other, atol=1e-12)


def test_chunks_cover_every_frame_once() -> None:
    frames = structures()
    for max_atoms in (1, 5, 9, 1000):
        groups = list(chunks(frames, max_atoms))
        assert [atoms for group in groups for atoms in group] == frames
        assert all(len(group) == 1 or sum(map(len, group)) <= max_atoms for group in groups)
    assert list(chunks([], 5)) == []


def labelled(potential: Potential, shift: float) -> list[Atoms]:
    """Frames whose labels are off by ``shift`` eV per atom and ``shift`` eV/Å in every component."""
    frames = structures()
    predicted = predict_frames(potential, frames)
    for atoms, energy, forces in zip(frames, predicted.energies, predicted.forces, strict=True):
        atoms.calc = SinglePointCalculator(atoms, energy=energy + shift * len(atoms), forces=forces - shift)
    return frames


def test_known_errors(potential: Potential) -> None:
    errors = evaluate(potential, labelled(potential, 0.25)).to_dict()
    assert errors.pop("force_mae_by_element") == pytest.approx({"H": 0.25, "C": 0.25, "O": 0.25})
    assert errors.pop("stress_mae") is None
    assert errors == pytest.approx({"force_mae": 0.25, "force_rmse": 0.25, "energy_mae": 0.25, "n_frames": 5})
    perfect = evaluate(potential, labelled(potential, 0.0))
    assert perfect.force_rmse < 1e-12
    assert perfect.energy_mae < 1e-12


def test_mae_and_rmse_are_over_all_components() -> None:
    numbers, stress = [np.array([1]), np.array([8, 1, 1])], np.diag([1.0, 0.0, 0.0]) * GPa
    reference = FramePredictions(
        numbers=numbers,
        energies=np.array([0.0, 0.0]),
        forces=[np.zeros((1, 3)), np.zeros((3, 3))],
        stresses=[None, stress],
    )
    predicted = FramePredictions(
        numbers=numbers,
        energies=np.array([2.0, -3.0]),
        forces=[np.full((1, 3), 4.0), np.zeros((3, 3))],
        stresses=[stress, 3 * stress],
    )
    errors = compare(predicted, reference)
    assert errors.force_mae == pytest.approx(1.0)
    assert errors.force_rmse == pytest.approx(2.0)
    assert errors.energy_mae == pytest.approx(1.5)
    assert errors.n_frames == 2
    assert errors.stress_mae == pytest.approx(2.0 / 6)  # GPa; frames that lack one stress do not count
    assert errors.force_mae_by_element == pytest.approx({"H": 4.0 / 3, "O": 0.0})


def test_stresses_are_strain_derivatives(potential: Potential) -> None:
    """Against central differences of the energy; a molecule has none."""
    crystal = rattled(bulk("C", "diamond", a=3.57, cubic=True), 1)[0]
    step, strain = 1e-4, np.zeros((3, 3))
    strain[0, 1] = strain[1, 0] = 0.5
    frames = [crystal.copy(), crystal.copy()]
    for sign, atoms in zip((1, -1), frames, strict=True):
        atoms.set_cell(atoms.cell.array @ (np.eye(3) + sign * step * strain), scale_atoms=True)
    ends = predict_frames(potential, frames).energies
    found = predict_frames(potential, [crystal, molecule("H2O")]).stresses
    assert found[0][0, 1] == pytest.approx((ends[0] - ends[1]) / (2 * step) / crystal.get_volume(), rel=1e-5)
    assert found[1] is None


def test_predictions_beside_labels_survive_a_file(potential: Potential, tmp_path) -> None:
    frames = labelled(potential, 0.25)
    found = predict_frames(potential, frames)
    write(tmp_path / "out.extxyz", with_predictions(frames, {"a-b": found, "a:b": found, "7net": found}))
    assert "_JSON" not in (tmp_path / "out.extxyz").read_text(), "other programs read it, too"
    read_back = read(tmp_path / "out.extxyz", ":")
    for key in ("a_b", "a_b_2", "model_7net"):
        for k, atoms in enumerate(read_back):
            assert atoms.info[f"{key}_energy"] == pytest.approx(found.energies[k])
            np.testing.assert_allclose(atoms.arrays[f"{key}_forces"], found.forces[k], atol=1e-7)
            if found.stresses[k] is None:
                assert f"{key}_stress" not in atoms.info
            else:
                np.testing.assert_allclose(atoms.info[f"{key}_stress"], found.stresses[k].ravel(), atol=1e-7)
    assert [a.get_potential_energy() for a in read_back] == pytest.approx(labels(frames).energies)
    assert "a_b_forces" not in frames[0].arrays


def test_labels_are_those_of_the_frames(potential: Potential) -> None:
    frames = labelled(potential, 0.1)
    read = labels(frames)
    assert read.energies.tolist() == [atoms.get_potential_energy() for atoms in frames]


def test_unknown_elements_and_no_frames_are_refused(potential: Potential) -> None:
    with pytest.raises(FramesError, match=r"frame 1 \(H3N\) contains N.*knows H, C, O"):
        predict_frames(potential, [molecule("H2O"), molecule("NH3")])
    with pytest.raises(FramesError, match=r"a.xyz, frame 7 \(H3N\) contains N"):
        predict_frames(potential, [molecule("NH3")], where=["a.xyz, frame 7"])
    with pytest.raises(FramesError, match="no frames"):
        evaluate(potential, [])
