"""The recipes of :func:`ase_gffmerge.merge` as methods: the mean, the published method, and this package's."""

import warnings

from ase_gffmerge.errors import MergeWarning
from ase_gffmerge.merging.recipe import PRESETS
from ase_gffmerge.methods.base import MergeInputs, MergeOutput, Requirement, method
from ase_gffmerge.runtime.progress import Progress
from ase_gffmerge.workflows.merge import merge


@method("mean", citation="Wortsman et al. (model soups), arXiv 2203.05482", merges=True)
def mean(merge_inputs: MergeInputs, progress: Progress) -> MergeOutput:
    """Mean of the weights, embedding rows in proportion to how often each specialist's frames have the element."""
    return _merge_by("mean", merge_inputs, progress)


@method("paper", citation="GffMerge, arXiv 2606.03232", needs=(Requirement.FRAMES,), merges=True)
def paper(merge_inputs: MergeInputs, progress: Progress) -> MergeOutput:
    """The published method: every layer solved on the specialists' own activations."""
    return _merge_by("paper", merge_inputs, progress)


@method(
    "closed-form", citation="this package, after arXiv 2606.03232", needs=(Requirement.FRAMES,), merges=True
)
def closed_form(merge_inputs: MergeInputs, progress: Progress) -> MergeOutput:
    """Least-squares problems alone, on all frames, with a wide readout."""
    return _merge_by("closed-form", merge_inputs, progress)


@method("gffmerge", citation="this package, after arXiv 2606.03232", needs=(Requirement.FRAMES,), merges=True)
def gffmerge(merge_inputs: MergeInputs, progress: Progress) -> MergeOutput:
    """The default recipe: solves on few frames, and label-free distillation where these do not suffice."""
    return _merge_by("gffmerge", merge_inputs, progress)


def _merge_by(preset: str, merge_inputs: MergeInputs, progress: Progress) -> MergeOutput:
    """Merge with a preset whatever the specialists, and silently: a comparison tells how good it is."""
    allowed = {"allow_unrelated": True, "allow_mixed_theory": True, "allow_identical": True}
    recipe = PRESETS[preset].model_copy(update=allowed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MergeWarning)
        merged, report = merge(
            merge_inputs.specialists,
            recipe,
            base=merge_inputs.base,
            device=merge_inputs.device,
            progress=progress,
        )
    kept = [trial.name for trial in report.trials if trial.kept]
    return MergeOutput(potentials=(merged.potential,), settings={"kept": ", ".join(kept)} if kept else {})
