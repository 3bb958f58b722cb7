"""The benchmark script measures what it says; its full run needs the rMD17 files and is not part of the tests."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from ase_gffmerge import ForceField
from ase_gffmerge.forcefield.force_field import bundled_test_frames
from ase_gffmerge.inference.errors import evaluate

SCRIPT = Path(__file__).parents[2] / "md_examples" / "benchmarks" / "benchmark_merge.py"


@pytest.fixture(scope="module")
def benchmark():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPT.parent)
        yield importlib.import_module("benchmark_merge")


@pytest.mark.filterwarnings("ignore::ase_gffmerge.errors.MergeWarning")
@pytest.mark.slow
@pytest.mark.nightly
def test_force_maes_of_the_bundled_pair_keep_their_order(benchmark, monkeypatch) -> None:
    """On 20 calibration frames each: the default recipe is far below the paper preset and the mean."""
    monkeypatch.setattr(benchmark, "RECIPES", ("mean", "paper", "gffmerge"))
    specialists = [ForceField.load(name) for name in benchmark.NAMES]
    tests = [bundled_test_frames(name) for name in benchmark.NAMES]
    few = [specialist.with_calibration(specialist.calibration[:20]) for specialist in specialists]
    result = benchmark.force_maes(few, tests)
    mae = result["force_mae"]
    for specialist, test in zip(specialists, tests):
        name = specialist.name
        assert mae["specialist"][name] == pytest.approx(evaluate(specialist.potential, test).force_mae)
        assert (
            mae["specialist"][name] < mae["gffmerge"][name] < 0.5 * min(mae["mean"][name], mae["paper"][name])
        )
        assert result["energy_mae"]["gffmerge"][name] < 0.1 * result["energy_mae"]["mean"][name]
    assert set(result["merge_seconds"]) == set(benchmark.RECIPES)


def test_help() -> None:
    shown = subprocess.run(
        [sys.executable, SCRIPT, "--help"], capture_output=True, text=True, check=True
    ).stdout
    assert "--nequip" in shown
