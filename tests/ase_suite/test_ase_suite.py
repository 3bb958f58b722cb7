"""Contract, point 19: ASE's own tests pass with a merged force field in the place of EMT."""

import json
import os
import subprocess
import sys
from pathlib import Path

import ase.test
import pytest

HERE, ROOT = Path(__file__).parent, Path(ase.test.__path__[0])
FILES = tuple(
    f"{folder}test_{name}.py"
    for folder, names in {
        "md/": "CO2linear_Au111_langevin bussi ce_curvature ce_potentiostat langevin_asapcompat langevin_com md "
        "md_stepwise rng",
        "filter/": "filter strain_emt",
        "neb/": "COCu111 COCu111_2 dynamic_neb neb shared_calculator_neb",
        "constraints/": "CO2linear_Au111 external_force fixbondlength_CO2_Au111 fixcom fixedline_fixedplane fixinternals "
        "fixscaled fixsubsetcom hookean hookean_pbc mirror parameteric_constr",
        "calculator/": "fd traj harmonic ts09",
        "fio/": "extxyz pickle_bundle_trajectory trajectory xyz",
        "vibrations/": "pickle2json vibrations_example",
        "atoms/": "h2",
        "cell/": "supercell",
        "": "checkpoint forcecurve issue276 linesearch_maxstep loggingcalc mixingcalc phonons potential_energies "
        "singlepointcalc",
    }.items()
    for name in names.split()
)
"""Files whose tests hold for any sensible potential; those left out compare with numbers that are EMT's alone, need programs
that are not there (asap3, spglib), or take minutes."""
PASSED = 80
"""Tests of these files that passed, with evaluations, when this list was made (ASE 3.29)."""
TIMEOUT = 900  # s, on a slow and busy machine; half a minute is usual


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
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=TIMEOUT, check=False
    )
    assert report.exists(), done.stdout + done.stderr
    return [json.loads(line) for line in report.read_text().splitlines()]


def test_19_ase_own_tests_pass(reports: list[dict]) -> None:
    evaluated = [entry for entry in reports if entry["evaluations"]]
    assert [entry["test"] for entry in evaluated if entry["outcome"] == "failed"] == []
    assert sum(entry["outcome"] == "passed" for entry in evaluated) >= PASSED
