"""Which specialists may be merged, and why not; their copies for a merge."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from itertools import combinations, count

import torch

from ase_gffmerge.errors import FramesError, IncompatibleSpecialistsError, RecipeError
from ase_gffmerge.forcefield.force_field import ForceField, symbols
from ase_gffmerge.forcefield.serialization import first_not_finite, require_sound
from ase_gffmerge.merging.recipe import Recipe
from ase_gffmerge.models import Potential
from ase_gffmerge.models.affine_maps import affine_maps


def check_compatible(specialists: Sequence[ForceField], recipe: Recipe) -> None:
    """Refuse what cannot be merged.

    Raises
    ------
    IncompatibleSpecialistsError
        Fewer than two, the same one twice, already merged, of different architecture, hyper-parameters, cutoff, level
        of theory, with NaN or infinity among the weights, or without a common base.
    FramesError
        Calibration frames are missing, empty, not finite, or hold an element that the specialist does not know.
    RecipeError
        The number of weights is not the number of specialists, or a weight is not positive.
    """
    if len(specialists) < 2:
        raise IncompatibleSpecialistsError(
            f"a merge needs at least two specialists, got {len(specialists)}; to use a single force field give it to "
            "GFFMergeCalculator as it is"
        )
    for specialist in specialists:
        _check_alone(specialist, recipe)
    for first, second in combinations(specialists, 2):
        _check_pair(first, second, recipe)
    weights = recipe.weights
    if weights is not None and (len(weights) != len(specialists) or min(weights) <= 0):
        raise RecipeError(
            f"weights {list(weights)} must be {len(specialists)} positive numbers, one per specialist"
        )


def _check_alone(specialist: ForceField, recipe: Recipe) -> None:
    if specialist.merged or specialist.potential.hyper.readout_width:
        raise IncompatibleSpecialistsError(
            f"{specialist.name!r} is itself a merged potential; merge its parents and the new specialist in one go"
        )
    if not specialist.calibration and recipe.method != "mean":
        raise FramesError(
            f"{specialist.name!r} carries no calibration frames, without which a merge cannot see what it knows; add "
            "some with ForceField.with_calibration(frames), or train with --frames N"
        )
    if broken := first_not_finite(specialist.potential):
        raise IncompatibleSpecialistsError(
            f"the parameter {broken!r} of {specialist.name!r} contains NaN or infinity, which would spoil the merge: its "
            "training diverged, or something wrote over it; train it again or leave it out"
        )
    require_sound(specialist.calibration, specialist.name)
    for i, atoms in enumerate(specialist.calibration):
        unknown = sorted(set(atoms.numbers.tolist()) - set(specialist.species))
        if unknown:
            raise FramesError(
                f"calibration frame {i} of {specialist.name!r} contains {symbols(unknown)}, which it does not know; leave "
                "that frame out"
            )


def _check_pair(first: ForceField, second: ForceField, recipe: Recipe) -> None:
    pair = f"{first.name!r} and {second.name!r}"
    if first.potential.architecture != second.potential.architecture:
        raise IncompatibleSpecialistsError(
            f"{pair} have different architectures ({first.potential.architecture}, {second.potential.architecture}); "
            "their weights do not correspond: fine-tune both from one base"
        )
    ours, theirs = first.potential.hyper.to_dict(), second.potential.hyper.to_dict()
    different = [f"{key} {ours[key]} / {theirs[key]}" for key in ours if ours[key] != theirs[key]]
    if different:
        raise IncompatibleSpecialistsError(
            f"{pair} differ in hyper-parameters ({'; '.join(different)}); fine-tune both from one base"
        )
    if first.level_of_theory != second.level_of_theory and not recipe.allow_mixed_theory:
        raise IncompatibleSpecialistsError(
            f"{pair} were trained on different levels of theory ({first.level_of_theory!r}, "
            f"{second.level_of_theory!r}); one energy surface cannot follow both. If that is intended, set "
            "allow_mixed_theory in the recipe"
        )
    if first.fingerprint == second.fingerprint and not recipe.allow_identical:
        raise IncompatibleSpecialistsError(
            f"{pair} have identical weights: the same specialist was given twice; give different ones"
        )
    if not recipe.allow_unrelated and not related(first, second):
        raise IncompatibleSpecialistsError(
            f"{pair} do not descend from a common base (no shared ancestor on record, and their weights are "
            f"{weight_distance(first, second):.2f} times their own size apart), so a closed-form merge of them is "
            "useless; fine-tune both from one base, or pass allow_unrelated to see for yourself"
        )


def related(first: ForceField, second: ForceField) -> bool:
    """Whether two specialists share an ancestor on record, or are closer to each other than to zero."""
    ancestors = {*first.provenance.lineage, first.fingerprint} & {
        *second.provenance.lineage,
        second.fingerprint,
    }
    return bool(ancestors) or weight_distance(first, second) < 1.0


def weight_distance(first: ForceField, second: ForceField) -> float:
    r"""Distance of all affine maps in units of their size, :math:`\|w_a-w_b\| / \sqrt{\|w_a\|\,\|w_b\|}`.

    About 1.4 for independent initialisations, well below 1 for fine-tuned relatives. Embeddings, norms and basis functions
    are left out, which begin alike.
    """
    ours, theirs = (_flat_maps(specialist.potential) for specialist in (first, second))
    shared = [name for name in ours if name in theirs and ours[name].shape == theirs[name].shape]
    a, b = (torch.cat([maps[name] for name in shared]) for maps in (ours, theirs))
    return float((a - b).norm() / (a.norm() * b.norm()).sqrt())


def _flat_maps(potential: Potential) -> dict[str, torch.Tensor]:
    """Coefficients of every affine map on the CPU."""
    return {
        name: affine_map.read().cpu().double().flatten()
        for name, affine_map in affine_maps(potential).items()
    }


def working_copies(specialists: Sequence[ForceField], device: torch.device) -> list[ForceField]:
    """Copies on one device, in the highest of their precisions, with distinct names."""
    dtype = max((s.potential.dtype for s in specialists), key=lambda kind: torch.finfo(kind).bits)
    return [
        replace(s, name=name, potential=deepcopy(s.potential).to(device=device, dtype=dtype))
        for s, name in zip(specialists, distinct([s.name for s in specialists]), strict=True)
    ]


def distinct(names: Sequence[str]) -> list[str]:
    """Names with ``-2``, ``-3``, ... after those that were there before."""
    taken: list[str] = []
    for name in names:
        numbered = (f"{name}-{n}" for n in count(2))
        taken.append(name if name not in taken else next(new for new in numbered if new not in taken))
    return taken
