"""Recipes of ``merge`` as methods."""

import pytest
import torch

from ase_gffmerge import merge
from ase_gffmerge.errors import MergeWarning
from ase_gffmerge.methods import METHODS, MergeInputs
from ase_gffmerge.runtime.progress import no_progress


def run(name: str, merge_inputs: MergeInputs):
    return METHODS[name].run(merge_inputs, no_progress)


@pytest.mark.parametrize("preset", ["mean", "paper", "gffmerge"])
@pytest.mark.filterwarnings("ignore::ase_gffmerge.errors.MergeWarning")
def test_a_method_is_the_merge_by_its_recipe(make_merge_inputs, preset) -> None:
    merge_inputs = make_merge_inputs("painn", 2)
    ours, (theirs, _) = (
        run(preset, merge_inputs).potential(0),
        merge(merge_inputs.specialists, preset, base=merge_inputs.base),
    )
    for key, value in theirs.potential.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value)


def test_a_bad_merge_is_compared_without_a_warning(make_merge_inputs) -> None:
    """Warnings are errors here: one that a method let through would fail the test."""
    merge_inputs = make_merge_inputs("painn", 2, size=0.3)
    with pytest.warns(MergeWarning, match="failed"):
        merge(merge_inputs.specialists, "paper")
    run("paper", merge_inputs)
