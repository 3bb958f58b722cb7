"""Methods that train: distillation on the specialists' predictions, and joint training on their labels."""

import warnings

from ase_gffmerge.errors import MergeWarning
from ase_gffmerge.merging.distil_options import DistilOptions
from ase_gffmerge.merging.recipe import Recipe
from ase_gffmerge.methods.base import Mixture, Need, Outcome, Progress, register
from ase_gffmerge.training.joint import FINE_TUNING, train_jointly
from ase_gffmerge.workflows.merge_and_distill import merge_and_refine


@register(
    "distill",
    citation="this package; features after Ekström Kelvinius et al., arXiv 2306.14818",
    needs=(Need.FRAMES,),
    trains=True,
    merges=True,
)
def distill(mixture: Mixture, progress: Progress) -> Outcome:
    """Closed-form merge, then label-free distillation."""
    options = DistilOptions()
    recipe = Recipe(refine=options, allow_unrelated=True, allow_mixed_theory=True, allow_identical=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MergeWarning)
        merged, _ = merge_and_refine(mixture.specialists, recipe, device=mixture.device, progress=progress)
    settings = {"epochs": merged.provenance.epochs, "learning rate": options.learning_rate}
    return Outcome(potentials=(merged.potential,), settings=settings)


@register(
    "joint",
    citation="the reference: training on all labels",
    needs=(Need.BASE, Need.LABELS),
    trains=True,
)
def joint(mixture: Mixture, progress: Progress) -> Outcome:
    """Fine-tune the common base on all labelled frames, as a specialist is fine-tuned on its own."""
    assert mixture.base is not None
    assert mixture.labelled is not None
    config = FINE_TUNING
    potential, _ = train_jointly(
        mixture.base,
        mixture.labelled,
        config,
        device=mixture.device,
        callback=lambda epoch, losses: progress(epoch / config.epochs, f"epoch {epoch}/{config.epochs}"),
    )
    settings = {"epochs": config.epochs, "learning rate": config.learning_rate}
    return Outcome(potentials=(potential,), settings=settings)
