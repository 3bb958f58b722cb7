"""Packages that compute properties with any ASE calculator take this one: what their page shows, and processes of theirs."""

from pathlib import Path

import pytest
from ase.build import bulk

from ase_gffmerge import GFFMergeCalculator
from helpers.page_blocks import Page

matcalc = pytest.importorskip("matcalc")
pytest.importorskip("janus_core")
pytestmark = pytest.mark.filterwarnings("ignore")


def test_the_page_runs(tmp_path: Path, full_merge_cache) -> None:
    Page("docs/how_to/workflows.md").run(tmp_path, full_merge_cache)
    assert list(tmp_path.iterdir()) == []


def test_matcalc_hands_the_calculator_to_its_processes() -> None:
    calc = GFFMergeCalculator("emt-copper", dtype="float64", device="cpu")
    crystals = [bulk("Cu", a=a) for a in (3.57, 3.6)]
    property_calc = matcalc.EOSCalc(calc, max_abs_strain=0.015, fmax=1e-3)
    moduli = [found["bulk_modulus_bm"] for found in property_calc.calc_many(crystals, n_jobs=2)]
    assert moduli[0] == pytest.approx(moduli[1], rel=1e-3)
