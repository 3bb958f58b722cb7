"""The benchmark of fine-tuning on a handful of frames: it runs through, resumes, and says what it measured."""

import json
import sys

import numpy as np
import pytest

from ase_gffmerge.data.readers import read_frames
from ase_gffmerge.forcefield.force_field import bundled_test_frames


@pytest.fixture
def benchmark(script, monkeypatch):
    module = script("benchmark_finetuning")
    size = module.Size(
        frames=(2, 4), rates=(1e-4, 2e-4, 1e-3, 2e-3), steps=2, long_steps=4, batch_size=4, tests=3
    )
    monkeypatch.setattr(module, "FULL", size)
    monkeypatch.setattr(module, "MERGES", {"mean": "mean"})
    monkeypatch.setattr(module, "STARTS", ("mean", "base"))
    monkeypatch.setattr(module, "LONG_STARTS", ("base",))
    monkeypatch.setattr(
        module, "read_frames", lambda path: bundled_test_frames(f"rmd17-{path.name.split('_')[1]}")
    )
    return module


def run(module, monkeypatch, capsys, *arguments) -> str:
    monkeypatch.setattr(sys, "argv", ["benchmark", "data", *map(str, arguments)])
    module.main()
    return capsys.readouterr().out


def test_labels_are_no_test_frames_and_nested(benchmark, tmp_path) -> None:
    bench = benchmark.open_bench(tmp_path, tmp_path, benchmark.FULL)
    for pool, tests in zip(bench.pool, bench.tests, strict=True):
        assert not {a.positions.tobytes() for a in pool} & {a.positions.tobytes() for a in tests}
    few, more = (
        [atoms.positions for path in bench.labels(n, 0) for atoms in read_frames(path)] for n in (2, 4)
    )
    assert all(any(np.allclose(one, other) for other in more) for one in few)
    assert len(more) == 2 * len(few) == 8


@pytest.mark.slow
def test_table_and_curves(benchmark, monkeypatch, capsys, tmp_path) -> None:
    document = json.loads(run(benchmark, monkeypatch, capsys, "--out", tmp_path, "--json"))
    made = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json")}
    markdown = run(benchmark, monkeypatch, capsys, "--out", tmp_path)
    assert made == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json")}
    assert set(document["fine_tuned"]) == set(document["starts"]) == {"mean", "base"}
    for kind, by_frames in document["fine_tuned"].items():
        start = document["starts"][kind]
        for n, found in by_frames.items():
            (one,) = found["runs"]
            assert one["frames"] == int(n)
            assert one["curve"][0] == {"steps": 0, **start}
            assert [row["steps"] for row in one["curve"]] == sorted({row["steps"] for row in one["curve"]})
            others = [json.loads(p.read_text()) for p in (tmp_path / "runs").glob(f"{kind}-{n}-*-2-0.json")]
            assert len(others) == 3
            assert {2e-4, 1e-3, found["rate"]} <= {run["rate"] for run in others}
            last = [benchmark.mean_error(run["curve"][-1]) for run in others]
            assert benchmark.mean_error(one["curve"][-1]) == min(last)
    assert document["long"]["base"]["curve"][-1]["steps"] == 4
    assert (tmp_path / "curves.png").stat().st_size > 0
    assert markdown.startswith("| start ")
