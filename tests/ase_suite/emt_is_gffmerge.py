"""A pytest plug-in that lets ASE's own tests evaluate a merged force field wherever they say ``EMT``.

The name is bound anew when the plug-in is imported, before any test module can import the original (``pytest_configure``
would be too late). Every test is written, with its outcome and the number of its evaluations, as a line of JSON to the file
named by ``EMT_IS_GFFMERGE_REPORT``: a test that evaluates nothing says nothing about the calculator.
"""

import json
import os
import signal
import warnings
from pathlib import Path

import ase.calculators.emt
import pytest

from ase_gffmerge import GFFMergeCalculator
from ase_gffmerge.errors import ExtrapolationWarning, MergeWarning

FOLDER = Path(__file__).parent
SPECIALISTS = [FOLDER / "emt-metals.safetensors", FOLDER / "emt-molecules.safetensors"]
LONGEST = 300  # s, of one test; 15 are usual
RECIPE = {
    "preset": "closed-form",
    "select": False,
    "readout": {"width": 16},
    "messages": False,
    "core_repulsion": "none",
}


def merged():
    """The two specialists merged, from the cache after the first time."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MergeWarning)  # how good the merge is does not matter here
        return GFFMergeCalculator(SPECIALISTS, recipe=RECIPE, dtype="float64", device="cpu").force_field


MERGED = merged()


class EMT(GFFMergeCalculator):
    """The merged force field under the name by which ASE's tests, files and databases know EMT."""

    evaluations = 0

    def __init__(self, **kwargs):  # EMT's own options, and those of todict()
        super().__init__(MERGED, dtype="float64", device="cpu")

    def _get_name(self):
        return "emt"

    def calculate(self, *args, **kwargs):
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", ExtrapolationWarning
            )  # ASE's structures are not the calibration frames
            super().calculate(*args, **kwargs)
        EMT.evaluations += 1


ase.calculators.emt.EMT = EMT


def too_long(signum, frame):
    raise TimeoutError(f"this test of ASE's takes more than {LONGEST} s")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """Let a test that hangs fail by its name, and the others go on."""
    EMT.evaluations = 0
    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(LONGEST)
    try:
        return (yield)
    finally:
        signal.alarm(0)


def pytest_runtest_logreport(report):
    if (report.when == "call" or report.failed) and (path := os.environ.get("EMT_IS_GFFMERGE_REPORT")):
        line = {"test": report.nodeid, "outcome": report.outcome, "evaluations": EMT.evaluations}
        with open(path, "a") as file:
            file.write(json.dumps(line) + "\n")
