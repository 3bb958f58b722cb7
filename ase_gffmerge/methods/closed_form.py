"""Merging by least-squares problems, layer by layer: this package's method, and the published one."""

from ase_gffmerge.methods.base import Mixture, Need, Outcome, Progress, register
from ase_gffmerge.methods.mean import merge_by_recipe


@register("paper", citation="GffMerge, arXiv 2606.03232", needs=(Need.FRAMES,), merges=True)
def paper(mixture: Mixture, progress: Progress) -> Outcome:
    """The published method: every layer solved on the specialists' own activations."""
    return merge_by_recipe(mixture, "paper", progress=progress)


@register("gffmerge", citation="this package, after arXiv 2606.03232", needs=(Need.FRAMES,), merges=True)
def gffmerge(mixture: Mixture, progress: Progress) -> Outcome:
    """The default recipe of this package."""
    return merge_by_recipe(mixture, "gffmerge", progress=progress)
