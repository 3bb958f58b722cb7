"""The benchmark of dynamics measures what it says; its full run takes an hour and is not part of the tests."""

import importlib.util
from pathlib import Path

import pytest
import torch

from ase_gffmerge import Specialist
from ase_gffmerge.evaluation.md_protocol import Protocol

SCRIPT = Path(__file__).parents[1] / "md_examples" / "benchmark_md.py"


def test_one_molecule_side_by_side(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("benchmark_md", SCRIPT)
    assert spec
    assert spec.loader
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    same = Specialist.load("rmd17-ethanol", dtype=torch.float32)
    protocol = Protocol(picoseconds=0.04, seeds=1)
    found = benchmark.compare_dynamics("ethanol", same, protocol=protocol, data=None, out=tmp_path).to_dict()
    specialist, merged = found["models"]["specialist"], found["models"]["merged"]
    assert specialist == merged
    assert specialist["stability_time"] == pytest.approx([0.04])
    assert merged["h_mae_to_first"] == 0
    assert specialist["force_mae"] < 0.05
    assert len(list((tmp_path / "runs").iterdir())) == 2
