"""Calibration frames in batches, and what enters the layers of specialists and merged model on them.

What enters the layers of a block: activations of a specialist or of the merged model on calibration frames.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice

import numpy as np
import torch
from ase import Atoms
from torch import Tensor, nn

from ase_gffmerge.forcefield.force_field import ForceField
from ase_gffmerge.graphs import batch_graphs, build_graph, predict
from ase_gffmerge.graphs.graph import AtomGraph, edge_vectors
from ase_gffmerge.inference.errors import FORCE_FLOOR, without_shifts
from ase_gffmerge.merging.recipe import ReadoutOptions
from ase_gffmerge.merging.tangents import Dual, Tensors, pushforward
from ase_gffmerge.models.affine_maps import is_affine, rows_entering
from ase_gffmerge.models.base import Geometry, Potential, Stage
from ase_gffmerge.runtime.devices import chunks
from ase_gffmerge.runtime.distributed import gathered, is_mine


@dataclass
class CalibrationBatch:
    """One batch of one specialist's frames, or a part of one, walked stage by stage.

    Attributes
    ----------
    graph
        The batch.
    number
        Which batch of the specialist it is, or belongs to.
    edges
        Edge indices; its parts that depend on the positions are replaced by those in ``geometry``.
    geometry
        These parts (the same for all models).
    merged, target
        States of the merged model and of the specialist before the current stage.
    merged_scalars, target_scalars
        Scalars that the stages so far left for the readout.
    """

    graph: AtomGraph
    number: int
    edges: Geometry
    geometry: Dual
    merged: Dual
    target: Dual
    merged_scalars: list[Dual] = field(default_factory=list)
    target_scalars: list[Dual] = field(default_factory=list)

    def split(self, tensors: Tensors) -> tuple[Tensors, Geometry]:
        """Arguments of a stage from one tuple, a state followed by the parts of the geometry."""
        n = len(tensors) - len(self.geometry.value)
        return tensors[:n], self.edges.with_parts(tensors[n:])


@dataclass
class CalibrationSet:
    """All batches of one specialist.

    Attributes
    ----------
    specialist, index, weight
        Whose frames, its specialist index, and how much it counts.
    batches
        Its calibration frames, or as many of them as the layers need; where several processes share the work
        (:mod:`~ase_gffmerge.runtime.distributed`), those of this one.
    n_batches
        How many different numbers batches have in all.
    """

    specialist: ForceField
    index: int
    weight: float
    batches: list[CalibrationBatch]
    n_batches: int

    @cached_property
    def mean_square_force(self) -> float:
        """Mean square of the specialist's force components on its frames, (eV/Å)^2, at least that of the floor."""
        forces = [label[0] for label in self._labels]
        return max(float(torch.cat(forces).square().mean()), FORCE_FLOOR**2)

    def mean_square_target(self, options: ReadoutOptions) -> float:
        """Mean square per coordinate of what a readout is fitted to on the specialist's frames, (eV/Å)^2.

        That is of the force components, or, where these are silent by symmetry, of strain derivatives or energies (less
        shifts of the elements) with their weights, if those are larger.
        """
        _, strains, energies, counts, elements = (torch.cat(p) for p in zip(*self._labels, strict=True))
        strain = options.stress_weight**2 * float(strains.mean())
        numbers = [part.numpy() for part in elements.split(counts.tolist())]
        spread = without_shifts(energies.numpy(), numbers)
        energy = options.energy_weight**2 * float(np.square(spread).mean()) / 3
        return max(self.mean_square_force, strain, energy)

    @cached_property
    def _labels(self) -> list[tuple[Tensor, ...]]:
        """Of all batches: forces; strain derivatives (mean squares), energies per atom, sizes of frames; elements."""
        own: dict[tuple[int, ...], tuple[Tensor, ...]] = {}
        for place, batch in enumerate(self.batches):
            graph, found = batch.graph, predict(self.specialist.potential, batch.graph)
            counts, solid = (
                torch.bincount(graph.structure_index),
                torch.linalg.matrix_rank(graph.cell.double()) == 3,
            )
            strains = found.strain_derivative.double().square().sum(dim=(1, 2)) * solid / (3 * counts)
            label = (
                found.forces.double(),
                strains,
                found.energy.double() / counts,
                counts,
                graph.atomic_numbers,
            )
            own[batch.number, place] = tuple(part.cpu() for part in label)
        return gathered(own)


MAX_EDGES, EDGES_PER_ATOM = 12_000, 24
"""Size of a batch, where an atom counts as that many edges at least: memory, and what a block's correction is taken from."""

MAX_BATCHES = 4
"""Batches per specialist: far more rows than a layer has coefficients. The readout sees all frames."""


def build_calibration(
    specialists: Sequence[ForceField],
    merged: Potential,
    weights: Sequence[float],
    *,
    directions: int,
    max_edges: int | None = None,
) -> list[CalibrationSet]:
    """Embed the calibration frames of all specialists in their own models and in the merged one.

    Parameters
    ----------
    specialists, weights
        Whose frames, and how much each counts.
    merged
        The merged model before its first stage is aligned.
    directions
        Random displacements of all atoms along which derivatives are taken.
    max_edges
        Edges that are evaluated at once: a batch with more is walked in parts of whole frames, with the same result.
    """
    sets = []
    for k, (specialist, weight) in enumerate(zip(specialists, weights, strict=True)):
        one = CalibrationSet(specialist, k, weight, [], 0)
        for number, group in enumerate(_shuffled(specialist, k)):
            one.n_batches += 1
            if is_mine(number + k):
                one.batches += _embedded_parts(specialist, merged, group, number, directions, max_edges)
        sets.append(one)
    return sets


def calibration_graphs(specialist: ForceField, *, index: int = 0) -> Iterator[AtomGraph]:
    """Graphs of a specialist's calibration frames in shuffled batches, up to :data:`MAX_BATCHES`, on its device."""
    for group in _shuffled(specialist, index):
        yield batch_graphs(group).to(specialist.potential.device)


def _shuffled(specialist: ForceField, index: int) -> Iterator[list[AtomGraph]]:
    order = np.random.default_rng(0).permutation(len(specialist.calibration))
    graphs = (_graph(specialist, index, specialist.calibration[i]) for i in order)
    return islice(chunks(graphs, MAX_EDGES, size=_size), MAX_BATCHES)


def _graph(specialist: ForceField, index: int, atoms: Atoms) -> AtomGraph:
    graph = build_graph(atoms, specialist.cutoff, dtype=specialist.potential.dtype)
    return replace(graph, specialist=torch.full_like(graph.specialist, index))


def _size(graph: AtomGraph) -> int:
    return max(graph.n_edges, EDGES_PER_ATOM * len(graph))


def _embedded_parts(
    specialist: ForceField,
    merged: Potential,
    group: list[AtomGraph],
    number: int,
    directions: int,
    max_edges: int | None,
) -> Iterator[CalibrationBatch]:
    displacements = _displacements(sum(map(len, group)), directions)
    for part in chunks(group, max_edges or sum(map(_size, group)), size=lambda graph: graph.n_edges):
        graph = batch_graphs(part).to(specialist.potential.device)
        own, displacements = displacements[:, : len(graph)], displacements[:, len(graph) :]
        yield _embedded(specialist, merged, graph, number, own.to(graph.positions))


def _embedded(
    specialist: ForceField, merged: Potential, graph: AtomGraph, number: int, displacements: Tensor
) -> CalibrationBatch:
    potential, directions = specialist.potential, len(displacements)
    positions = Dual((graph.positions,), (displacements,) if directions else ())
    geometry = pushforward(lambda r: potential.edge_functions(edge_vectors(graph, r)), positions)
    ours, theirs = (_constant(model.embed(graph), directions) for model in (merged, potential))
    edges = potential.geometry(edge_vectors(graph), graph)
    return CalibrationBatch(graph, number, edges, geometry, ours, theirs)


def _displacements(n_atoms: int, n: int) -> Tensor:
    """Random displacements of all atoms (n, n_atoms, 3), unit normal, the same whatever the order of specialists."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, n_atoms, 3, generator=generator, dtype=torch.float64)


def _constant(state: Tensors, directions: int) -> Dual:
    """A state that does not depend on the positions."""
    return Dual(tuple(state), tuple(x.new_zeros(directions, *x.shape) for x in state) if directions else ())


Run = Callable[[nn.Module, CalibrationBatch, Tensors], Tensor | Tensors]
"""``run(block, batch, tensors)`` evaluates a block, a stage or the readout, on the tensors of :data:`Inputs`."""

Inputs = Callable[[CalibrationBatch, bool], Dual]
"""``inputs(batch, of_merged)`` is what enters the block: in the merged model (``True``) or in the specialist."""


def run_stage(stage: nn.Module, batch: CalibrationBatch, tensors: Tensors) -> Tensors:
    """Evaluate a stage.

    Parameters
    ----------
    stage
        Of the merged model or of a specialist.
    batch
        Frames.
    tensors
        Values of :func:`stage_inputs`.
    """
    return tuple(stage(*batch.split(tensors)))


def stage_inputs(batch: CalibrationBatch, of_merged: bool) -> Dual:
    """State before the stage, and geometry."""
    return (batch.merged if of_merged else batch.target) + batch.geometry


def advance(stage: Stage, state: Dual, batch: CalibrationBatch) -> Dual:
    """State after a stage.

    Parameters
    ----------
    stage
        Of the merged model or of a specialist.
    state
        Before it.
    batch
        Frames.
    """
    return pushforward(lambda *x: run_stage(stage, batch, x), state + batch.geometry)


def entering(block: nn.Module, name: str, batch: CalibrationBatch, inputs: Dual, *, run: Run) -> Dual:
    """What enters a layer of a block, with its directional derivatives.

    Parameters
    ----------
    block, name
        The block, and the layer's name in it.
    batch
        Frames.
    inputs
        What enters the block.
    run
        Evaluates the block.
    """
    layer = block.get_submodule(name)
    return pushforward(lambda *x: layer_input(layer, lambda: run(block, batch, x)), inputs)


class _Reached(Exception):
    """Raised by a hook to stop a forward pass at the layer of interest."""


def layer_input(module: nn.Module, run: Callable[[], object]) -> Tensor:
    """Run a model up to ``module`` and return what enters it."""
    caught: list[Tensor] = []

    def stop(_: nn.Module, inputs: tuple[object, ...]) -> None:
        caught.append(rows_entering(module, inputs))
        raise _Reached

    handle = module.register_forward_pre_hook(stop)
    try:
        run()
    except _Reached:
        pass
    finally:
        handle.remove()
    return caught[0]


def layer_inputs(
    root: nn.Module, run: Callable[[], object], *, wanted: Callable[[nn.Module], bool] = is_affine
) -> dict[str, Tensor]:
    """What enters the layers of ``root`` while ``run`` evaluates it, in the order of their execution.

    Layers that are given one and the same object share one tensor.

    Parameters
    ----------
    root
        Module whose layers are watched.
    run
        Evaluates it.
    wanted
        Which of its modules are watched; default: affine layers.
    """
    caught: dict[str, Tensor] = {}
    alive: list[object] = []  # so that no other object takes an identity
    rows: dict[int, Tensor] = {}

    def note(name: str) -> Callable[[nn.Module, tuple[object, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[object, ...]) -> None:
            key = id(inputs[0])
            if key not in rows:
                alive.append(inputs[0])
                rows[key] = rows_entering(module, inputs)
            caught[name] = rows[key]

        return hook

    handles = [
        module.register_forward_pre_hook(note(name))
        for name, module in root.named_modules()
        if wanted(module)
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return caught


def affine_layers(root: nn.Module, run: Callable[[], object]) -> list[str]:
    """Names of the affine layers of ``root`` in the order in which ``run`` executes them."""
    return list(layer_inputs(root, run))
