r"""Where a merge begins, and which of its steps are kept: what frames say that no fit has seen.

Some specialists stay so near their base that the mean of the weights, or the base plus a multiple of the task vectors, is
better than anything that is solved from few frames. So the potentials that need no fit are compared first,

- the mean of the weights,
- task arithmetic :math:`w_0 + \lambda\sum_k (w_k - w_0)` at several λ (Ilharco et al., arXiv 2212.04089) and the base
  :math:`w_0`, where it is at hand,
- each specialist,

by their disagreement D with the specialists on held-out frames (:mod:`.disagreement`). The merge begins with the best one,
which is also what its ridge pulls to. Every later step takes the place of what was there before only if D falls by more
than its standard error.
"""

from collections.abc import Iterator, Sequence
from copy import deepcopy

import torch
from ase import Atoms

from ase_gffmerge.data.frames import HELD_OUT, bare, hold_out_tenth, spread
from ase_gffmerge.errors import IncompatibleSpecialistsError
from ase_gffmerge.forcefield.force_field import BUNDLED, ForceField
from ase_gffmerge.integrations.load import shipped
from ase_gffmerge.merging.augmentation import visited, with_copies
from ase_gffmerge.merging.disagreement import N_FRAMES, DisagreementMetric, Distance
from ase_gffmerge.merging.recipe import AugmentationOptions, Recipe
from ase_gffmerge.merging.report import Trial
from ase_gffmerge.merging.weight_space import WeightSpace, weighted_mean
from ase_gffmerge.models import Potential

SHARES = (0.25, 0.5, 0.75, 1.25, 1.5, 2.0, 3.0)
"""Values of K λ that are tried beside the mean, which is that of 1."""


class Selection:
    """Candidates measured on held-out frames.

    Parameters
    ----------
    specialists
        On one device, with one zero of energy, with calibration frames.
    held_out
        Frames of each that no candidate was fitted to.
    recipe
        How much each specialist counts.

    Attributes
    ----------
    trials
        What was measured so far, in order.
    """

    def __init__(
        self, specialists: Sequence[ForceField], held_out: Sequence[Sequence[Atoms]], recipe: Recipe
    ):
        self._metric = DisagreementMetric.of(specialists, frames=held_out, weights=recipe.weights)
        self._best: Distance | None = None
        self.trials: list[Trial] = []

    def best_start(self, candidates: Iterator[tuple[str, Potential]]) -> Potential:
        """The candidate of least disagreement; the first one, unless another is better by more than its error."""
        name, first = next(candidates)
        reference = self._measured(name, first)
        start = index = len(self.trials) - 1
        chosen, best = first, reference
        for name, potential in candidates:  # only the best is kept in memory
            distance = self._measured(name, potential)
            if distance.overall < best.overall:
                chosen, best, index = potential, distance, len(self.trials) - 1
        if index != start and not best.below(reference):
            chosen, best, index = first, reference, start
        self._keep(index, best)
        return chosen

    def _measured(self, name: str, potential: Potential) -> Distance:
        distance = self._metric.distance(potential)
        self.trials.append(Trial(name=name, disagreements=distance.relative, kept=False))
        return distance

    def better(self, name: str, candidate: Potential, present: Potential) -> Potential:
        """The candidate if it is closer to the specialists than what is there at present, which is returned otherwise.

        Parameters
        ----------
        name
            Of the step, for the report.
        candidate, present
            After the step, and the best one before it.
        """
        assert self._best is not None
        distance = self._measured(name, candidate)
        if not distance.below(self._best):
            return present
        self._keep(-1, distance)
        return candidate

    def _keep(self, index: int, distance: Distance) -> None:
        self._best = distance
        trial = self.trials[index]
        self.trials[index] = Trial(name=trial.name, disagreements=trial.disagreements, kept=True)

    @property
    def held_out(self) -> float:
        """Largest relative force error of the best one so far over the specialists."""
        assert self._best is not None
        return max(self._best.relative)


HELD_OUT_SEED = 2**31 - 1
"""Of dynamics that visits frames to choose by, which no fit repeats."""


def split_frames(specialist: ForceField, n: int | None = None) -> tuple[list[Atoms], list[Atoms]]:
    """Calibration frames to fit, at most ``n`` evenly spread ones, and others to choose by.

    Every tenth frame is held out; a specialist with fewer frames keeps them all, and others are visited by its own
    dynamics.
    """
    frames = [bare(atoms) for atoms in specialist.calibration]
    if len(frames) >= HELD_OUT:
        fitted, held_out = hold_out_tenth(frames)
    else:
        options, n_copies = AugmentationOptions(seed=HELD_OUT_SEED), -(-HELD_OUT // len(frames))
        fitted, held_out = frames, visited(specialist, frames, options, n_copies=n_copies)
        if not held_out:  # every trajectory broke
            still = options.model_copy(update={"temperature": 0.0})
            held_out = with_copies(specialist, frames, still, n_copies=n_copies)[len(frames) :]
    return spread(fitted, n), spread(held_out, N_FRAMES)


def starting_points(
    mean: Potential, specialists: Sequence[ForceField], base: ForceField | None
) -> Iterator[tuple[str, Potential]]:
    """Potentials that need no fit, by name: the mean, task arithmetic, the base, each specialist.

    Where layers have weights per element and models know different elements, there is only the mean.

    Parameters
    ----------
    mean
        With the embedding tables of the merge.
    specialists
        On one device, with one zero of energy.
    base
        Their common ancestor, if it is at hand.

    Raises
    ------
    IncompatibleSpecialistsError
        When the base has another architecture or other hyper-parameters than the specialists.
    """
    yield "mean", mean
    models = [*specialists, *([base] if base else [])]
    if mean.element_parameters() and len({model.species for model in models}) > 1:
        return
    space = WeightSpace.of(specialists, base)
    unknown = weighted_mean(space.vectors, space.known)
    if base is not None:
        for scale in (share / len(specialists) for share in SHARES):
            arithmetic = space.potential(space.task_arithmetic(scale))
            yield f"task arithmetic, λ {scale:.3g}", _with_tables(mean, arithmetic)
        yield f"base {base.name}", _with_tables(mean, space.potential(space.origin))
    for s, vector, known in zip(specialists, space.vectors, space.known, strict=True):
        if base is not None and s.fingerprint == base.fingerprint:  # it has joined, and was tried already
            continue
        yield s.name, _with_tables(mean, space.potential(torch.where(known, vector, unknown)))


def _with_tables(mean: Potential, start: Potential) -> Potential:
    """The start itself or, where there is one embedding table per specialist, its other weights with those tables."""
    if mean.hyper.n_embeddings == 1:
        return start
    potential, weights = deepcopy(mean), dict(start.named_parameters())
    with torch.no_grad():
        for name, parameter in potential.named_parameters():
            if name != "embedding":
                parameter.copy_(weights[name])
    return potential


def common_ancestors(specialists: Sequence[ForceField]) -> tuple[str, ...]:
    """Fingerprints of the models that all descend from (or are), root first."""
    lines = [(*s.provenance.lineage, s.fingerprint) for s in specialists]
    return tuple(key for key in lines[0] if all(key in line for line in lines))


def known_ancestor(specialists: Sequence[ForceField]) -> ForceField | None:
    """Youngest common ancestor among models at hand, recognised by its fingerprint: bundled ones and packages' weights."""
    if not (common := common_ancestors(specialists)):
        return None
    first = specialists[0]
    if first.provenance.origin:
        published = shipped(first.potential.architecture)
        return next((model for model in published if model.fingerprint in common), None)
    bundled = {model.fingerprint: model for model in map(ForceField.load, BUNDLED)}
    return next((bundled[key] for key in reversed(common) if key in bundled), None)


def check_ancestor(base: ForceField, specialists: Sequence[ForceField]) -> None:
    """Raise :class:`IncompatibleSpecialistsError` when ``base`` is not recorded as ancestor of every specialist."""
    strangers = [
        s.name for s in specialists if base.fingerprint not in (*s.provenance.lineage, s.fingerprint)
    ]
    if strangers:
        raise IncompatibleSpecialistsError(
            f"{base.name!r} is not the base of {', '.join(strangers)}: its fingerprint is not in their lineage; give the "
            "file that they were fine-tuned from, unchanged, or leave --base out"
        )
