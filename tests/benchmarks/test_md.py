"""The benchmark of dynamics measures what it says; its full run takes an hour and is not part of the tests."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

from ase_gffmerge import ForceField
from ase_gffmerge.evaluation.md.runs import Protocol
from ase_gffmerge.merging.recipe import TrajectoryOptions

SCRIPT = Path(__file__).parents[2] / "md_examples" / "benchmarks" / "benchmark_md.py"


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_md", SCRIPT)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_own_trajectories_of_a_specialist_agree_with_itself(benchmark: ModuleType) -> None:
    pair = [ForceField.load(name, dtype=torch.float32) for name in benchmark.NAMES]
    tests = [benchmark.reference_frames(molecule, None)[:5] for molecule in benchmark.MOLECULES]
    brief = TrajectoryOptions(time=0.02, replicas=1, max_grade=None)
    found = benchmark.own_trajectories(pair[0], pair, tests, brief)
    itself, other = (found[name] for name in benchmark.NAMES)
    assert itself["disagreement"]["force_mae"] < 1e-4
    assert itself["merged_on_tests"] == itself["specialist_on_tests"] < 0.05
    assert other["merged_on_tests"] > 5 * other["specialist_on_tests"]


def test_one_molecule_side_by_side(benchmark: ModuleType, tmp_path: Path) -> None:
    same = ForceField.load("rmd17-ethanol", dtype=torch.float32)
    protocol = Protocol(picoseconds=0.04, seeds=1)
    found = benchmark.compare_dynamics("ethanol", same, protocol=protocol, data=None, out=tmp_path).to_dict()
    specialist, merged = found["models"]["specialist"], found["models"]["merged"]
    assert specialist == merged
    assert specialist["stability_time"] == pytest.approx([0.04])
    assert merged["h_mae_to_first"] == 0
    assert specialist["force_mae"] < 0.05
    assert len(list((tmp_path / "runs").iterdir())) == 2
