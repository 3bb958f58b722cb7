r"""Weights of several specialists as vectors of one length.

Methods that work weight by weight need every specialist in one space: all parameters in a row, the embedding over the
union of the elements. A specialist's row of an element that it does not know is marked as unknown and counts for nothing.
The *task vector* of a specialist is what its fine-tuning added to the base, :math:`\tau_k = w_k - w_0`
(Ilharco et al., arXiv 2212.04089).

Reference energies are no weights: specialists are first put on one zero of energy, and a merged potential takes the mean.
"""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

from ase_gffmerge.errors import IncompatibleSpecialistsError, RecipeError
from ase_gffmerge.forcefield.force_field import ForceField
from ase_gffmerge.merging.average import blank_potential, mean_references
from ase_gffmerge.models import Potential


@dataclass(frozen=True, kw_only=True)
class WeightSpace:
    """Weights of K specialists in one space of P weights.

    Attributes
    ----------
    specialists
        Copies on one device, of one precision and one zero of energy; they may be changed.
    vectors : (K, P)
        Weights, float64; zero where unknown.
    known : (K, P)
        Whether a specialist knows the element that a weight belongs to.
    base : (P,)
        Weights of the base, or ``None``. Rows of elements that only specialists know are the mean of theirs.
    """

    specialists: tuple[ForceField, ...]
    vectors: Tensor
    known: Tensor
    base: Tensor | None
    _blank: Potential

    @classmethod
    def of(cls, specialists: Sequence[ForceField], base: ForceField | None = None) -> Self:
        """Read the weights of the specialists and of their base.

        Parameters
        ----------
        specialists
            On one device, of one precision and one zero of energy; they are kept, not copied.
        base
            Their common ancestor, if it is at hand.

        Raises
        ------
        IncompatibleSpecialistsError
            When the base has another architecture or other hyper-parameters than the specialists.
        """
        with torch.random.fork_rng(devices=[]):
            blank = blank_potential(specialists)
        blank.references.copy_(mean_references(specialists, blank.species, torch.ones(len(specialists))))
        vectors, known = zip(*(_flatten(s, blank.species) for s in specialists), strict=True)
        stacked, seen = torch.stack(vectors), torch.stack(known)
        origin = None
        if base is not None:
            _check_base(base, specialists[0])
            own, own_known = (x.to(stacked.device) for x in _flatten(base, blank.species))
            origin = torch.where(own_known, own, weighted_mean(stacked, seen))
        return cls(specialists=tuple(specialists), vectors=stacked, known=seen, base=origin, _blank=blank)

    @cached_property
    def origin(self) -> Tensor:
        """Weights of the base (P,).

        Raises
        ------
        RecipeError
            When the inputs have none.
        """
        if self.base is None:
            raise RecipeError(
                "this method starts from the weights of the specialists' common ancestor, which are not at hand; give "
                "them as ``MergeInputs.base``, or choose a method without that need"
            )
        return self.base

    @cached_property
    def task_vectors(self) -> Tensor:
        """What fine-tuning added to the base (K, P); zero where unknown."""
        return torch.where(self.known, self.vectors - self.origin, 0.0)

    def task_arithmetic(self, scale: float) -> Tensor:
        """Weights (P,) of the base plus ``scale`` times the sum of the task vectors."""
        return self.origin + scale * self.task_vectors.sum(0)

    def potential(self, vector: Tensor, *, references_of: int | None = None) -> Potential:
        """Potential with weights ``vector`` (P,) for the elements of all specialists.

        Parameters
        ----------
        vector
            Its weights.
        references_of
            The specialist whose reference energies it takes for the elements that one knows; default: the mean.
        """
        potential = deepcopy(self._blank)
        parameters = list(potential.parameters())
        parts = vector.split([parameter.numel() for parameter in parameters])
        with torch.no_grad():
            for parameter, part in zip(parameters, parts, strict=True):
                parameter.copy_(part.reshape(parameter.shape))
        if references_of is not None:
            specialist = self.specialists[references_of]
            rows = potential.species_row[list(specialist.species)]
            potential.references[rows] = specialist.potential.references
        return potential


def weighted_mean(vectors: Tensor, weights: Tensor) -> Tensor:
    """Mean (P,) of vectors (K, P) with weights (K, P); zero where all weights are."""
    total = weights.to(vectors.dtype).sum(0)
    return (weights * vectors).sum(0) / torch.where(total > 0, total, 1.0)


def _flatten(specialist: ForceField, species: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Weights (P,) in float64 with embedding rows for ``species``, and whether the specialist knows them."""
    known = torch.tensor([z in specialist.species for z in species], device=specialist.potential.device)
    rows = specialist.potential.species_row[list(species)]
    values, mask = [], []
    for name, parameter in specialist.potential.named_parameters():
        value = parameter.detach().double()
        seen = torch.ones_like(value, dtype=torch.bool)
        if name == "embedding":
            seen = known[None, :, None].expand(len(value), -1, value.shape[2])
            value = torch.where(seen, value[:, rows], 0.0)
        values.append(value.flatten())
        mask.append(seen.flatten())
    return torch.cat(values), torch.cat(mask)


def _check_base(base: ForceField, specialist: ForceField) -> None:
    ours, theirs = specialist.potential, base.potential
    if (ours.architecture, ours.hyper) != (theirs.architecture, theirs.hyper):
        raise IncompatibleSpecialistsError(
            f"the base {base.name!r} is a {theirs.architecture} model with other hyper-parameters than "
            f"{specialist.name!r} ({ours.architecture}); give the model that the specialists were fine-tuned from"
        )
