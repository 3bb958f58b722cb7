"""The benchmark of distillation on a handful of frames: it runs through, resumes, and says what it measured."""

import json
import sys

import pytest

from ase_gffmerge.forcefield.force_field import ForceField, bundled_test_frames
from ase_gffmerge.merging.recipe import DistillOptions

QUICK = DistillOptions(epochs=2, copies=1, temperature=0.0)


@pytest.fixture
def benchmark(script, monkeypatch):
    module = script("benchmark_distillation")
    size = module.Size(
        labelled=6, tests=3, glances=2, epochs=2, shares=(0.5, 1.0), frames=(3,), frames_share=0.5
    )
    monkeypatch.setattr(module, "FULL", size)
    monkeypatch.setattr(module, "DistillOptions", lambda: QUICK)
    monkeypatch.setattr(
        module, "read_frames", lambda path: bundled_test_frames(f"rmd17-{path.name.split('_')[1]}")
    )
    load = ForceField.load

    def with_few_frames(name: str) -> ForceField:
        specialist = load(name)
        return specialist.with_calibration(specialist.calibration[:4])

    monkeypatch.setattr(module.ForceField, "load", with_few_frames)
    return module


def run(module, monkeypatch, capsys, *arguments) -> str:
    monkeypatch.setattr(sys, "argv", ["benchmark", "data", *map(str, arguments)])
    module.main()
    return capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.nightly
def test_table_and_curves(benchmark, monkeypatch, capsys, tmp_path) -> None:
    document = json.loads(run(benchmark, monkeypatch, capsys, "--out", tmp_path, "--json"))
    made = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.json")}
    markdown = run(benchmark, monkeypatch, capsys, "--out", tmp_path)
    assert made == {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.json")}
    runs = document["runs"]
    assert set(runs) == {"joint"} | {
        f"{kind}-{x}" for kind in benchmark.STARTS for x in ("0.5", "1", "3frames")
    }
    joint, longest = runs["joint"], runs["merged-1"]
    assert [row["epoch"] for row in joint["curve"]] == [1, 2]
    assert document["time_share"] == pytest.approx(longest["seconds"] / joint["seconds"])
    for name in benchmark.NAMES:
        assert document["ratio"][name] == pytest.approx(longest["force_mae"][name] / joint["force_mae"][name])
        assert longest["force_mae"][name] < runs["base-0.5"]["start"]["force_mae"][name]
    assert set(document["ahead"]) == {"0.5", "1", "3frames"}
    assert len(markdown.strip().splitlines()) == 3 + len(runs)
    assert longest["start"]["seconds"] < longest["seconds"]
    assert set(document["others_at_equal_seconds"]) == {"mean", "base"}
    assert (tmp_path / "table.md").read_text() == markdown
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_interrupted_joint_training_goes_on(benchmark, monkeypatch, tmp_path) -> None:
    bench = benchmark.open_bench(tmp_path, tmp_path, benchmark.FULL)
    whole = benchmark.joint(bench)
    for path in tmp_path.iterdir():
        path.unlink()
    original, calls = bench.errors, []

    class Stop(Exception):
        pass

    def stopping(self, potential, *, n=None):
        calls.append(n)
        if len(calls) == 2:
            raise Stop
        return original(potential, n=n)

    with monkeypatch.context() as patch:
        patch.setattr(benchmark.Bench, "errors", stopping)
        with pytest.raises(Stop):
            benchmark.joint(bench)
    resumed = benchmark.joint(bench)
    assert resumed["force_mae"] == whole["force_mae"]


def test_shorter_runs_take_their_share_of_steps(benchmark) -> None:
    options = DistillOptions(epochs=4, copies=19)
    for share, n in ((1.0, 100), (0.5, 100), (0.125, 100), (0.25, 25), (0.25, 400)):
        shorter = benchmark.shortened(options, share, n, 100)
        assert n * (1 + shorter.copies) * shorter.epochs == pytest.approx(share * 100 * 20 * 4)


def test_errors_at_equal_seconds_are_interpolated(script) -> None:
    module = script("benchmark_distillation")

    def run(seconds: float, error: float) -> dict:
        return {"seconds": seconds, "force_mae": {"a": error, "b": error}}

    runs = {"mean-1": run(100, 0.01), "mean-0.25": run(25, 0.04), "mean-0.5": run(50, 0.02)}
    runs |= {"merged-1": run(120, 0.01), "merged-0.5": run(70, 0.01), "merged-0.25": run(30, 0.1 / 3)}
    found = module.at_equal_seconds((0.25, 0.5, 1.0), runs, "mean")
    assert found == pytest.approx({"0.25": 1.0, "0.5": 100 / 70})


def test_a_pause_does_not_count(script, monkeypatch) -> None:
    module = script("benchmark_distillation")
    clock = iter([0.0, 5.0, 5.0, 6.0, 9.0, 10.0])
    monkeypatch.setattr(module.time, "process_time", lambda: next(clock))
    watch = module.Stopwatch(started=module.time.process_time())
    assert watch.pause(lambda: watch.seconds) == 6.0, "5 s until the pause, and 1 s within it"
    assert watch.seconds == 6.0
