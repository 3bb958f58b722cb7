"""Recipes of ``merge`` as methods."""

import pytest
import torch

from ase_gffmerge import merge
from ase_gffmerge.errors import MergeWarning
from ase_gffmerge.methods import METHODS, Mixture


def run(name: str, mixture: Mixture):
    return METHODS[name].run(mixture, lambda fraction, text: None)


@pytest.mark.parametrize("preset", ["mean", "paper", "gffmerge"])
@pytest.mark.filterwarnings("ignore::ase_gffmerge.errors.MergeWarning")
def test_a_method_is_the_merge_by_its_recipe(make_mixture, preset) -> None:
    mixture = make_mixture("painn", 2)
    ours, (theirs, _) = run(preset, mixture).potential(0), merge(mixture.specialists, preset)
    for key, value in theirs.potential.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value)


def test_a_bad_merge_is_compared_without_a_warning(make_mixture) -> None:
    """Warnings are errors here: one that a method let through would fail the test."""
    mixture = make_mixture("painn", 2, size=0.3)
    with pytest.warns(MergeWarning, match="failed"):
        merge(mixture.specialists, "paper")
    run("paper", mixture)
