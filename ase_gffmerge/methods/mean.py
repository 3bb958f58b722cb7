"""The mean of the weights: the simplest merge, and the anchor of the closed-form solves."""

import warnings
from typing import Any

from ase_gffmerge.errors import MergeWarning
from ase_gffmerge.merging.merge import merge
from ase_gffmerge.methods.base import MergeInputs, MergeOutput, method
from ase_gffmerge.runtime.progress import Progress


def merge_by_recipe(merge_inputs: MergeInputs, preset: str, *, progress: Progress) -> MergeOutput:
    """Merge with one of :data:`~ase_gffmerge.merging.recipe.PRESETS`, silently: a comparison tells how good it is."""
    recipe: dict[str, Any] = {
        "preset": preset,
        "allow_unrelated": True,
        "allow_mixed_theory": True,
        "allow_identical": True,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MergeWarning)
        merged, _ = merge(merge_inputs.specialists, recipe, device=merge_inputs.device, progress=progress)
    return MergeOutput(potentials=(merged.potential,))


@method("mean", citation="Wortsman et al. (model soups), arXiv 2203.05482", merges=True)
def mean(merge_inputs: MergeInputs, progress: Progress) -> MergeOutput:
    """Mean of the weights, embedding rows in proportion to how often each specialist's frames have the element."""
    return merge_by_recipe(merge_inputs, "mean", progress=progress)
