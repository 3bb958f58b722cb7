"""The report names every parameter that no solve reached."""

import pytest

from ase_gffmerge import merge
from ase_gffmerge.merging.average import averaged_parameters, mean_potential
from ase_gffmerge.merging.recipe import load_recipe
from ase_gffmerge.merging.report_plot import save_html

pytestmark = pytest.mark.filterwarnings("ignore::ase_gffmerge.errors.MergeWarning")
QUICK = {"preset": "closed-form", "readout": None, "directions": 0, "select": False}


def test_averaged_parameters_are_the_mean_and_all_others_moved(family, architecture, tmp_path):
    pair = family(architecture, 2, size=0.2)
    merged, report = merge(pair, QUICK)
    mean = dict(mean_potential(pair, load_recipe(QUICK)).named_parameters())
    same = {name for name, value in merged.potential.named_parameters() if value.equal(mean[name])}
    assert set(report.averaged) == same
    assert "embedding" in same
    assert "as in the starting point, as no solve covers them: embedding" in report.summary()
    assert (
        "As in the starting point, as no solve covers them: embedding"
        in save_html(merged, tmp_path / "r.html").read_text()
    )


def test_the_mean_says_nothing_of_it(family, architecture):
    _, report = merge(family(architecture, 2), "mean")
    assert report.averaged == ()
    assert "starting point" not in report.summary()


def test_without_messages_norms_are_averaged(family):
    """Their scale and shift move with the output of a whole stage alone."""
    (first, *_) = family("painn", 2)
    names = {
        recipe: averaged_parameters(first.potential, load_recipe(recipe)) for recipe in ("gffmerge", "paper")
    }
    assert set(names["gffmerge"]) <= set(names["paper"])
