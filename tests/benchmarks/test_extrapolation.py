"""The benchmark of the extrapolation grade, on bundled frames; its full run needs the rMD17 files."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from ase_gffmerge import ForceField
from ase_gffmerge.forcefield.force_field import bundled_test_frames
from ase_gffmerge.inference.errors import labels

SCRIPT = Path(__file__).parents[2] / "md_examples" / "benchmarks" / "benchmark_extrapolation.py"


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("benchmark_extrapolation", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_grade_ranks_the_errors_of_a_specialist(benchmark, tmp_path, capsys) -> None:
    """Inside: its own test frames; outside: those of another molecule, with DFT labels."""
    specialists = [ForceField.load(f"rmd17-{name}") for name in benchmark.INSIDE]
    force_field = specialists[0].with_extrapolation_grade()
    parts = {}
    for kind, name in (("inside", "rmd17-ethanol"), ("outside", "rmd17-malonaldehyde")):
        frames = bundled_test_frames(name)[:20]
        parts[name] = benchmark.measure(kind, frames, labels(frames).forces, force_field, specialists)
    result = benchmark.summary(parts)
    ranks = result["spearman"]["everything"]
    assert ranks["grades"]["frame_mean"] > 0.6
    assert ranks["disagreements"]["frame_mean"] > 0.6  # the other specialist is at home there
    beyond = {name: row["share_beyond_1"] for name, row in result["frames"].items()}
    assert beyond["rmd17-ethanol"] < 0.2
    assert beyond["rmd17-malonaldehyde"] == 1.0
    assert set(result["spearman"]) == {"inside", "outside", "inside + outside", "everything"}
    benchmark.show(result)
    assert "inside + outside" in capsys.readouterr().out
    benchmark.plot(parts, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_frame_values(benchmark) -> None:
    part = benchmark.Part("inside", np.array([1, 2]), np.array([3.0, 0.0, 4.0]), np.ones(3), np.ones(3))
    np.testing.assert_allclose(part.frame_errors(), [3.0, np.sqrt(8.0)])
    assert benchmark.median_error(part) == 3.0
