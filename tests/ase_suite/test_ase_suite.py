"""Contract, point 19: ASE's own tests pass with a merged force field in the place of EMT."""

import json
import os
import subprocess
import sys
from pathlib import Path

import ase.test
import pytest

HERE, ROOT = Path(__file__).parent, Path(ase.test.__path__[0])
FILES = (
    "md/test_bussi.py",
    "md/test_langevin_com.py",
    "md/test_md.py",
    "md/test_rng.py",
    "filter/test_strain_emt.py",
    "neb/test_neb.py",
    "neb/test_shared_calculator_neb.py",
)
PASSED = 11
"""Tests of these files that passed, with evaluations, when this list was made (ASE 3.29)."""


@pytest.fixture(scope="module")
def reports(tmp_path_factory, merge_cache: Path) -> list[dict]:
    """Outcome and evaluations of every test, from one process."""
    folder = tmp_path_factory.mktemp("ase-suite")
    (folder / "empty.ini").write_text("[pytest]\n")
    report = folder / "report.jsonl"
    environment = {
        **os.environ,
        "PYTHONPATH": str(HERE),
        "EMT_IS_GFFMERGE_REPORT": str(report),
        "GFFMERGE_CACHE": str(merge_cache),
        "OMP_NUM_THREADS": "1",
    }
    options = [
        "-q",
        "-p",
        "emt_is_gffmerge",
        "-p",
        "no:cacheprovider",
        "-c",
        folder / "empty.ini",
        "--rootdir",
        ROOT,
    ]
    command = [sys.executable, "-m", "pytest", *options, *(ROOT / file for file in FILES)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert report.exists(), done.stdout + done.stderr
    return [json.loads(line) for line in report.read_text().splitlines()]


def test_19_ase_own_tests_pass(reports: list[dict]) -> None:
    evaluated = [entry for entry in reports if entry["evaluations"]]
    assert [entry["test"] for entry in evaluated if entry["outcome"] == "failed"] == []
    assert sum(entry["outcome"] == "passed" for entry in evaluated) >= PASSED
