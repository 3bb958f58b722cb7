"""What stops molecular dynamics: broken bonds, overlaps, runaway temperature, extrapolation.

Covalent bonds of a structure, and whether they still hold.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from ase import Atoms, units
from ase.data import chemical_symbols, covalent_radii
from ase.geometry import find_mic
from ase.neighborlist import natural_cutoffs, neighbor_list
from torch import Tensor

from ase_gffmerge.dynamics.langevin import BatchedLangevin
from ase_gffmerge.forcefield.force_field import ForceField
from ase_gffmerge.graphs.graph import AtomGraph, edge_vectors
from ase_gffmerge.inference.predict import grades


@dataclass(frozen=True)
class Bonds:
    """Pairs of bonded atoms.

    Attributes
    ----------
    pairs : (n_bonds, 2) int
        Atom indices, the smaller first.
    lengths : (n_bonds,) float
        Reference lengths in Å.
    """

    pairs: np.ndarray
    lengths: np.ndarray


def find_bonds(atoms: Atoms, *, tolerance: float = 1.2) -> Bonds:
    """Pairs closer than ``tolerance`` times the sum of their covalent radii (minimum image)."""
    i, j = neighbor_list("ij", atoms, natural_cutoffs(atoms, mult=tolerance))
    pairs = np.unique(np.stack([i, j], axis=1)[i < j], axis=0).reshape(-1, 2)
    return Bonds(pairs, _lengths(atoms, pairs))


def broken_bonds(atoms: Atoms, bonds: Bonds, *, stretch: float = 1.5) -> np.ndarray:
    """Pairs (n_broken, 2) of atoms whose bond is broken, or whose positions are not finite.

    Parameters
    ----------
    atoms
        The structure now.
    bonds
        Bonds of the intact structure.
    stretch
        A bond is broken when it is longer than this multiple of its reference length.
    """
    return bonds.pairs[~(_lengths(atoms, bonds.pairs) <= stretch * bonds.lengths)]


def bonds_intact(atoms: Atoms, bonds: Bonds, *, stretch: float = 1.5) -> bool:
    """Whether no bond is broken.

    Parameters
    ----------
    atoms, bonds, stretch
        As for :func:`broken_bonds`.

    Examples
    --------
    >>> from ase.build import molecule
    >>> water = molecule("H2O")
    >>> bonds = find_bonds(water)
    >>> water.positions[1] += 1.0
    >>> bonds_intact(water, bonds)
    False
    """
    return len(broken_bonds(atoms, bonds, stretch=stretch)) == 0


def _lengths(atoms: Atoms, pairs: np.ndarray) -> np.ndarray:
    """Minimum-image distances (n_pairs,) in Å."""
    vectors = atoms.positions[pairs[:, 1]] - atoms.positions[pairs[:, 0]]
    if not atoms.pbc.any() or not np.isfinite(vectors).all():
        return np.linalg.norm(vectors, axis=1)
    return find_mic(vectors, atoms.cell, atoms.pbc)[1]


Grade = Callable[[AtomGraph], Tensor]
"""A batch graph in, an extrapolation grade per atom (n_atoms,) out; 1 is the edge of what the model knows."""


@dataclass(frozen=True, kw_only=True)
class StoppingCriteria:
    """What stops a replica; ``None`` switches a criterion off. Energies that are not finite always stop it.

    Attributes
    ----------
    stretch
        A bond of the reference structure is broken when it is longer than this multiple of its length there.
    mobile
        Elements whose neighbours are no bonds: ions that hop.
    contact
        Two atoms are too close below this fraction of the sum of their covalent radii.
    heat
        The replica is too hot above this multiple of the temperature asked for. The instantaneous temperature of
        three atoms exceeds five times its mean about once in a million samples, that of more atoms never.
    grade, max_grade
        Extrapolation grade per atom, looked at whenever a frame is recorded, and its largest acceptable value.
    """

    stretch: float | None = 1.5
    mobile: tuple[str, ...] = ("Li", "Na", "K", "Rb", "Cs")
    contact: float | None = 0.5
    heat: float | None = 5.0
    grade: Grade | None = None
    max_grade: float = 2.0


def standard_criteria(force_field: ForceField, *, max_grade: float | None = 2.0) -> StoppingCriteria:
    """Default criteria, and ``max_grade`` (if not ``None``) where the force field has an extrapolation grade."""
    if force_field.extrapolation_grade is None or max_grade is None:
        return StoppingCriteria()

    def grade(graph: AtomGraph) -> Tensor:
        found = grades(force_field, graph)
        assert found is not None
        return found

    return StoppingCriteria(grade=grade, max_grade=max_grade)


@dataclass(frozen=True)
class Stop:
    """Why a replica was stopped: a ``reason`` to count by, and the ``detail``."""

    reason: str
    detail: str


@dataclass(frozen=True)
class BondCriterion:
    """Bonds of one replica: ``pairs`` (n, 2), image ``offsets`` (n, 3) in Å, largest ``limits`` (n,) in Å."""

    pairs: np.ndarray
    offsets: np.ndarray
    limits: np.ndarray

    @classmethod
    def of(cls, atoms: Atoms, criteria: StoppingCriteria) -> "BondCriterion":
        """Bonds of the structure as it is now, without those of mobile elements."""
        bonds = find_bonds(atoms)
        hops = np.isin(atoms.numbers, [chemical_symbols.index(symbol) for symbol in criteria.mobile])
        held = ~hops[bonds.pairs].any(axis=1)
        pairs = bonds.pairs[held]
        vectors = atoms.positions[pairs[:, 1]] - atoms.positions[pairs[:, 0]]
        nearest = find_mic(vectors, atoms.cell, atoms.pbc)[0] if len(pairs) else vectors
        return cls(pairs, nearest - vectors, (criteria.stretch or np.inf) * bonds.lengths[held])


class StoppingTracker:
    """Stopping criteria applied to a batch of replicas while they move.

    Parameters
    ----------
    criteria
        What stops a replica.
    replicas
        The batch.
    references
        Intact structures, one per replica.
    freedom
        Degrees of freedom (n_replicas,) that carry kinetic energy.
    """

    def __init__(
        self,
        criteria: StoppingCriteria,
        replicas: BatchedLangevin,
        references: Sequence[Atoms],
        *,
        freedom: Sequence[int],
    ) -> None:
        self.criteria, self.replicas = criteria, replicas
        self.freedom = torch.as_tensor(freedom, dtype=torch.float64, device=replicas.device)
        self.radii = torch.as_tensor(covalent_radii, dtype=torch.float64, device=replicas.device)
        self._bonds = [BondCriterion.of(atoms, criteria) for atoms in references]
        self._join()

    def _join(self) -> None:
        starts = [part.start for part in self.replicas.slices]
        device = self.replicas.device
        self.pairs = torch.as_tensor(
            np.concatenate([b.pairs + start for b, start in zip(self._bonds, starts, strict=True)]),
            device=device,
        )
        self.offsets = torch.as_tensor(np.concatenate([b.offsets for b in self._bonds]), device=device)
        self.limits = torch.as_tensor(np.concatenate([b.limits for b in self._bonds]), device=device)

    def keep(self, kept: Sequence[int]) -> None:
        """Go on with the replicas of these indices, after the batch has."""
        self.freedom = self.freedom[list(kept)]
        self._bonds = [self._bonds[k] for k in kept]
        self._join()

    def temperatures(self) -> Tensor:
        """Instantaneous temperature (n_replicas,) in K."""
        return 2 * self.replicas.kinetic_energies() / (self.freedom * units.kB)

    def stops(self, *, recording: bool) -> dict[int, Stop]:
        """Replicas to stop now; ``recording``: a frame is about to be recorded, so look at the grade too."""
        found: dict[int, Stop] = {}
        for k, stop in self._all(recording):
            found.setdefault(k, stop)
        return found

    def _all(self, recording: bool) -> Iterator[tuple[int, Stop]]:
        yield from self._not_finite()
        if self.criteria.stretch is not None:
            yield from self._broken()
        if self.criteria.contact is not None:
            yield from self._too_close(self.criteria.contact)
        if self.criteria.heat is not None:
            yield from self._too_hot(self.criteria.heat)
        if recording and self.criteria.grade is not None:
            yield from self._extrapolating(self.criteria.grade)

    def _not_finite(self) -> Iterator[tuple[int, Stop]]:
        total = self.replicas.energies + self.replicas.kinetic_energies()
        for k in _where(~torch.isfinite(total)):
            yield k, Stop("not finite", "energy or momenta are not finite")
        for k in _where(self.replicas.leapt):
            yield k, Stop("not finite", "an atom moved further than the cutoff in one step")

    def _broken(self) -> Iterator[tuple[int, Stop]]:
        i, j = self.pairs.T
        lengths = (self.replicas.positions[j] - self.replicas.positions[i] + self.offsets).norm(dim=1)
        for n in _where(~(lengths <= self.limits)):
            yield (
                self._replica(i[n]),
                Stop(
                    "bond broken", f"{self._pair(i[n], j[n])} are bonded and {float(lengths[n]):.2f} Å apart"
                ),
            )

    def _too_close(self, contact: float) -> Iterator[tuple[int, Stop]]:
        graph = self.replicas.graph
        radii = self.radii[graph.atomic_numbers]
        j, i = graph.edge_index
        lengths = edge_vectors(graph).norm(dim=1)
        for n in _where(lengths < contact * (radii[i] + radii[j])):
            yield (
                self._replica(i[n]),
                Stop("atoms too close", f"{self._pair(i[n], j[n])} are {float(lengths[n]):.2f} Å apart"),
            )

    def _too_hot(self, heat: float) -> Iterator[tuple[int, Stop]]:
        now, target = self.temperatures(), self.replicas.temperatures
        for k in _where((now > heat * target) & (target > 0)):
            yield k, Stop("too hot", f"{float(now[k]):.0f} K, {float(target[k]):g} K were asked for")

    def _extrapolating(self, grade: Grade) -> Iterator[tuple[int, Stop]]:
        grades = grade(self.replicas.graph)
        for n in _where(~(grades <= self.criteria.max_grade)):
            detail = f"atom {self._label(n)} has an extrapolation grade of {float(grades[n]):.2f}"
            yield self._replica(n), Stop("extrapolation", detail)

    def _replica(self, atom: Tensor | int) -> int:
        return int(self.replicas.structure_index[atom])

    def _label(self, atom: Tensor | int) -> str:
        """Element and index within the replica."""
        symbol = chemical_symbols[int(self.replicas.graph.atomic_numbers[atom])]
        return f"{symbol}{int(atom) - self.replicas.slices[self._replica(atom)].start}"

    def _pair(self, i: Tensor, j: Tensor) -> str:
        return f"{self._label(i)} and {self._label(j)}"


def _where(flags: Tensor) -> list[int]:
    return flags.nonzero()[:, 0].tolist() if flags.any() else []
