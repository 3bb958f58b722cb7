r"""How far a potential is from every specialist on frames that no fit has seen: what merges and methods are chosen by.

.. math::

   D_k(f) = \sqrt{\langle \|F_f - F_k\|^2\rangle_{C_k} \,/\, \langle \|F_k\|^2\rangle_{C_k}} ,\qquad
   D(f) = \frac{\sum_k a_k D_k(f)}{\sum_k a_k}

where :math:`F_k` are the forces that specialist k itself predicts on frames :math:`C_k`, and :math:`a_k` its weight.
No labels are needed. The specialists are evaluated once, whatever the number of potentials.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from ase import Atoms
from torch import Tensor

from ase_gffmerge.data.frames import evenly
from ase_gffmerge.forcefield.force_field import ForceField
from ase_gffmerge.graphs import batch_graphs, build_graph, predict
from ase_gffmerge.graphs.graph import AtomGraph
from ase_gffmerge.inference.errors import FORCE_FLOOR
from ase_gffmerge.inference.predict import check_frames
from ase_gffmerge.models import Potential
from ase_gffmerge.runtime.devices import chunks

N_FRAMES = 20
"""Calibration frames per specialist that potentials are compared on."""

MAX_ATOMS = 2000
"""Atoms per batch."""


@dataclass(frozen=True, kw_only=True)
class Distance:
    """How far a potential is from every specialist.

    Attributes
    ----------
    squares
        Per specialist, mean squared error of the force components of every frame over the mean square of the specialist's
        forces on all frames (n_frames,).
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
    def mean(self) -> float:
        """D."""
        return sum(a * d for a, d in zip(self.weights, self.relative, strict=True))

    def below(self, other: "Distance") -> bool:
        """Whether D is smaller than another potential's on the same frames by more than its standard error.

        The error of the difference is that of the paired frames, to first order; one frame per specialist has none.
        """
        gain = other.mean - self.mean
        if not np.isfinite(gain):
            return bool(np.isfinite(self.mean) and not np.isfinite(other.mean))
        variance = 0.0
        for a, mine, theirs, d in zip(self.weights, self.squares, other.squares, self.relative, strict=True):
            if len(mine) > 1 and d > 0:
                variance += (a * np.std(theirs - mine, ddof=1) / (2 * d)) ** 2 / len(mine)
        return bool(gain > np.sqrt(variance))


@dataclass(frozen=True, kw_only=True)
class DisagreementMetric:
    """Disagreement with the specialists' own forces on some frames of each.

    Attributes
    ----------
    batches
        Per specialist, its frames.
    forces
        Per specialist, its forces (n_atoms, 3) in eV/Å on them.
    weights
        How much each specialist counts; their sum is one.
    """

    batches: tuple[tuple[AtomGraph, ...], ...]
    forces: tuple[Tensor, ...]
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
                check_frames(specialist.potential, specialist.calibration)
            frames = [[s.calibration[i] for i in evenly(len(s.calibration), n_frames)] for s in specialists]
        batches = tuple(
            _batches(specialist.potential, own, k)
            for k, (specialist, own) in enumerate(zip(specialists, frames, strict=True))
        )
        forces = [_forces(s.potential, own) for s, own in zip(specialists, batches, strict=True)]
        share = [1.0] * len(specialists) if weights is None else [float(a) for a in weights]
        return cls(batches=batches, forces=tuple(forces), weights=tuple(a / sum(share) for a in share))

    @torch.no_grad()
    def distance(self, potential: Potential) -> Distance:
        """Compare a potential that knows all elements of all frames with the specialists."""
        squares, sizes = [], []
        for own, forces in zip(self.batches, self.forces, strict=True):
            error = (_forces(potential, own) - forces).square().mean(dim=1).cpu().numpy()
            sizes.append(np.concatenate([np.bincount(b.structure_index.cpu().numpy()) for b in own]))
            frame = np.repeat(np.arange(len(sizes[-1])), sizes[-1])
            scale = max(float(forces.square().mean()), FORCE_FLOOR**2)
            squares.append(np.bincount(frame, weights=error) / sizes[-1] / scale)
        return Distance(squares=tuple(squares), sizes=tuple(sizes), weights=self.weights)

    def disagreement(self, potential: Potential) -> float:
        """D of a potential; infinite when its forces are not finite."""
        return self.distance(potential).mean


def _batches(potential: Potential, frames: Sequence[Atoms], specialist: int) -> tuple[AtomGraph, ...]:
    cutoff, dtype = potential.hyper.cutoff, potential.dtype
    groups = [
        [build_graph(atoms, cutoff, dtype=dtype, specialist=specialist) for atoms in group]
        for group in chunks(frames, MAX_ATOMS)
    ]
    return tuple(batch_graphs(graphs).to(potential.device) for graphs in groups)


def _forces(potential: Potential, batches: Sequence[AtomGraph]) -> Tensor:
    return torch.cat([predict(potential, batch).forces for batch in batches]).double()
