"""Merging by least-squares problems, layer by layer: this package's method, and the published one."""

from ase_gffmerge.methods.base import MergeInputs, MergeOutput, Requirement, method
from ase_gffmerge.methods.mean import merge_by_recipe
from ase_gffmerge.runtime.progress import Progress


@method("paper", citation="GffMerge, arXiv 2606.03232", needs=(Requirement.FRAMES,), merges=True)
def paper(merge_inputs: MergeInputs, progress: Progress) -> MergeOutput:
    """The published method: every layer solved on the specialists' own activations."""
    return merge_by_recipe(merge_inputs, "paper", progress=progress)


@method("gffmerge", citation="this package, after arXiv 2606.03232", needs=(Requirement.FRAMES,), merges=True)
def gffmerge(merge_inputs: MergeInputs, progress: Progress) -> MergeOutput:
    """The default recipe of this package."""
    return merge_by_recipe(merge_inputs, "gffmerge", progress=progress)
