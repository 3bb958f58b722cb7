"""Methods that train: distillation on the specialists' predictions, and joint training on their labels."""

import warnings

from ase_gffmerge.errors import MergeWarning
from ase_gffmerge.merging.recipe import DistillOptions, Recipe
from ase_gffmerge.methods.base import MergeInputs, MergeOutput, Requirement, method
from ase_gffmerge.runtime.progress import Progress
from ase_gffmerge.training.joint import FINE_TUNING, train_jointly
from ase_gffmerge.workflows.merge import merge


@method(
    "distill",
    citation="this package; features after Ekström Kelvinius et al., arXiv 2306.14818",
    needs=(Requirement.FRAMES,),
    trains=True,
    merges=True,
)
def distill(merge_inputs: MergeInputs, progress: Progress) -> MergeOutput:
    """Closed-form merge, then label-free distillation."""
    options = DistillOptions()
    recipe = Recipe(refine=options, allow_unrelated=True, allow_mixed_theory=True, allow_identical=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MergeWarning)
        merged, _ = merge(merge_inputs.specialists, recipe, device=merge_inputs.device, progress=progress)
    settings = {"epochs": merged.provenance.epochs, "learning rate": options.learning_rate}
    return MergeOutput(potentials=(merged.potential,), settings=settings)


@method(
    "joint",
    citation="the reference: training on all labels",
    needs=(Requirement.BASE, Requirement.LABELS),
    trains=True,
)
def joint(merge_inputs: MergeInputs, progress: Progress) -> MergeOutput:
    """Fine-tune the common base on all labelled frames, as a specialist is fine-tuned on its own."""
    assert merge_inputs.base is not None
    assert merge_inputs.labelled is not None
    config = FINE_TUNING
    potential, _ = train_jointly(
        merge_inputs.base,
        merge_inputs.labelled,
        config,
        device=merge_inputs.device,
        callback=lambda epoch, losses: progress(epoch / config.epochs, f"epoch {epoch}/{config.epochs}"),
    )
    settings = {"epochs": config.epochs, "learning rate": config.learning_rate}
    return MergeOutput(potentials=(potential,), settings=settings)
