"""How much memory a merge will take, known before it begins, and how to stay within a bound.

What grows with the frames is measured: the passes of a merge run once on a few frames of one specialist, while the bytes of
all tensors are counted (:class:`~ase_gffmerge.runtime.memory.PeakMemory`), and scale with the number of edges. The rest is
counted: copies of the network, the Gram matrix of a wide readout, the state of the optimizer.

==================  ===================================================================================================
phase               what it holds beside the networks
==================  ===================================================================================================
layers              states of all calibration batches, and the rows that enter a layer of one batch with derivatives
stage corrections   these states, and the graphs of automatic differentiation of one batch of every specialist
readout             these states, rows with derivatives, and Gram matrices of all unknowns
distillation        gradient of the forces of one batch, and optimizer and averages of the weights
labels              energies and forces of one batch of structures
==================  ===================================================================================================

Where a bound is given, as much is evaluated at once as fits (:class:`Portions`), with the same result.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch

from ase_gffmerge.data.frames import bare, spread
from ase_gffmerge.errors import DeviceMemoryError
from ase_gffmerge.forcefield.force_field import ForceField
from ase_gffmerge.graphs import build_graph
from ase_gffmerge.merging import augmentation
from ase_gffmerge.merging.average import check_compatible
from ase_gffmerge.merging.calibration import (
    EDGES_PER_ATOM,
    MAX_BATCHES,
    MAX_EDGES,
)
from ase_gffmerge.merging.random_features import readout_width
from ase_gffmerge.merging.readout_fit import MAX_ATOMS, MAX_ROWS
from ase_gffmerge.merging.recipe import DistillOptions, ReadoutOptions, Recipe
from ase_gffmerge.runtime.devices import resolve_device
from ase_gffmerge.runtime.distributed import alone
from ase_gffmerge.runtime.memory import Portions, resident, written
from ase_gffmerge.training.soap import LARGEST
from ase_gffmerge.workflows.memory_per_edge import PerEdge, labelling_bytes, measured

OVERHEAD = 1.25
"""Memory of the process over that of its tensors: what allocators keep, and operations use inside."""

LIBRARIES = 130e6
"""Bytes that libraries take when they first compute."""

NOTHING = dict.fromkeys((field.name for field in fields(PerEdge)), 0.0)
"""Bytes per edge where there are no frames."""

STRAINS = 6
"""Directions of strain of a crystal."""


@dataclass(frozen=True, kw_only=True)
class Frames:
    """Sizes of one specialist's frames.

    Attributes
    ----------
    n, given
        Frames that are fitted, and all.
    edges, atoms
        Mean per frame.
    largest
        Edges of the largest frame.
    """

    n: int
    given: int
    edges: float
    atoms: float
    largest: float

    @classmethod
    def of(cls, specialist: ForceField, n: int | None) -> "Frames":
        """Count edges on eight frames, evenly spread, and the frame of most atoms; a mean of weights needs none."""
        frames = specialist.calibration
        if not frames:
            return cls(n=0, given=0, edges=0.0, atoms=0.0, largest=0.0)
        seen = [*spread(frames, 8), max(frames, key=len)]
        edges = [build_graph(bare(atoms), specialist.cutoff).n_edges for atoms in seen]
        return cls(
            n=min(n or len(frames), len(frames)),
            given=len(frames),
            edges=float(np.mean(edges[:-1])),
            atoms=float(np.mean([len(atoms) for atoms in frames])),
            largest=float(max(edges)),
        )

    @property
    def batch(self) -> float:
        """Edges of a batch of the solves."""
        size = max(self.edges, EDGES_PER_ATOM * self.atoms, 1.0)
        return max(self.edges * min(self.n, max(MAX_EDGES / size, 1.0)), self.largest)

    @property
    def all_batches(self) -> float:
        """Edges of all of them."""
        return min(self.edges * self.n, MAX_BATCHES * self.batch)


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """What a merge needs, in bytes.

    Attributes
    ----------
    resident
        What the process holds already.
    phases
        What every phase adds, networks included.
    portions
        How much is computed at once for that.
    """

    resident: float
    phases: Mapping[str, float]
    portions: Portions

    @property
    def peak(self) -> float:
        """Most that the process will hold."""
        return self.resident + max(self.phases.values())

    def __str__(self) -> str:
        largest = max(self.phases, key=lambda name: self.phases[name])
        return f"about {written(self.peak)} of memory, most of it for {largest}"


def estimate_memory(
    specialists: Sequence[ForceField],
    recipe: Recipe,
    *,
    device: str | torch.device = "auto",
    bound: int | None = None,
    base_joined: bool = False,
) -> MemoryEstimate:
    """Estimate the memory of a merge, which takes about a second, without merging.

    Parameters
    ----------
    specialists, recipe, device
        As for :func:`~ase_gffmerge.workflows.merge.merge`.
    bound
        Bytes to stay within, by computing less at once; default: none.
    base_joined
        Whether the last one is the base that is kept, all of whose frames are fitted.

    Raises
    ------
    DeviceMemoryError
        When that cannot be done, which says what to lower.
    IncompatibleSpecialistsError, FramesError, DeviceError
        As the merge does.
    """
    check_compatible(specialists, recipe)
    model = MemoryModel(specialists, recipe, resolve_device(device), base_joined=base_joined)
    return model.estimate() if bound is None else model.within(bound)


def estimate_distillation(
    student: ForceField,
    teachers: Sequence[ForceField],
    options: DistillOptions,
    *,
    device: str | torch.device = "auto",
    bound: int | None = None,
) -> MemoryEstimate:
    """Estimate the memory of a distillation, which takes about a second, without beginning it.

    Parameters
    ----------
    student
        What is trained: a merge, or a smaller force field, of any architecture.
    teachers
        With all the frames that they will label.
    options, device
        As for :func:`~ase_gffmerge.training.distill.distill`.
    bound
        Bytes to stay within, by fewer edges in a part of a training step; default: none.

    Raises
    ------
    DeviceMemoryError
        When that cannot be done, which says what to lower.
    IncompatibleSpecialistsError
        When features are matched that a network does not have.
    """
    model = DistillationModel(student, teachers, options, resolve_device(device))
    return model.estimate() if bound is None else model.within(bound)


class MemoryModel:
    """Memory of a merge as a function of how much is computed at once.

    Parameters
    ----------
    specialists
        With calibration frames.
    recipe
        What will be done.
    device
        Where.
    base_joined
        See :func:`estimate_memory`.

    Attributes
    ----------
    networks
        Bytes of all copies of the network, and of the libraries.
    """

    what = "merge"

    def __init__(
        self,
        specialists: Sequence[ForceField],
        recipe: Recipe,
        device: torch.device,
        *,
        base_joined: bool = False,
    ):
        self._recipe, self._device = recipe, device
        self._frames = [Frames.of(specialist, recipe.frames) for specialist in specialists]
        if base_joined:
            self._frames[-1] = Frames.of(specialists[-1], None)
        self._resident = resident(device)
        first = specialists[0].potential
        self._parameters = [tuple(p.shape) for p in first.parameters()]
        self._item = max(s.potential.embedding.element_size() for s in specialists)
        n_copies = len(specialists) + 5  # mean, start, merged and best so far, and their twins in float64
        self.networks = n_copies * self._item * sum(p.numel() for p in first.parameters()) + LIBRARIES
        self._elements = len({int(z) for s in specialists for atoms in s.calibration for z in atoms.numbers})
        self._periodic = any(atoms.cell.rank == 3 for s in specialists for atoms in spread(s.calibration, 8))
        densest = max(range(len(specialists)), key=lambda k: self._frames[k].edges)
        with alone():
            some = specialists[densest]
            self._unit = measured(some, recipe, device) if some.calibration else PerEdge(**NOTHING)
            options = recipe.refine
            matched = options and (options.feature_weight or options.hessian_weight)
            self._labelling, self._targets = self._unit.inference, 0.0
            if options and matched:
                self._labelling, self._targets = labelling_bytes(some, options, device)

    def estimate(self, portions: Portions | None = None) -> MemoryEstimate:
        """Estimate all phases of the recipe."""
        portions = portions or Portions()
        phases = {name: self.networks + OVERHEAD * size for name, size in self._phases(portions)}
        return MemoryEstimate(resident=self._resident, phases=phases, portions=portions)

    def within(self, bound: int) -> MemoryEstimate:
        """Choose as large portions as stay within a bound.

        Raises
        ------
        DeviceMemoryError
            When the smallest ones do not, which says what to lower.
        """
        estimate = self.estimate()
        for portions in self._smaller():
            if estimate.peak <= bound:
                return estimate
            estimate = self.estimate(portions)
        if estimate.peak <= bound:
            return estimate
        phase = max(estimate.phases, key=lambda name: estimate.phases[name])
        raise DeviceMemoryError(
            f"this {self.what} needs about {written(estimate.peak)} even in the smallest portions, more than max_memory="
            f"{written(bound)}: {phase} takes most; {self._remedy(phase)}, or raise max_memory"
        )

    def _smaller(self) -> Iterator[Portions]:
        """Portions from large to small, down to single frames and single directions."""
        smallest = max(frames.largest for frames in self._frames)
        edges, directions = max(frames.batch for frames in self._frames), self._n_directions
        yield Portions(edges=int(edges), keep_graphs=False)
        while edges > smallest or directions > 1:
            edges, directions = max(edges / 2, smallest), max(directions // 2, 1)
            for keep in (True, False):
                yield Portions(edges=int(edges), keep_graphs=keep, directions=directions)

    @property
    def _n_directions(self) -> int:
        options = self._recipe.readout or ReadoutOptions()
        return options.directions + (STRAINS if self._periodic and options.stress_weight else 0)

    def _phases(self, portions: Portions) -> Iterator[tuple[str, float]]:
        """Tensors of every phase of the recipe."""
        recipe, unit, frames = self._recipe, self._unit, self._frames
        limit = portions.edges or np.inf
        at_once = [max(min(one.batch, limit), min(one.largest, one.batch)) for one in frames]
        yield (
            "labels",
            self._labelling * max(min(one.n * one.edges, augmentation.MAX_EDGES) for one in frames),
        )
        if recipe.method == "mean":
            return
        held = unit.held * sum(one.all_batches for one in frames)
        yield "the layers", held + unit.layer * max(at_once)
        if recipe.messages:
            graphs = unit.graphs * sum(one.batch for one in frames) if portions.keep_graphs else 0.0
            product = (unit.product - unit.graphs * portions.keep_graphs) * max(at_once)
            yield "the corrections of whole stages", held + graphs + product
        if recipe.readout is not None:
            yield "the wide readout", held + self._readout(recipe.readout, portions)
        if recipe.refine is not None:
            yield "the distillation", self._distillation(recipe.refine, limit)

    def _readout(self, options: ReadoutOptions, portions: Portions) -> float:
        unknowns = self._elements * (readout_width(options, self._elements) + 1)
        batch = max(max(one.edges * MAX_ATOMS / one.atoms, one.largest) for one in self._frames)
        directions = min(portions.directions or self._n_directions, self._n_directions)
        passes = batch * (self._unit.pass_value + directions * self._unit.pass_direction)
        return passes + unknowns * (4 * 8 * unknowns + MAX_ROWS * (2 * self._item + 8))

    def _distillation(self, options: DistillOptions, limit: float) -> float:
        sides = [
            (p[0], int(np.prod(p[1:]))) if len(p) > 1 else (1, int(np.prod(p))) for p in self._parameters
        ]
        rotations = sum(2 * side**2 for pair in sides for side in pair if min(pair) > 1 and side <= LARGEST)
        weights = sum(m * n for m, n in sides)
        batch = max(one.edges for one in self._frames) * options.batch_size
        part = min(batch, max(limit, max(one.largest for one in self._frames)))
        n_frames = sum(2 * one.given * (options.copies + 1) for one in self._frames)
        stored = sum(
            min(2 * one.given * one.edges * (options.copies + 1), 4 * options.max_copied_edges)
            for one in self._frames
        )
        graphs = stored * (16 + 3 * self._item + self._targets) + 4000 * n_frames
        return self._item * (7 * weights + rotations) + graphs + self._unit.training * part

    def _remedy(self, phase: str) -> str:
        """What to change where a phase needs too much."""
        return {
            "labels": "give frames of fewer atoms",
            "the layers": "give fewer frames (frames in the recipe), or frames of fewer atoms",
            "the corrections of whole stages": "give frames of fewer atoms, or set messages to false in the recipe",
            "the wide readout": "lower the width of the readout in the recipe, or take the recipe gffmerge",
            "the distillation": "lower copies under refine in the recipe, or give frames of fewer atoms",
        }[phase]


class DistillationModel(MemoryModel):
    """Memory of a distillation as a function of how many edges are differentiated at once.

    Parameters
    ----------
    student, teachers, options, device
        See :func:`estimate_distillation`.
    """

    what = "distillation"

    def __init__(
        self,
        student: ForceField,
        teachers: Sequence[ForceField],
        options: DistillOptions,
        device: torch.device,
    ):
        recipe = Recipe(messages=False, select=False, readout=None, refine=options)
        super().__init__([student.with_calibration(t.calibration) for t in teachers], recipe, device)
        self._options, sizes = options, [Frames.of(teacher, None) for teacher in teachers]
        with alone():
            found = [labelling_bytes(teacher, options, device) for teacher in teachers]
        self._labels = max(
            peak * min(2 * one.n * one.edges, augmentation.MAX_EDGES)
            for (peak, _), one in zip(found, sizes, strict=True)
        )
        self._targets = max(kept for _, kept in found)
        weights = (p for teacher in teachers for p in teacher.potential.parameters())
        self.networks += self._item * sum(p.numel() for p in weights)

    def _smaller(self) -> Iterator[Portions]:
        smallest = max(frames.largest for frames in self._frames)
        edges = max(frames.edges for frames in self._frames) * self._options.batch_size
        while edges > smallest:
            edges = max(edges / 2, smallest)
            yield Portions(edges=max(int(edges), 1))

    def _phases(self, portions: Portions) -> Iterator[tuple[str, float]]:
        yield "labels", self._labels
        yield "the distillation", self._distillation(self._options, portions.edges or np.inf)
