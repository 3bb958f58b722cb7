"""Splits: no leak across parts, shares kept, calibration frames reproducible."""

import numpy as np
import pytest
from ase import Atoms
from hypothesis import given, settings
from hypothesis import strategies as st

from ase_gffmerge.data.frames import calibration_frames, time_block_split
from ase_gffmerge.errors import FramesError


def test_the_default_on_a_thousand_frames() -> None:
    split = time_block_split(1000)
    sizes = [part.size for part in (split.train, split.validation, split.test)]
    assert sum(sizes) >= 800
    assert sizes[0] > 400
    assert min(sizes[1:]) >= 160
    blocks = {int(i) // 100 for i in split.train}
    assert max(np.diff(sorted(blocks))) <= 3  # interleaved: training frames from all of the trajectory


@settings(max_examples=100, deadline=None)
@given(n=st.integers(60, 2000), n_blocks=st.integers(3, 20), gap=st.integers(0, 30), test=st.floats(0.1, 0.4))
def test_parts_never_come_closer_than_the_gap(n: int, n_blocks: int, gap: int, test: float) -> None:
    fractions = (0.9 - test, 0.1, test)
    try:
        split = time_block_split(n, n_blocks=n_blocks, gap=gap, fractions=fractions)
    except FramesError:
        return
    parts = [split.train, split.validation, split.test]
    for i, a in enumerate(parts):
        assert a.size
        assert np.all(np.diff(a) > 0)
        assert a[0] >= 0
        assert a[-1] < n
        for b in parts[i + 1 :]:
            assert np.abs(a[:, None] - b[None, :]).min() > gap


def test_without_gap_nothing_is_lost_and_shares_hold() -> None:
    split = time_block_split(1000, n_blocks=100, gap=0, fractions=(0.7, 0.1, 0.2))
    assert [p.size for p in (split.train, split.validation, split.test)] == [700, 100, 200]
    whole = np.concatenate([split.train, split.validation, split.test])
    np.testing.assert_array_equal(np.sort(whole), np.arange(1000))


def test_a_share_of_nothing_is_empty() -> None:
    split = time_block_split(100, gap=2, fractions=(0.5, 0.0, 0.5))
    assert split.validation.size == 0
    assert split.train.size
    assert split.test.size


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"n": 5}, "cannot be split into 10 blocks"),
        ({"n": 100, "gap": -1}, "gap of -1"),
        ({"n": 100, "n_blocks": 0}, "0 blocks"),
        ({"n": 100, "fractions": (0.5, 0.2, 0.2)}, "add up to 1"),
        ({"n": 100, "fractions": (1.2, -0.2, 0.0)}, "add up to 1"),
        ({"n": 100, "gap": 50}, "leave a part without frames"),
        ({"n": 100, "n_blocks": 2}, "leave a part without frames"),
    ],
)
def test_impossible_splits(kwargs: dict, message: str) -> None:
    with pytest.raises(FramesError, match=message):
        time_block_split(kwargs.pop("n"), **kwargs)


@given(n=st.integers(1, 30), seed=st.integers(0, 1000))
def test_calibration_frames_are_different_reproducible_and_in_order(n: int, seed: int) -> None:
    frames = [Atoms("H", positions=[[i, 0, 0]]) for i in range(30)]
    chosen = [int(a.positions[0, 0]) for a in calibration_frames(frames, n, seed=seed)]
    assert chosen == sorted(set(chosen))
    assert len(chosen) == n
    assert chosen == [int(a.positions[0, 0]) for a in calibration_frames(frames, n, seed=seed)]


def test_calibration_frames_depend_on_the_seed_and_refuse_too_many() -> None:
    frames = [Atoms("H", positions=[[i, 0, 0]]) for i in range(30)]
    assert calibration_frames(frames, 5, seed=0) != calibration_frames(frames, 5, seed=1)
    for n in (0, 31):
        with pytest.raises(FramesError, match=f"cannot choose {n} calibration frames out of 30"):
            calibration_frames(frames, n, seed=0)
