"""Merge and, where the recipe asks for it, merge in a closed loop and distil: what loading several specialists does."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ase_gffmerge.data.frames import evenly
from ase_gffmerge.errors import MergeWarning
from ase_gffmerge.forcefield.force_field import ForceField
from ase_gffmerge.merging.distill_options import DistillOptions
from ase_gffmerge.merging.merge import merge
from ase_gffmerge.merging.recipe import Recipe, load_recipe
from ase_gffmerge.merging.report import MergeReport
from ase_gffmerge.runtime.progress import Progress, no_progress
from ase_gffmerge.training.distill import distill
from ase_gffmerge.training.loop import Callback
from ase_gffmerge.workflows.active_learning import closed_loop

MERGE_SHARE = 0.1
"""Fraction of the progress bar that belongs to the merge."""


def merge_and_refine(
    specialists: Sequence[ForceField],
    recipe: str | Path | Recipe | dict[str, Any] = "gffmerge",
    *,
    device: str | torch.device = "auto",
    progress: Progress | None = None,
) -> tuple[ForceField, MergeReport]:
    """Merge specialists, in a closed loop if the recipe has ``closed_loop``, and distil the result if it has ``refine``.

    Parameters
    ----------
    specialists, recipe, device, progress
        As for :func:`~ase_gffmerge.merging.merge.merge`.

    Returns
    -------
    merged : ForceField
    report : MergeReport
        Of the final potential.

    Raises
    ------
    IncompatibleSpecialistsError, FramesError, RecipeError, DeviceError, TrainingError
        With the reason and the remedy.
    """
    recipe = load_recipe(recipe)
    if recipe.refine is None:
        return _merged(specialists, recipe, device=device, progress=progress)
    tell = progress or no_progress
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MergeWarning)
        start, _ = _merged(
            *starting_point(specialists, recipe),
            device=device,
            progress=lambda fraction, text: tell(MERGE_SHARE * fraction, text),
        )
    tell(MERGE_SHARE, "the specialists label their frames")
    distilled, _ = distill(
        start, specialists, recipe.refine, device=device, callback=_teller(tell, recipe.refine)
    )
    assert distilled.merged is not None
    return distilled, MergeReport.from_dict(distilled.merged.report)


def _merged(
    specialists: Sequence[ForceField],
    recipe: Recipe,
    *,
    device: str | torch.device,
    progress: Progress | None,
) -> tuple[ForceField, MergeReport]:
    """Merge once, or in the loop that the recipe asks for."""
    if recipe.closed_loop is None:
        return merge(specialists, recipe, device=device, progress=progress)
    result = closed_loop(specialists, recipe, device=device, progress=progress)
    return result.merged, result.report


def starting_point(specialists: Sequence[ForceField], recipe: Recipe) -> tuple[list[ForceField], Recipe]:
    """What the merge that a distillation starts from is made of.

    Returns
    -------
    specialists : list of ForceField
        With few of their calibration frames, or with all where the readout is to stay wide or a closed loop adds others.
    recipe : Recipe
        Without ``refine``, and with a plain readout unless it is to stay wide.
    """
    options = recipe.refine or DistillOptions()
    plain = recipe.model_copy(update={"refine": None, "readout": recipe.readout if options.widened else None})
    if options.widened or recipe.closed_loop is not None:
        return list(specialists), plain
    return [_with_few_frames(specialist, options.start_frames) for specialist in specialists], plain


def _with_few_frames(specialist: ForceField, n: int) -> ForceField:
    chosen = evenly(len(specialist.calibration), n)
    return specialist.with_calibration([specialist.calibration[k] for k in chosen])


def _teller(tell: Progress, options: DistillOptions) -> Callback:
    def after_epoch(epoch: int, losses: dict[str, float]) -> None:
        text = f"distilling, epoch {epoch}, {1000 * losses['force_mae']:.0f} meV/Å"
        tell(1 - (1 - MERGE_SHARE) * (1 - epoch / options.epochs), text)

    return after_epoch
