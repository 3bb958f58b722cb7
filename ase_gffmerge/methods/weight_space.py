r"""Weights of several specialists as vectors of one length, and hyper-parameters chosen without labels.

Methods that work weight by weight need every specialist in one space: all parameters in a row, the embedding over the
union of the elements. A specialist's row of an element that it does not know is marked as unknown and counts for nothing.
The *task vector* of a specialist is what its fine-tuning added to the base, :math:`\tau_k = w_k - w_0`
(Ilharco et al., arXiv 2212.04089).

Reference energies are no weights: specialists are first put on one zero of energy, and a merged potential takes the mean.

Hyper-parameters chosen by disagreement with the specialists on their own calibration frames: no labels, no test frames.

.. math::

   D(f) = \frac1K \sum_k
          \frac{\bigl\|F_f - F_k\bigr\|_{C_k}}{\bigl\|F_k\bigr\|_{C_k}}

where :math:`F_k` are the forces that specialist k itself predicts on some of its calibration frames :math:`C_k`; they are
evaluated once, whatever the number of trials.
"""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Self

import numpy as np
import torch
from ase import Atoms
from torch import Tensor

from ase_gffmerge.errors import IncompatibleSpecialistsError, RecipeError
from ase_gffmerge.forcefield.force_field import ForceField
from ase_gffmerge.graphs import batch_graphs, build_graph, predict
from ase_gffmerge.graphs.graph import AtomGraph
from ase_gffmerge.inference.errors import FORCE_FLOOR
from ase_gffmerge.inference.predict import check_frames
from ase_gffmerge.merging.average import align_references, blank_potential, mean_references, working_copies
from ase_gffmerge.methods.base import MergeInputs, MergeOutput
from ase_gffmerge.models import Potential
from ase_gffmerge.runtime.devices import chunks
from ase_gffmerge.runtime.progress import Progress


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
    def of(cls, merge_inputs: MergeInputs) -> Self:
        """Read the weights of the specialists and of their base.

        Raises
        ------
        IncompatibleSpecialistsError
            When the base has another architecture or other hyper-parameters than the specialists.
        """
        specialists = aligned_copies(merge_inputs)
        with torch.random.fork_rng(devices=[]):
            blank = blank_potential(specialists)
        blank.references.copy_(mean_references(specialists, blank.species, torch.ones(len(specialists))))
        vectors, known = zip(*(_flatten(s, blank.species) for s in specialists), strict=True)
        stacked, seen = torch.stack(vectors), torch.stack(known)
        base = None
        if merge_inputs.base is not None:
            _check_base(merge_inputs.base, specialists[0])
            own, own_known = (x.to(stacked.device) for x in _flatten(merge_inputs.base, blank.species))
            base = torch.where(own_known, own, weighted_mean(stacked, seen))
        return cls(specialists=tuple(specialists), vectors=stacked, known=seen, base=base, _blank=blank)

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


def aligned_copies(merge_inputs: MergeInputs) -> list[ForceField]:
    """Copies of the specialists on the device of the inputs, in one precision and on one zero of energy."""
    specialists = working_copies(merge_inputs.specialists, merge_inputs.device)
    with torch.no_grad():
        align_references(specialists)
    return specialists


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


N_FRAMES = 20
"""Calibration frames per specialist that trials are measured on."""

MAX_ATOMS = 2000

Settings = Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class DisagreementMetric:
    """Disagreement with the specialists' own forces on some of their calibration frames.

    Attributes
    ----------
    batches
        Per specialist, its frames.
    forces
        Per specialist, its forces (n_atoms, 3) in eV/Å on them.
    """

    batches: tuple[tuple[AtomGraph, ...], ...]
    forces: tuple[Tensor, ...]

    @classmethod
    def of(cls, specialists: Sequence[ForceField], *, n_frames: int = N_FRAMES) -> Self:
        """Evaluate the specialists, all on one device, on at most ``n_frames`` evenly chosen frames each.

        Raises
        ------
        FramesError
            When a specialist has no calibration frames.
        """
        for specialist in specialists:
            check_frames(specialist.potential, specialist.calibration)
        batches = tuple(_batches(s.potential, _evenly(s.calibration, n_frames)) for s in specialists)
        forces = [_forces(s.potential, own) for s, own in zip(specialists, batches, strict=True)]
        return cls(batches=batches, forces=tuple(forces))

    def disagreement(self, potential: Potential) -> float:
        """D of a potential that knows all elements of all frames; infinite when its forces are not finite."""
        ratios = [
            float(
                (_forces(potential, own) - forces).norm()
                / forces.norm().clamp(min=FORCE_FLOOR * forces.numel() ** 0.5)
            )
            for own, forces in zip(self.batches, self.forces, strict=True)
        ]
        return float(np.nan_to_num(np.mean(ratios), nan=np.inf))


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One choice of hyper-parameters.

    Attributes
    ----------
    settings
        The hyper-parameters.
    potential
        What they make.
    disagreement
        D, see the module.
    """

    settings: Settings
    potential: Potential
    disagreement: float

    def merge_output(self) -> MergeOutput:
        """The potential with its settings, as a method returns it."""
        return MergeOutput(potentials=(self.potential,), settings=dict(self.settings))


def tune(
    build: Callable[..., Potential],
    grid: Sequence[Settings],
    metric: DisagreementMetric,
    *,
    progress: Progress,
) -> Trial:
    """Try every point of a grid and keep the one of least disagreement, the first one among equals.

    Parameters
    ----------
    build
        Makes a potential from settings given as keyword arguments.
    grid
        Settings to try, at least one.
    metric
        Measures what they make.
    progress
        Called with a fraction (0 to 1) and the settings.
    """
    best: Trial | None = None
    for i, settings in enumerate(grid):
        progress(i / len(grid), ", ".join(f"{name} {value:g}" for name, value in settings.items()))
        potential = build(**settings)
        disagreement = metric.disagreement(potential)
        if best is None or disagreement < best.disagreement:
            best = Trial(settings=settings, potential=potential, disagreement=disagreement)
    assert best is not None
    return best


def grid_of(**values: Sequence[float]) -> list[Settings]:
    """All combinations of the values of several settings."""
    return [dict(zip(values, choice, strict=True)) for choice in product(*values.values())]


def _evenly(frames: Sequence[Atoms], n_frames: int) -> list[Atoms]:
    """At most ``n_frames`` frames, evenly spaced from the first to the last."""
    chosen = np.linspace(0, len(frames) - 1, min(n_frames, len(frames))).round().astype(int)
    return [frames[i] for i in chosen]


def _batches(potential: Potential, frames: Sequence[Atoms]) -> tuple[AtomGraph, ...]:
    cutoff, dtype = potential.hyper.cutoff, potential.dtype
    groups = [
        [build_graph(atoms, cutoff, dtype=dtype) for atoms in group] for group in chunks(frames, MAX_ATOMS)
    ]
    return tuple(batch_graphs(graphs).to(potential.device) for graphs in groups)


def _forces(potential: Potential, batches: Sequence[AtomGraph]) -> Tensor:
    return torch.cat([predict(potential, batch).forces for batch in batches]).double()
