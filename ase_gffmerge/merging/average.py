r"""Which specialists may be merged, and their mean: the first baseline and the anchor of every solve.

Step 6: one zero of energy for all specialists.

Relatives that carry the same table of reference energies count from the same zero. Tables may differ for two reasons:
each was fitted to its own data while all energies mean the same totals (the networks make up for the difference), or the
data count from different zeros, for example atomisation against total energies. The frames of both tell which: with
:math:`\delta_z = e_{k,z} - e_{1,z}`, the smaller of

.. math::

   \sum_f \bigl(E_k(f) - E_1(f)\bigr)^2 \qquad\text{and}\qquad
   \sum_f \bigl(E_k(f) - E_1(f) - \sum_z n_{fz}\,\delta_z\bigr)^2

decides, and in the second case δ is taken out of specialist k's references. The shift is that of the tables, not a fit to
the energies: a specialist's energies far from what it knows are not worth fitting.

Which specialists may be merged, and why not; their copies for a merge.
"""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from itertools import combinations, count

import numpy as np
import torch
from ase import Atoms
from ase.data import chemical_symbols
from torch import Tensor

from ase_gffmerge.errors import FramesError, IncompatibleSpecialistsError, RecipeError
from ase_gffmerge.forcefield.force_field import ForceField, symbols
from ase_gffmerge.forcefield.serialization import first_not_finite, require_sound
from ase_gffmerge.inference.predict import predict_frames
from ase_gffmerge.merging.recipe import Recipe
from ase_gffmerge.models import Potential, build_potential
from ase_gffmerge.models.affine_maps import adjustable_maps, affine_maps


def mean_potential(specialists: Sequence[ForceField], recipe: Recipe) -> Potential:
    """Weighted mean of all weights, on the device and in the type of the first specialist.

    Embeddings and other weights per element are averaged over the specialists that know it, in proportion to how often it
    occurs in their calibration frames (the paper does without). Under per-specialist conditioning table k keeps the rows of
    specialist k.
    """
    weights = torch.tensor(recipe.weights or [1.0] * len(specialists), dtype=torch.float64)
    share = weights / weights.sum()
    n_tables = len(specialists) if recipe.conditioning == "per-specialist" else 1
    merged = blank_potential(specialists, n_tables=n_tables)
    species = merged.species
    named = [dict(specialist.potential.named_parameters()) for specialist in specialists]
    with torch.no_grad():
        by_element = merged.element_parameters()
        for name, parameter in merged.named_parameters():
            if name != "embedding" and name not in by_element:
                parameter.copy_(
                    torch.stack([float(a) * p[name].double() for a, p in zip(share, named, strict=True)]).sum(
                        0
                    )
                )
        known = _known_elements(specialists, species)
        counts = known * share[:, None]
        if recipe.method != "paper":
            counts = counts * _occurrences(specialists, species)
        for name in by_element:
            rows = [_by_element(s, p[name].cpu(), species) for s, p in zip(specialists, named, strict=True)]
            merged.get_parameter(name).copy_(_element_mean(torch.stack(rows), counts))
        tables = torch.stack([_by_element(s, s.potential.embedding[0].cpu(), species) for s in specialists])
        mean = _element_mean(tables, counts)
        if n_tables > 1:
            mean = torch.where(known[:, :, None] > 0, tables, mean)
        merged.embedding.copy_(mean.reshape(merged.embedding.shape))
        merged.references.copy_(mean_references(specialists, species, share))
    return merged


def _element_mean(rows: Tensor, counts: Tensor) -> Tensor:
    """Mean (n_species, ...) of rows (n_specialists, n_species, ...) with weights (n_specialists, n_species)."""
    weights = counts.view(*counts.shape, *(1,) * (rows.dim() - 2))
    return (weights * rows).sum(0) / weights.sum(0)


def averaged_parameters(potential: Potential, recipe: Recipe) -> tuple[str, ...]:
    """Names of the parameters that the closed-form solves of a recipe do not reach, so that they stay the mean.

    Parameters
    ----------
    potential
        Before its readout is widened.
    recipe
        Method ``mean`` has no solves, of which nothing is said here.
    """
    if recipe.method == "mean":
        return ()
    names = {module: name for name, module in potential.named_modules()}
    maps = [*affine_maps(potential.readout).values()]
    for _, stage in potential.named_stages():
        maps += (adjustable_maps(stage) if recipe.messages else affine_maps(stage)).values()
    solved = {f"{names[map_.module]}.{key}" for map_ in maps for key in map_.parameters(map_.read())}
    return tuple(name for name, _ in potential.named_parameters() if name not in solved)


def blank_potential(specialists: Sequence[ForceField], *, n_tables: int = 1) -> Potential:
    """A frozen potential of the specialists' kind for all their elements, its weights still random.

    Parameters
    ----------
    specialists
        The first one tells device and floating-point type.
    n_tables
        Embedding tables.
    """
    first = specialists[0].potential
    species = tuple(sorted({z for specialist in specialists for z in specialist.species}))
    hyper = replace(first.hyper, n_embeddings=n_tables)
    potential = build_potential(first.architecture, hyper.to_dict(), species)
    return potential.to(dtype=first.dtype, device=first.device).eval().requires_grad_(False)


def on_all_elements(specialists: Sequence[ForceField]) -> list[ForceField]:
    """Give every specialist weights for the elements of all of them, so that their layers are alike.

    The weights of elements that a specialist does not know are zero; its frames have no such atoms. Architectures whose
    layers have no weights per element stay as they are.
    """
    species = {z for specialist in specialists for z in specialist.species}
    return [
        replace(s, potential=_on_all_elements(s, specialists))
        if s.potential.element_parameters() and set(s.species) < species
        else s
        for s in specialists
    ]


@torch.no_grad()
def _on_all_elements(specialist: ForceField, specialists: Sequence[ForceField]) -> Potential:
    potential = blank_potential([specialist, *specialists])
    by_element = potential.element_parameters()
    for name, parameter in potential.named_parameters():
        value = specialist.potential.get_parameter(name).data
        if name == "embedding":
            value = _by_element(specialist, value[0].cpu(), potential.species)[None]
        elif name in by_element:
            value = _by_element(specialist, value.cpu(), potential.species)
        parameter.copy_(value)
    references = _by_element(specialist, specialist.potential.references.cpu(), potential.species)
    potential.references.copy_(references)
    return potential


def _known_elements(specialists: Sequence[ForceField], species: Sequence[int]) -> Tensor:
    """Ones where a specialist knows an element, else zeros (n_specialists, n_species)."""
    return torch.stack([_by_element(s, torch.ones(len(s.species)), species) for s in specialists])


def mean_references(specialists: Sequence[ForceField], species: Sequence[int], share: Tensor) -> Tensor:
    """Reference energies (n_species,) in eV, averaged over the specialists that know an element.

    Parameters
    ----------
    specialists
        Whose tables.
    species
        Atomic numbers of the result, all of which one of them knows.
    share : (n_specialists,)
        Weights.
    """
    tables = torch.stack([_by_element(s, s.potential.references.cpu(), species) for s in specialists])
    weights = _known_elements(specialists, species) * share[:, None]
    return (weights * tables).sum(0) / weights.sum(0)


def _by_element(specialist: ForceField, values: Tensor, species: Sequence[int]) -> Tensor:
    """Spread per-element values of one specialist over the union of the elements; zero where unknown."""
    out = torch.zeros(len(species), *values.shape[1:], dtype=torch.float64)
    out[[species.index(z) for z in specialist.species]] = values.double()
    return out


def _occurrences(specialists: Sequence[ForceField], species: Sequence[int]) -> Tensor:
    """Fraction of each element among the calibration atoms, (n_specialists, n_species); ones where nobody has it."""
    counts = torch.zeros(len(specialists), len(species), dtype=torch.float64)
    for k, specialist in enumerate(specialists):
        for atoms in specialist.calibration:
            for z in atoms.numbers:
                counts[k, species.index(int(z))] += 1
        counts[k] /= max(float(counts[k].sum()), 1.0)
    counts[:, counts.sum(0) == 0] = 1.0
    return counts


def align_references(specialists: Sequence[ForceField]) -> dict[str, dict[str, float]]:
    """Put all specialists on the first one's zero of energy, in place.

    Returns
    -------
    dict
        Per specialist the shift per element in eV that was subtracted; empty when none was needed.
    """
    first, shifts = specialists[0], {}
    frames = [atoms for specialist in specialists for atoms in specialist.calibration]
    for specialist in specialists[1:]:
        delta = _table_difference(first, specialist)
        shared = [atoms for atoms in frames if set(atoms.numbers.tolist()) <= set(delta)]
        if shared and any(delta.values()) and _counts_from_another_zero(first, specialist, shared, delta):
            for z, shift in delta.items():
                specialist.potential.references[specialist.species.index(z)] -= shift
            shifts[specialist.name] = {chemical_symbols[z]: shift for z, shift in delta.items()}
    return shifts


def _table_difference(first: ForceField, other: ForceField) -> dict[int, float]:
    """Difference of the reference energies (eV) of the elements that both know."""
    ours, theirs = (dict(zip(s.species, s.potential.references.tolist())) for s in (first, other))
    return {z: theirs[z] - ours[z] for z in ours if z in theirs}


def _counts_from_another_zero(
    first: ForceField, other: ForceField, frames: Sequence[Atoms], delta: dict[int, float]
) -> bool:
    energies = [predict_frames(specialist.potential, frames).energies for specialist in (first, other)]
    difference = energies[1] - energies[0]
    shift = np.array([sum(delta[z] for z in atoms.numbers.tolist()) for atoms in frames])
    return bool(np.square(difference - shift).sum() < np.square(difference).sum())


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
    check_weights(recipe.weights, len(specialists))


def check_weights(weights: Sequence[float] | None, n: int) -> None:
    """Raise :class:`RecipeError` for weights that are not ``n`` positive numbers."""
    if weights is not None and (len(weights) != n or min(weights) <= 0):
        raise RecipeError(f"weights {list(weights)} must be {n} positive numbers, one per specialist")


def _check_alone(specialist: ForceField, recipe: Recipe) -> None:
    if specialist.merged or specialist.potential.hyper.readout_width:
        raise IncompatibleSpecialistsError(
            f"{specialist.name!r} is itself a merged potential; merge its parents and the new specialist in one go"
        )
    if not specialist.calibration and recipe.method != "mean":
        raise FramesError(
            f"{specialist.name!r} carries no calibration frames, without which a merge cannot see what it knows; give for "
            "each specialist, in order, a file of frames, or sample:FILE, which makes some from structures in a file: "
            "--calibration A B on the command line, calibration=[A, B] for a GFFMergeCalculator"
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
            f"{second.level_of_theory!r}); one energy surface cannot follow both. If only a name is missing, add it by "
            "gffmerge convert FILE NAMED.safetensors --level-of-theory NAME; if it is intended, write in the recipe "
            "allow_mixed_theory: true"
        )
    if first.fingerprint == second.fingerprint and not recipe.allow_identical:
        raise IncompatibleSpecialistsError(
            f"{pair} have identical weights: the same specialist was given twice; give different ones"
        )
    if not recipe.allow_unrelated and not related(first, second):
        raise IncompatibleSpecialistsError(
            f"{pair} do not descend from a common base (no shared ancestor on record, and their weights are "
            f"{weight_distance(first, second):.2f} times their own size apart), so averages of them mean nothing and the "
            "solves start from afar; fine-tune both from one base, or allow it by --allow-unrelated, in Python "
            "allow_unrelated=True, with the default recipe, which refines, and look at the report"
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
