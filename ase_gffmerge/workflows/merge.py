"""The one entry to merging: everything that a recipe says, the closed loop and the distillation included."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from ase_gffmerge.data.frames import evenly
from ase_gffmerge.errors import MergeWarning
from ase_gffmerge.forcefield.force_field import ForceField
from ase_gffmerge.merging.merge import closed_form_merge
from ase_gffmerge.merging.recipe import DistillOptions, Recipe, load_recipe
from ase_gffmerge.merging.report import MergeReport
from ase_gffmerge.runtime.progress import Progress, no_progress, part_of
from ase_gffmerge.training.distill import distill
from ase_gffmerge.training.loop import Callback
from ase_gffmerge.workflows.active_learning import closed_loop

MERGE_SHARE = 0.1
"""Fraction of the progress bar that belongs to the merge where a distillation follows."""


def merge(
    specialists: Sequence[ForceField],
    recipe: str | Path | Recipe | Mapping[str, object] = "gffmerge",
    *,
    device: str | torch.device = "auto",
    progress: Progress = no_progress,
) -> tuple[ForceField, MergeReport]:
    """Merge specialists into one force field by solving least-squares problems.

    Where the recipe has ``closed_loop``, the merge is repeated with frames that the merged potential visits by itself; where
    it has ``refine``, the result is distilled.

    Parameters
    ----------
    specialists
        At least two, with calibration frames, fine-tuned from a common base. They are not changed.
    recipe
        ``gffmerge`` (default), ``paper``, ``mean``, a YAML file, a mapping or a :class:`.Recipe`.
    device
        Where to compute.
    progress
        Called with a fraction (0 to 1) and a description.

    Returns
    -------
    merged : ForceField
        A force field with ``merged`` set; save it with :meth:`.ForceField.save`.
    report : MergeReport
        Of the final potential.

    Raises
    ------
    IncompatibleSpecialistsError, FramesError, RecipeError, DeviceError, DeviceMemoryError, TrainingError
        With the reason and the remedy.
    """
    recipe = load_recipe(recipe)
    if recipe.refine is None:
        return _merged(specialists, recipe, device=device, progress=progress)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MergeWarning)
        given, plain = starting_point(specialists, recipe)
        start, _ = _merged(given, plain, device=device, progress=part_of(progress, 0.0, MERGE_SHARE))
    progress(MERGE_SHARE, "the specialists label their frames")
    callback = _after_epoch(part_of(progress, MERGE_SHARE, 1.0), recipe.refine.epochs)
    distilled, _ = distill(start, specialists, recipe.refine, device=device, callback=callback)
    assert distilled.merged is not None
    return distilled, MergeReport.from_dict(distilled.merged.report)


def _merged(
    specialists: Sequence[ForceField], recipe: Recipe, *, device: str | torch.device, progress: Progress
) -> tuple[ForceField, MergeReport]:
    """Merge once, or in the loop that the recipe asks for."""
    if recipe.closed_loop is None:
        return closed_form_merge(specialists, recipe, device=device, progress=progress)
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


def _after_epoch(progress: Progress, epochs: int) -> Callback:
    def report(epoch: int, losses: dict[str, float]) -> None:
        progress(epoch / epochs, f"distilling, epoch {epoch}, {1000 * losses['force_mae']:.0f} meV/Å")

    return report
