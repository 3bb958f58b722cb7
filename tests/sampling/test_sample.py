"""Calibration frames from a specialist alone: decorrelated, intact, reproducible."""

import numpy as np
import pytest
from ase import Atoms
from ase.build import molecule
from hypothesis import given, settings
from hypothesis import strategies as st

from ase_gffmerge import ForceField
from ase_gffmerge.data.frames import displaced
from ase_gffmerge.dynamics.stopping import StoppingCriteria
from ase_gffmerge.errors import FramesError, RecipeError
from ase_gffmerge.sampling.calibration_frames import SampleOptions, sample_frames, screen
from ase_gffmerge.sampling.temperature_ladder import decorrelation_time, inefficiency
from ase_gffmerge.storage.documents import validated
from helpers.springs import Bonded

FAST = {"n": 20, "temperatures": (50.0, 150.0), "time": 0.3, "equilibration": 0.05, "timestep": 1.0}
WATER, CO, OH = molecule("H2O"), Atoms("CO", [[0, 0, 0], [1.4, 0, 0]]), Atoms("OH", [[0, 0, 0], [1.0, 0, 0]])


@pytest.fixture
def springs() -> ForceField:
    return ForceField(name="springs", potential=Bonded(stiffness=30.0))


@given(st.floats(0.0, 0.9), st.integers(0, 5))
@settings(deadline=None, max_examples=10)
def test_inefficiency_of_an_autoregressive_series(memory, seed):
    """x[t+1] = a x[t] + noise has g = (1 + a)/(1 - a)."""
    noise = np.random.default_rng(seed).standard_normal((2000, 40))
    series = noise.copy()
    for t in range(1, len(series)):
        series[t] = memory * series[t - 1] + np.sqrt(1 - memory**2) * noise[t]
    assert inefficiency(series) == pytest.approx((1 + memory) / (1 - memory), rel=0.1)


def test_decorrelation_time_ignores_rigid_motion_and_short_trajectories(rng):
    frames = []
    for k in range(40):
        atoms = WATER.copy()
        atoms.positions += 0.05 * rng.standard_normal((3, 3))
        atoms.rotate(3 * k, "z")
        atoms.positions += 0.2 * k
        frames.append(atoms)
    assert decorrelation_time([frames], 10.0) < 15.0
    assert decorrelation_time([[atoms for atoms in frames for _ in range(4)]], 10.0) > 25.0
    assert decorrelation_time([frames[:3], []], 10.0) == 10.0


def test_displaced_crystals_are_strained_and_molecules_are_not(rng):
    crystal = Atoms("CO", [[0, 0, 0], [2, 2, 2]], cell=[4, 4, 4], pbc=True)
    strained = [displaced(crystal, rattle=0.0, strain=0.05, rng=rng) for _ in range(50)]
    strains = np.array([atoms.cell.array / 4 - np.eye(3) for atoms in strained])
    np.testing.assert_allclose(strains, strains.swapaxes(1, 2), atol=1e-12)
    assert 0.04 < np.abs(strains).max() <= 0.05
    np.testing.assert_allclose(strained[0].get_scaled_positions(), crystal.get_scaled_positions(), atol=1e-12)
    moved = [displaced(WATER, rattle=0.1, strain=0.05, rng=rng) for _ in range(50)]
    assert np.std([atoms.positions - WATER.positions for atoms in moved]) == pytest.approx(0.1, rel=0.15)
    assert not moved[0].cell.any()


def test_judge_names_what_is_wrong(springs):
    long, close = WATER.copy(), WATER.copy()
    long.positions[1] += [0, 2.0, 0]
    close.positions[2] = close.positions[0] + [0, 0, 0.3]
    stops = screen(
        springs.potential, [WATER, long, close], [WATER] * 3, criteria=StoppingCriteria(), max_atoms=4
    )
    assert [stop and stop.reason for stop in stops] == [None, "bond broken", "atoms too close"]


def test_frames_are_as_wanted_and_reproducible(springs):
    told: list[float] = []
    result = sample_frames(
        springs,
        [CO, OH],
        SampleOptions(**FAST),
        progress=lambda fraction, _: told.append(fraction),
    )
    assert len(result.frames) == result.wanted == 20
    assert result.sources == {"md": 16, "rattled": 4}
    assert {str(atoms.symbols) for atoms in result.frames} == {"CO", "OH"}
    assert {atoms.info["temperature"] for atoms in result.frames if "temperature" in atoms.info} == {
        50.0,
        150.0,
    }
    assert all(atoms.calc is None and not atoms.has("momenta") for atoms in result.frames)
    assert told == sorted(told)
    assert told[-1] == 1.0
    assert result.simulated_ps == pytest.approx(8 * (0.3 + 0.05))
    again = sample_frames(springs, [CO, OH], SampleOptions(**FAST))
    for first, second in zip(result.frames, again.frames, strict=True):
        np.testing.assert_array_equal(first.positions, second.positions)
    other = sample_frames(springs, [CO], SampleOptions(**{**FAST, "n": 1, "seed": 1}))
    assert not np.allclose(other.frames[0].positions, result.frames[0].positions)


def test_sampling_goes_on_until_there_are_enough(springs, monkeypatch):
    monkeypatch.setattr("ase_gffmerge.sampling.temperature_ladder.SEGMENT", 50.0)
    few, many = (
        sample_frames(springs, [CO], SampleOptions(**{**FAST, "time": 2.0, "n": n, "relax": False}))
        for n in (4, 40)
    )
    assert (len(few.frames), len(many.frames)) == (4, 40)
    assert few.simulated_ps < many.simulated_ps < 4 * 2.0


def test_cooling_reaches_the_minimum(springs):
    start = CO.copy()
    start.positions *= 1.2
    options = SampleOptions(**{**FAST, "temperatures": (0.0,), "n": 1, "rattled": 0.0})
    (frame,) = sample_frames(springs, [start], options).frames
    np.testing.assert_allclose(frame.get_distance(0, 1), 0.76 + 0.66, atol=1e-3)


def test_a_time_shorter_than_the_equilibration_gives_frames(springs):
    short = SampleOptions(**{**FAST, "n": 2, "time": 0.02, "equilibration": 0.05, "rattled": 0.0})
    assert len(sample_frames(springs, [CO], short).frames) == 2


def test_what_breaks_is_counted_and_not_sampled():
    loose = ForceField(name="loose", potential=Bonded(stiffness=0.02))
    with pytest.raises(FramesError, match=r"'loose' gave no frames \(.* x bond broken\)"):
        sample_frames(
            loose, [WATER], SampleOptions(**{**FAST, "temperatures": (5000.0,), "equilibration": 0.25})
        )


def test_frames_beyond_the_grade_are_refused(springs):
    no_hydrogen = StoppingCriteria(grade=lambda graph: (graph.atomic_numbers == 1).double() * 3)
    result = sample_frames(springs, [CO, OH], SampleOptions(**FAST), criteria=no_hydrogen)
    assert result.rejected == {"extrapolation": 1}  # when it was cooled
    assert {str(atoms.symbols) for atoms in result.frames} == {"CO"}


def test_crystals(springs):
    chain = Atoms("COCO", [[1.4 * k, 0, 0] for k in range(4)], cell=[5.6, 7, 7], pbc=True)
    result = sample_frames(springs, [chain], SampleOptions(**{**FAST, "temperatures": (100.0,), "time": 0.5}))
    cells = {
        source: [a.cell.array for a in result.frames if a.info["source"] == source]
        for source in ("md", "rattled")
    }
    assert all(atoms.pbc.all() for atoms in result.frames)
    assert all((cell == chain.cell.array).all() for cell in cells["md"])
    assert not any(np.allclose(cell, chain.cell.array) for cell in cells["rattled"])
    wrapped = [
        atoms.get_scaled_positions(wrap=False) for atoms in result.frames if atoms.info["source"] == "md"
    ]
    assert np.min(wrapped) > -1e-6
    assert np.max(wrapped) < 1


def test_unknown_options_get_a_suggestion():
    with pytest.raises(RecipeError, match="did you mean 'temperatures'"):
        validated(SampleOptions, {"temperature": 300}, source="sample")


def test_conditioned_potentials_have_no_surface_to_sample(springs):
    springs.potential.hyper = type(springs.potential.hyper)(cutoff=4.0, n_embeddings=2)
    with pytest.raises(FramesError, match="sample each specialist"):
        sample_frames(springs, [WATER])
