"""The one entry to merging: everything that a recipe says, the closed loop and the distillation included."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ase_gffmerge.errors import MergeWarning, RecipeError
from ase_gffmerge.forcefield.force_field import ForceField
from ase_gffmerge.merging.merge import closed_form_merge
from ase_gffmerge.merging.recipe import DistillOptions, Recipe, load_recipe
from ase_gffmerge.merging.report import MergeReport
from ase_gffmerge.merging.selection import bundled_ancestor, check_ancestor
from ase_gffmerge.runtime.progress import Progress, no_progress, part_of
from ase_gffmerge.sampling.generic_frames import generic_frames
from ase_gffmerge.training.distill import distill
from ase_gffmerge.workflows.active_learning import closed_loop

MERGE_SHARE = 0.1
"""Fraction of the progress bar that belongs to the solves where a distillation follows."""


def merge(
    specialists: Sequence[ForceField],
    recipe: str | Path | Recipe | Mapping[str, object] = "gffmerge",
    *,
    base: ForceField | None = None,
    checkpoint: Path | None = None,
    device: str | torch.device = "auto",
    progress: Progress = no_progress,
) -> tuple[ForceField, MergeReport]:
    """Merge specialists into one force field: least-squares problems, then distillation where they do not suffice.

    Where the recipe has ``closed_loop``, the solves are repeated with frames that the merged potential visits by itself;
    where it has ``refine``, and held-out frames show more than its threshold, the result is distilled from the
    specialists' own predictions.

    Parameters
    ----------
    specialists
        At least two, with calibration frames, fine-tuned from a common base. They are not changed.
    recipe
        ``gffmerge`` (default), ``closed-form``, ``fast``, ``paper``, ``mean``, a YAML file, a mapping or a :class:`.Recipe`.
    base
        Their common ancestor, one of the starting points, and what ``keep_base`` keeps; default: the bundled model that
        their lineages name, if any.
    checkpoint
        File that a distillation rewrites after every epoch and continues from when the same call is made again; it is
        removed at the end.
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
    if base is not None:  # vendors' files do not say what they descend from
        check_ancestor(base, [s for s in specialists if s.provenance.lineage])
    if recipe.keep_base:
        return _with_base(specialists, recipe, base, checkpoint=checkpoint, device=device, progress=progress)
    if recipe.refine is None:
        return _solved(specialists, recipe, base=base, device=device, progress=progress)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", MergeWarning)
        start, report = _solved(
            specialists,
            without_refinement(recipe),
            base=base,
            device=device,
            progress=part_of(progress, 0.0, MERGE_SHARE),
        )
    if close_enough(report, recipe.refine):
        for warning in caught:
            warnings.warn(warning.message, warning.category, stacklevel=2)
        return _by_recipe(start, recipe), report
    merged, _ = distill(
        start,
        specialists,
        recipe.refine,
        checkpoint=checkpoint,
        device=device,
        progress=part_of(progress, MERGE_SHARE, 1.0),
    )
    if checkpoint:
        checkpoint.unlink(missing_ok=True)
    assert merged.merged is not None
    return _by_recipe(merged, recipe), MergeReport.from_dict(merged.merged.report)


def _with_base(
    specialists: Sequence[ForceField],
    recipe: Recipe,
    base: ForceField | None,
    *,
    checkpoint: Path | None,
    device: str | torch.device,
    progress: Progress,
) -> tuple[ForceField, MergeReport]:
    """Merge the specialists and their base, which has structures of many compounds for its calibration frames."""
    base = base or bundled_ancestor(specialists)
    if base is None:
        raise RecipeError(
            "keep_base keeps what the specialists' common base knew, and no bundled model is that base; give it as "
            "base=..., with --base FILE, or set keep_base to 0"
        )
    own = base.calibration
    kinds = {bool(atoms.pbc.any()) for atoms in own}
    frames = generic_frames(base.species, recipe.keep_base, periodic=kinds.pop() if len(kinds) == 1 else None)
    kept = replace(base.with_calibration((*own, *frames)), name=f"{base.name} (base)")
    weights = (*recipe.weights, 1.0) if recipe.weights else None
    merged, report = merge(
        [*specialists, kept],
        recipe.model_copy(update={"keep_base": 0, "weights": weights, "frames": None}),
        base=base,
        checkpoint=checkpoint,
        device=device,
        progress=progress,
    )
    found = merged.merged
    assert found is not None
    record = replace(
        found,
        specialists=found.specialists[:-1],
        fingerprints=found.fingerprints[:-1],
        recipe=recipe.model_dump(mode="json"),
    )
    name = "+".join(record.specialists)
    return replace(merged, name=name, merged=record), report


def _by_recipe(merged: ForceField, recipe: Recipe) -> ForceField:
    """The merge with the whole recipe on record, where only a part of it was solved for or had anything to do."""
    assert merged.merged is not None
    return replace(merged, merged=replace(merged.merged, recipe=recipe.model_dump(mode="json")))


def _solved(
    specialists: Sequence[ForceField],
    recipe: Recipe,
    *,
    base: ForceField | None,
    device: str | torch.device,
    progress: Progress,
) -> tuple[ForceField, MergeReport]:
    """Merge once, or in the loop that the recipe asks for."""
    if recipe.closed_loop is None:
        return closed_form_merge(specialists, recipe, base=base, device=device, progress=progress)
    result = closed_loop(specialists, recipe, base=base, device=device, progress=progress)
    return result.merged, result.report


def without_refinement(recipe: Recipe) -> Recipe:
    """The recipe of what a distillation starts from; a closed loop solves on all frames, as it adds some."""
    frames = None if recipe.closed_loop else recipe.frames
    return recipe.model_copy(update={"refine": None, "frames": frames})


def close_enough(report: MergeReport, options: DistillOptions) -> bool:
    """Whether held-out frames show so small an error against every specialist that distillation has nothing to do."""
    return report.held_out is not None and report.held_out < options.threshold
