"""The one entry to merging: everything that a recipe says, the closed loop and the distillation included."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from ase_gffmerge.errors import IncompatibleSpecialistsError, MergeWarning, RecipeError
from ase_gffmerge.forcefield.force_field import ForceField
from ase_gffmerge.inference.errors import FORCE_FLOOR
from ase_gffmerge.merging.average import check_weights
from ase_gffmerge.merging.disagreement import forgetting
from ase_gffmerge.merging.merge import closed_form_merge
from ase_gffmerge.merging.recipe import DistillOptions, Recipe, load_recipe
from ase_gffmerge.merging.report import MergeReport
from ase_gffmerge.merging.selection import check_ancestor, known_ancestor
from ase_gffmerge.runtime.distributed import by_first
from ase_gffmerge.runtime.memory import Portions, freed_memory_kept, memory_bound
from ase_gffmerge.runtime.progress import Progress, no_progress, part_of
from ase_gffmerge.sampling.generic_frames import compound, generic_frames
from ase_gffmerge.training.distill import distill
from ase_gffmerge.workflows.active_learning import closed_loop
from ase_gffmerge.workflows.memory import estimate_memory

MERGE_SHARE = 0.1
"""Fraction of the progress bar that belongs to the solves where a distillation follows."""

NEW_COMPOUNDS, NEW_SEED = 24, 1
"""Structures that show what was forgotten, less those of compounds that were merged, and the seed of their choice."""


def merge(
    specialists: Sequence[ForceField],
    recipe: str | Path | Recipe | Mapping[str, object] = "gffmerge",
    *,
    base: ForceField | None = None,
    keep_base: bool | int | None = None,
    checkpoint: Path | None = None,
    device: str | torch.device = "auto",
    max_memory: str | float | None = None,
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
        Their common ancestor, one of the starting points, and what ``keep_base`` keeps; default: the bundled model, or the
        weights in an installed package, that their lineages name, if any.
    keep_base
        Keep what the base knew, with how many structures of different compounds (``True``: 200); default: of the recipe.
    checkpoint
        File that a distillation rewrites after every epoch and continues from when the same call is made again; it is
        removed at the end.
    device
        Where to compute.
    max_memory
        Most that the process may hold, as ``"4GB"`` or in bytes (on a GPU, of its memory): as much is computed at once as
        fits (:mod:`.memory`), with the same result. Default: what the variable ``GFFMERGE_MAX_MEMORY`` says, else no bound.
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
    recipe = load_recipe(recipe, keep_base=keep_base)
    joined, inner, base = with_base(specialists, recipe, base)
    with freed_memory_kept():
        merged, report = _refined(
            joined,
            inner,
            base=base,
            checkpoint=checkpoint,
            device=device,
            bound=memory_bound(max_memory),
            progress=progress,
        )
    merged = _on_record(merged, recipe, len(specialists))
    if base is None or not (recipe.keep_base or base.provenance.origin) or recipe.conditioning != "shared":
        return merged, report
    return _with_forgetting(merged, report, joined, base)


def with_base(
    specialists: Sequence[ForceField], recipe: Recipe, base: ForceField | None
) -> tuple[list[ForceField], Recipe, ForceField | None]:
    """What is merged: the specialists, with the base as one more if it is kept, the recipe for all of them, and the base.

    Parameters
    ----------
    specialists, recipe
        What was asked for.
    base
        Their common ancestor; default: the one on record, if it is of use.

    Raises
    ------
    IncompatibleSpecialistsError, RecipeError
        For a base that is none, is missing, or is among the specialists, and for weights of another number.
    """
    if base is not None:  # vendors' files do not say what they descend from
        check_ancestor(base, [s for s in specialists if s.provenance.lineage])
    if base is None and _asks_for_base(recipe, specialists[0]):
        base = known_ancestor(specialists)
    if not recipe.keep_base:
        return list(specialists), recipe, base
    check_weights(recipe.weights, len(specialists))  # that of the base is added
    joined = [*specialists, _with_structures(base, recipe, specialists)]
    weights = (*recipe.weights, 1.0) if recipe.weights else None
    return joined, recipe.model_copy(update={"weights": weights}), base


def _asks_for_base(recipe: Recipe, first: ForceField) -> bool:
    """Whether a base at hand would be used: to be kept, to begin with, or to tell what another package's model forgot."""
    begins = recipe.method == "closed-form" and recipe.select
    return bool(recipe.keep_base or begins or first.provenance.origin)


def _with_structures(
    base: ForceField | None, recipe: Recipe, specialists: Sequence[ForceField]
) -> ForceField:
    """The base as one more specialist, with structures of many compounds among its calibration frames."""
    if base is None:
        raise RecipeError(
            "keep_base keeps what the specialists' common base knew, and neither a bundled model nor an installed package's "
            "weights are on record as that base; give it as base=..., with --base FILE, or leave keep_base out"
        )
    for specialist in specialists:
        if specialist.fingerprint == base.fingerprint and not recipe.allow_identical:
            raise IncompatibleSpecialistsError(
                f"{specialist.name!r} is the base of keep_base, which joins by itself; leave it out of the specialists"
            )
    frames = generic_frames(base.species, recipe.keep_base, periodic=_periodic(base))
    kept = base.with_calibration((*base.calibration, *frames))
    return replace(kept, name=f"{base.name} (base)", level_of_theory=specialists[0].level_of_theory)


def _periodic(base: ForceField) -> bool | None:
    """Whether the base's own frames are crystals or molecules; ``None`` where it has both or none."""
    kinds = {bool(atoms.pbc.any()) for atoms in base.calibration}
    return kinds.pop() if len(kinds) == 1 else None


def _with_forgetting(
    merged: ForceField, report: MergeReport, joined: Sequence[ForceField], base: ForceField
) -> tuple[ForceField, MergeReport]:
    """Add to the report how far merged potential and specialists are from the base on compounds that were not merged."""
    shown = {compound(atoms) for specialist in joined for atoms in specialist.calibration}
    frames = generic_frames(base.species, NEW_COMPOUNDS, periodic=_periodic(base), seed=NEW_SEED)
    frames = [atoms for atoms in frames if compound(atoms) not in shown]
    named = zip(report.specialists, joined, strict=True)  # by names that differ
    models = {"merged": merged, **{name: s for name, s in named if s.fingerprint != base.fingerprint}}
    found = forgetting(base, {name: model.potential for name, model in models.items()}, frames)
    new = replace(report, forgetting=found)
    if new.verdict != report.verdict:
        warnings.warn(new.warning, MergeWarning, stacklevel=3)
    assert merged.merged is not None
    return replace(merged, merged=replace(merged.merged, report=new.to_dict())), new


def _refined(
    specialists: Sequence[ForceField],
    recipe: Recipe,
    *,
    base: ForceField | None,
    checkpoint: Path | None,
    device: str | torch.device,
    bound: int | None,
    progress: Progress,
) -> tuple[ForceField, MergeReport]:
    """Merge, and distil the result where held-out frames show more than the recipe's threshold."""
    portions = Portions()
    if bound is not None:
        joined = bool(recipe.keep_base)
        estimate = estimate_memory(specialists, recipe, device=device, bound=bound, base_joined=joined)
        portions = estimate.portions
    if recipe.refine is None:
        return _solved(specialists, recipe, base=base, device=device, portions=portions, progress=progress)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", MergeWarning)
        start, report = _solved(
            specialists,
            without_refinement(recipe),
            base=base,
            device=device,
            portions=portions,
            progress=part_of(progress, 0.0, MERGE_SHARE),
        )
    if close_enough(report, recipe.refine, specialists):
        for warning in caught:
            warnings.warn(warning.message, warning.category, stacklevel=3)
        return start, report
    merged, _ = distill(
        start,
        specialists,
        recipe.refine,
        checkpoint=checkpoint,
        device=device,
        max_edges=portions.edges,
        progress=part_of(progress, MERGE_SHARE, 1.0),
    )
    if checkpoint:
        by_first(partial(checkpoint.unlink, missing_ok=True))
    assert merged.merged is not None
    return merged, MergeReport.from_dict(merged.merged.report)


def _on_record(merged: ForceField, recipe: Recipe, n: int) -> ForceField:
    """The merge with the whole recipe on record and the ``n`` specialists that were given, without a base that joined."""
    found = merged.merged
    assert found is not None
    record = replace(
        found,
        specialists=found.specialists[:n],
        fingerprints=found.fingerprints[:n],
        recipe=recipe.model_dump(mode="json"),
    )
    return replace(merged, name="+".join(record.specialists), merged=record)


def _solved(
    specialists: Sequence[ForceField],
    recipe: Recipe,
    *,
    base: ForceField | None,
    device: str | torch.device,
    portions: Portions,
    progress: Progress,
) -> tuple[ForceField, MergeReport]:
    """Merge once, or in the loop that the recipe asks for."""
    if recipe.closed_loop is None:
        return closed_form_merge(
            specialists, recipe, base=base, device=device, portions=portions, progress=progress
        )
    result = closed_loop(specialists, recipe, base=base, device=device, portions=portions, progress=progress)
    return result.merged, result.report


def without_refinement(recipe: Recipe) -> Recipe:
    """The recipe of what a distillation starts from; a closed loop solves on all frames, as it adds some."""
    frames = None if recipe.closed_loop else recipe.frames
    return recipe.model_copy(update={"refine": None, "frames": frames})


ADDED, UNKNOWN = 1 / 4, 0.003
"""Error against a specialist that is small enough: as a fraction of its own error, of its forces where none is recorded."""


def close_enough(report: MergeReport, options: DistillOptions, specialists: Sequence[ForceField]) -> bool:
    """Whether held-out frames show so small an error against every specialist that distillation has nothing to do.

    Parameters
    ----------
    report
        Of the merge so far.
    options
        Whose threshold counts, if there is one.
    specialists
        With the errors that their files record.
    """
    kept = [trial.disagreements for trial in report.trials if trial.kept]
    if not kept and report.held_out is None:
        return False
    found = kept[-1] if kept else (report.held_out or 0.0,) * len(specialists)
    for error, name, specialist in zip(found, report.specialists, specialists, strict=True):
        limit = _limit(specialist, name, report) if options.threshold is None else options.threshold
        if not error < limit:
            return False
    return True


def _limit(specialist: ForceField, name: str, report: MergeReport) -> float:
    """Relative error against a specialist that is small beside its own on labelled test frames.

    Parameters
    ----------
    specialist, name
        It, and what the report calls it.
    report
        With the size of its forces.
    """
    own = specialist.provenance.errors.get("force_rmse")
    rms = max((row.force_rms for row in report.disagreements if row.specialist == name), default=0.0)
    return ADDED * own / rms if own and rms > FORCE_FLOOR else UNKNOWN
