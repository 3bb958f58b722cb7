"""Errors of a potential against labels."""

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.singlepoint import SinglePointCalculator

from ase_gffmerge.errors import FramesError
from ase_gffmerge.inference.predict import FramePredictions, compare, evaluate, labels, predict_frames
from ase_gffmerge.models import Potential, build_potential
from ase_gffmerge.runtime.devices import chunks


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
    errors = evaluate(potential, labelled(potential, 0.25))
    assert errors.to_dict() == pytest.approx(
        {"force_mae": 0.25, "force_rmse": 0.25, "energy_mae": 0.25, "n_frames": 5}
    )
    perfect = evaluate(potential, labelled(potential, 0.0))
    assert perfect.force_rmse < 1e-12
    assert perfect.energy_mae < 1e-12


def test_mae_and_rmse_are_over_all_components() -> None:
    reference = FramePredictions(np.array([0.0, 0.0]), [np.zeros((1, 3)), np.zeros((3, 3))])
    predicted = FramePredictions(np.array([2.0, -3.0]), [np.full((1, 3), 4.0), np.zeros((3, 3))])
    errors = compare(predicted, reference)
    assert errors.force_mae == pytest.approx(1.0)
    assert errors.force_rmse == pytest.approx(2.0)
    assert errors.energy_mae == pytest.approx(1.5)
    assert errors.n_frames == 2


def test_labels_are_those_of_the_frames(potential: Potential) -> None:
    frames = labelled(potential, 0.1)
    read = labels(frames)
    assert read.energies.tolist() == [atoms.get_potential_energy() for atoms in frames]


def test_unknown_elements_and_no_frames_are_refused(potential: Potential) -> None:
    with pytest.raises(FramesError, match=r"frame 1 \(H3N\) contains N.*knows H, C, O"):
        predict_frames(potential, [molecule("H2O"), molecule("NH3")])
    with pytest.raises(FramesError, match="no frames"):
        evaluate(potential, [])
