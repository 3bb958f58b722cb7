r"""How far a potential is from every specialist on frames that no fit has seen: what merges and methods are chosen by.

.. math::

   D_k(f) = \sqrt{\langle \|F_f - F_k\|^2\rangle_{C_k} \,/\, \langle \|F_k\|^2\rangle_{C_k}} ,\qquad
   D(f) = \sqrt{\frac{\sum_k a_k D_k(f)^2}{\sum_k a_k}}

where :math:`F_k` are the forces that specialist k itself predicts on frames :math:`C_k`, and :math:`a_k` its weight;
energies and stresses where forces are silent by symmetry (:mod:`ase_gffmerge.inference.errors`).
No labels are needed. Squares, as these errors add up in squares to the specialists' own; a potential that is right for one
specialist and wrong for another is worse than one that is nearly right for both. The specialists are evaluated once,
whatever the number of potentials.

And how far a merged potential, the mean of the weights and all other specialists are, for the report.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from ase import Atoms
from torch import Tensor

from ase_gffmerge.data.frames import spread
from ase_gffmerge.forcefield.force_field import ForceField
from ase_gffmerge.graphs import batch_graphs, build_graph, predict
from ase_gffmerge.graphs.graph import AtomGraph
from ase_gffmerge.inference.errors import Scales, compare, difference, relative_squares, without_shifts
from ase_gffmerge.inference.predict import FramePredictions, check_frames, edge_batches, predict_frames
from ase_gffmerge.merging.report import Disagreement, Forgetting, Parity
from ase_gffmerge.models import Potential

N_FRAMES = 20
"""Calibration frames per specialist that potentials are compared on."""


@dataclass(frozen=True, kw_only=True)
class Distance:
    """How far a potential is from every specialist.

    Attributes
    ----------
    squares
        Per specialist, mean squared error of the force components of every frame over the mean square of the specialist's
        forces on all frames (n_frames,), see :func:`~ase_gffmerge.inference.errors.relative_squares`.
    sizes
        Per specialist, atoms of every frame (n_frames,).
    weights
        How much each specialist counts; their sum is one.
    """

    squares: tuple[np.ndarray, ...]
    sizes: tuple[np.ndarray, ...]
    weights: tuple[float, ...]

    @property
    def relative(self) -> tuple[float, ...]:
        """D_k, one per specialist; infinite where forces are not finite."""
        pooled = [np.average(e, weights=n) for e, n in zip(self.squares, self.sizes, strict=True)]
        return tuple(float(np.nan_to_num(np.sqrt(value), nan=np.inf)) for value in pooled)

    @property
    def overall(self) -> float:
        """D."""
        return float(sum(a * d * d for a, d in zip(self.weights, self.relative, strict=True)) ** 0.5)

    def below(self, other: "Distance") -> bool:
        """Whether D² is smaller than another potential's on the same frames by more than its standard error.

        The error of the difference is that of the paired frames; one frame per specialist has none.
        """
        if not np.isfinite(self.overall) or not np.isfinite(other.overall):
            return bool(np.isfinite(self.overall) and not np.isfinite(other.overall))
        variance = sum(
            (a * np.std(theirs - mine, ddof=1)) ** 2 / len(mine)
            for a, mine, theirs in zip(self.weights, self.squares, other.squares, strict=True)
            if len(mine) > 1
        )
        return bool(other.overall**2 - self.overall**2 > variance**0.5)


@dataclass(frozen=True, kw_only=True)
class DisagreementMetric:
    """Disagreement with the specialists' own predictions on some frames of each.

    Attributes
    ----------
    batches
        Per specialist, its frames.
    references
        Per specialist, its predictions for them.
    weights
        How much each specialist counts; their sum is one.
    """

    batches: tuple[tuple[AtomGraph, ...], ...]
    references: tuple[FramePredictions, ...]
    weights: tuple[float, ...]

    @classmethod
    def of(
        cls,
        specialists: Sequence[ForceField],
        *,
        frames: Sequence[Sequence[Atoms]] | None = None,
        n_frames: int = N_FRAMES,
        weights: Sequence[float] | None = None,
    ) -> Self:
        """Evaluate the specialists, all on one device.

        Parameters
        ----------
        specialists
            In the order of their indices.
        frames
            One sequence per specialist; default: at most ``n_frames`` evenly chosen calibration frames of each.
        n_frames
            See ``frames``.
        weights
            Relative share of each specialist; default: the same for all.

        Raises
        ------
        FramesError
            When a specialist has no frames.
        """
        if frames is None:
            for specialist in specialists:
                where = [
                    f"{specialist.name!r}, calibration frame {k}" for k in range(len(specialist.calibration))
                ]
                check_frames(specialist.potential, specialist.calibration, where)
            frames = [spread(s.calibration, n_frames) for s in specialists]
        batches = tuple(
            _batches(specialist.potential, own, k)
            for k, (specialist, own) in enumerate(zip(specialists, frames, strict=True))
        )
        references = [_predictions(s.potential, own) for s, own in zip(specialists, batches, strict=True)]
        share = [1.0] * len(specialists) if weights is None else [float(a) for a in weights]
        return cls(
            batches=batches, references=tuple(references), weights=tuple(a / sum(share) for a in share)
        )

    @torch.no_grad()
    def distance(self, potential: Potential) -> Distance:
        """Compare a potential that knows all elements of all frames with the specialists."""
        squares = [
            relative_squares(_predictions(potential, own), reference)
            for own, reference in zip(self.batches, self.references, strict=True)
        ]
        sizes = [np.array([len(frame) for frame in reference.numbers]) for reference in self.references]
        return Distance(squares=tuple(squares), sizes=tuple(sizes), weights=self.weights)

    def disagreement(self, potential: Potential) -> float:
        """D of a potential; infinite when its forces are not finite."""
        return self.distance(potential).overall


def _batches(potential: Potential, frames: Sequence[Atoms], specialist: int) -> tuple[AtomGraph, ...]:
    cutoff, dtype = potential.hyper.cutoff, potential.dtype
    graphs = [build_graph(atoms, cutoff, dtype=dtype, specialist=specialist) for atoms in frames]
    groups = edge_batches(graphs, device=potential.device)
    return tuple(batch_graphs(group).to(potential.device) for group in groups)


def _predictions(potential: Potential, batches: Sequence[AtomGraph]) -> FramePredictions:
    """Predictions for all structures of some batches, in order."""
    numbers, energies, forces, stresses = [], [], [], []
    for batch in batches:
        found, counts = predict(potential, batch), torch.bincount(batch.structure_index).tolist()
        numbers += _apart(batch.atomic_numbers, counts)
        forces += _apart(found.forces.double(), counts)
        energies.append(found.energy.double().cpu().numpy())
        solid = torch.linalg.matrix_rank(batch.cell.double()) == 3
        stress = found.strain_derivative.double() / torch.linalg.det(batch.cell.double()).abs()[:, None, None]
        stresses += [
            one if has else None for one, has in zip(stress.cpu().numpy(), solid.tolist(), strict=True)
        ]
    return FramePredictions(
        numbers=numbers, energies=np.concatenate(energies), forces=forces, stresses=stresses
    )


def _apart(values: Tensor, counts: list[int]) -> list[np.ndarray]:
    return [part.cpu().numpy() for part in values.split(counts)]


def forgetting(
    base: ForceField, models: Mapping[str, Potential], frames: Sequence[Atoms]
) -> tuple[Forgetting, ...]:
    """How far models are from their common base on frames of different compounds; none without frames.

    Parameters
    ----------
    base
        What they descend from.
    models
        By name.
    frames
        One of each compound, of elements that all models know.
    """
    frames = [f for f in frames if all(set(f.numbers.tolist()) <= set(m.species) for m in models.values())]
    if not frames:
        return ()
    reference = predict_frames(base.potential, frames)
    rows = []
    for name, model in models.items():
        predicted = predict_frames(model, frames)
        errors = [
            float(np.abs(ours - theirs).mean())
            for ours, theirs in zip(predicted.forces, reference.forces, strict=True)
        ]
        worst = int(np.argmax(errors))
        rows.append(
            Forgetting(
                model=name,
                base=base.name,
                n_compounds=len(frames),
                mean=float(np.mean(errors)),
                median=float(np.median(errors)),
                worst=errors[worst],
                worst_compound=frames[worst].get_chemical_formula(empirical=True),
                relative=Scales.of(difference(predicted, reference)).force / Scales.of(reference).force,
            )
        )
    return tuple(rows)


PARITY_SAMPLE = 600
"""Force components per specialist that are kept for the parity plot."""


def diagnose(
    specialists: Sequence[ForceField], mean: Potential | None, merged: Potential
) -> tuple[tuple[Disagreement, ...], tuple[Parity, ...]]:
    """Evaluate all models on every specialist's calibration frames.

    Parameters
    ----------
    specialists
        In the order of their indices.
    mean, merged
        The two models that are compared with each of them; without a mean where the specialists differ in architecture.
    """
    rows: list[Disagreement] = []
    parity: list[Parity] = []
    for k, specialist in enumerate(specialists):
        frames = specialist.calibration
        if not frames:
            continue
        reference = predict_frames(specialist.potential, frames)
        models = {"merged": merged} if mean is None else {"mean": mean, "merged": merged}
        predictions = {name: predict_frames(model, frames, specialist=k) for name, model in models.items()}
        elements = {int(z) for atoms in frames for z in atoms.numbers}
        for other in specialists:
            if other is not specialist and elements <= set(other.species):
                predictions[other.name] = predict_frames(other.potential, frames)
        rows += [disagreement(specialist.name, name, p, reference) for name, p in predictions.items()]
        parity.append(_parity(specialist.name, reference, predictions.get("mean"), predictions["merged"]))
    return tuple(rows), tuple(parity)


def disagreement(
    specialist: str, model: str, predicted: FramePredictions, reference: FramePredictions
) -> Disagreement:
    """How one model's predictions differ from a specialist's.

    Parameters
    ----------
    specialist, model
        Names.
    predicted, reference
        Of the model and of the specialist, on the same frames.
    """
    errors, size = compare(predicted, reference), Scales.of(reference)
    error = Scales.of(difference(predicted, reference))
    return Disagreement(
        specialist=specialist,
        model=model,
        force_mae=errors.force_mae,
        force_rmse=errors.force_rmse,
        energy_mae=errors.energy_mae,
        force_rms=size.force,
        energy_rmse=error.energy,
        energy_rms=size.energy,
        stress_rmse=error.stress,
        stress_rms=size.stress,
        n_frames=errors.n_frames,
    )


def _parity(
    name: str, reference: FramePredictions, mean: FramePredictions | None, merged: FramePredictions
) -> Parity:
    silent = Scales.of(reference).silent
    flat = [_sample(p, silent) if p is not None else np.zeros(0) for p in (reference, mean, merged)]
    chosen = np.linspace(0, len(flat[0]) - 1, min(PARITY_SAMPLE, len(flat[0]))).astype(int)
    values = [tuple(float(round(v, 6)) for v in array[chosen]) if len(array) else () for array in flat]
    return Parity(
        specialist=name,
        reference=values[0],
        mean=values[1],
        merged=values[2],
        quantity="energies" if silent else "forces",
    )


def _sample(predictions: FramePredictions, silent: bool) -> np.ndarray:
    """What the parity plot shows: force components, or energies per atom where forces are silent."""
    if not silent:
        return np.concatenate(predictions.forces).ravel()
    counts = np.array([len(numbers) for numbers in predictions.numbers])
    return without_shifts(predictions.energies / counts, predictions.numbers)
