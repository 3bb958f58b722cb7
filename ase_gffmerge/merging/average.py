"""The mean of the specialists: first baseline, and the anchor of every solve."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ase_gffmerge.forcefield.force_field import ForceField
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
