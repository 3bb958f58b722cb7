r"""Calibration frames in batches, copies of them, and what enters the layers of specialists and merged model on them.

What enters the layers of a block: activations of a specialist or of the merged model on calibration frames.

Copies of a specialist's calibration frames, which the specialist labels for free.

Around every frame the merged potential must follow the specialist's surface, so each frame brings a few neighbours. They
are visited by short Langevin dynamics of the specialist itself, started at the frame: stiff bonds move little, soft
torsions far, as in any dynamics to come. The distribution of positions does not depend on the masses, so all atoms
weigh the same 12 u and light ones do not limit the time step. Copies displaced at random are the alternative.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice

import numpy as np
import torch
from ase import Atoms
from torch import Tensor, nn

from ase_gffmerge.data.frames import bare, displaced
from ase_gffmerge.dynamics.batched_md import run_replicas
from ase_gffmerge.forcefield.force_field import ForceField
from ase_gffmerge.graphs import Prediction, batch_graphs, build_graph, predict
from ase_gffmerge.graphs.graph import AtomGraph, edge_vectors
from ase_gffmerge.inference.errors import FORCE_FLOOR, without_shifts
from ase_gffmerge.merging.recipe import AugmentationOptions, ReadoutOptions
from ase_gffmerge.merging.tangents import Dual, Tensors, pushforward
from ase_gffmerge.models.affine_maps import is_affine, rows_entering
from ase_gffmerge.models.base import Geometry, Potential, Stage
from ase_gffmerge.runtime.devices import chunks


@dataclass
class CalibrationBatch:
    """One batch of one specialist's frames, walked stage by stage.

    Attributes
    ----------
    graph
        The batch.
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
        Its calibration frames, or as many of them as the layers need.
    """

    specialist: ForceField
    index: int
    weight: float
    batches: list[CalibrationBatch]

    @cached_property
    def mean_square_force(self) -> float:
        """Mean square of the specialist's force components on its frames, (eV/Å)^2, at least that of the floor."""
        forces = [prediction.forces for prediction in self._predictions]
        return max(float(torch.cat(forces).double().square().mean()), FORCE_FLOOR**2)

    def mean_square_target(self, options: ReadoutOptions) -> float:
        """Mean square per coordinate of what a readout is fitted to on the specialist's frames, (eV/Å)^2.

        That is of the force components, or, where these are silent by symmetry, of strain derivatives or energies (less
        shifts of the elements) with their weights, if those are larger.
        """
        strains, energies, numbers = [], [], []
        for prediction, batch in zip(self._predictions, self.batches, strict=True):
            counts = torch.bincount(batch.graph.structure_index)
            solid = torch.linalg.matrix_rank(batch.graph.cell.double()) == 3
            square = prediction.strain_derivative.double().square().sum(dim=(1, 2)) * solid
            strains.append(square / (3 * counts))
            energies.append((prediction.energy.double() / counts).cpu().numpy())
            numbers += [part.cpu().numpy() for part in batch.graph.atomic_numbers.split(counts.tolist())]
        strain = options.stress_weight**2 * float(torch.cat(strains).mean())
        spread = without_shifts(np.concatenate(energies), numbers)
        energy = options.energy_weight**2 * float(np.square(spread).mean()) / 3
        return max(self.mean_square_force, strain, energy)

    @cached_property
    def _predictions(self) -> list[Prediction]:
        return [predict(self.specialist.potential, batch.graph) for batch in self.batches]


MAX_EDGES, EDGES_PER_ATOM = 12_000, 24
"""Size of a batch, where an atom counts as that many edges at least: memory, and what a block's correction is taken from."""

MAX_BATCHES = 4
"""Batches per specialist: far more rows than a layer has coefficients. The readout sees all frames."""


def build_calibration(
    specialists: Sequence[ForceField], merged: Potential, weights: Sequence[float], *, directions: int
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
    """
    return [
        CalibrationSet(specialist, k, weight, [_embedded(specialist, merged, g, directions) for g in graphs])
        for k, (specialist, weight) in enumerate(zip(specialists, weights, strict=True))
        for graphs in [calibration_graphs(specialist, index=k)]
    ]


def calibration_graphs(specialist: ForceField, *, index: int = 0) -> Iterator[AtomGraph]:
    """Graphs of a specialist's calibration frames in shuffled batches, up to :data:`MAX_BATCHES`, on its device."""
    order = np.random.default_rng(0).permutation(len(specialist.calibration))
    graphs = [_graph(specialist, index, specialist.calibration[i]) for i in order]
    for group in islice(chunks(graphs, MAX_EDGES, size=_size), MAX_BATCHES):
        yield batch_graphs(group).to(specialist.potential.device)


def _graph(specialist: ForceField, index: int, atoms: Atoms) -> AtomGraph:
    graph = build_graph(atoms, specialist.cutoff, dtype=specialist.potential.dtype)
    return replace(graph, specialist=torch.full_like(graph.specialist, index))


def _size(graph: AtomGraph) -> int:
    return max(graph.n_edges, EDGES_PER_ATOM * len(graph))


def _embedded(
    specialist: ForceField, merged: Potential, graph: AtomGraph, directions: int
) -> CalibrationBatch:
    potential = specialist.potential
    positions = Dual((graph.positions,), (_displacements(graph.positions, directions),) if directions else ())
    geometry = pushforward(lambda r: potential.edge_functions(edge_vectors(graph, r)), positions)
    ours, theirs = (_constant(model.embed(graph), directions) for model in (merged, potential))
    return CalibrationBatch(graph, potential.geometry(edge_vectors(graph), graph), geometry, ours, theirs)


def _displacements(positions: Tensor, n: int) -> Tensor:
    """Random displacements of all atoms (n, n_atoms, 3), unit normal, the same whatever the order of specialists."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, *positions.shape, generator=generator, dtype=torch.float64).to(positions)


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


MASS, TIMESTEP, FRICTION = 12.0, 2.0, 0.05
"""Of every atom in u; fs; 1/fs."""


def with_copies(
    specialist: ForceField, frames: Sequence[Atoms], options: AugmentationOptions, *, n_copies: int
) -> list[Atoms]:
    """Frames followed by copies of each, fewer where dynamics broke a structure.

    Parameters
    ----------
    specialist
        Whose dynamics visits the copies.
    frames
        Where they start.
    options
        Temperature and interval, or random displacements at temperature 0.
    n_copies
        Of every frame.
    """
    originals = [bare(atoms) for atoms in frames]
    if not n_copies or not frames:
        return originals
    if options.temperature:
        return [*originals, *visited(specialist, originals, options, n_copies=n_copies)]
    rng = np.random.default_rng(options.seed)
    return [
        *originals,
        *(
            displaced(a, rattle=options.displacement, strain=0.0, rng=rng)
            for _ in range(n_copies)
            for a in originals
        ),
    ]


def visited(
    specialist: ForceField, frames: Sequence[Atoms], options: AugmentationOptions, *, n_copies: int
) -> list[Atoms]:
    """What the specialist's dynamics visits from every frame.

    Parameters
    ----------
    specialist, frames, n_copies
        As for :func:`with_copies`.
    options
        Temperature, and the interval between visited structures.
    """
    every = max(round(options.interval / TIMESTEP), 1)
    starts = [atoms.copy() for atoms in frames]
    for atoms in starts:
        atoms.set_masses(np.full(len(atoms), MASS))
    seeds = [(options.seed, k) for k in range(len(starts))]  # of a replica, whatever the group
    sizes = _edge_counts(specialist, starts)
    groups = chunks(zip(starts, seeds, sizes, strict=True), MAX_EDGES, size=lambda one: one[2])
    runs = [
        run
        for group in groups
        for run in run_replicas(
            specialist.potential,
            [atoms for atoms, _, _ in group],
            ensemble="nvt",
            temperature=options.temperature,
            timestep=TIMESTEP,
            steps=every * n_copies,
            every=every,
            friction=FRICTION,
            seed=[seed for _, seed, _ in group],
        )
    ]
    return [bare(atoms) for run in runs for atoms in run.frames[1:]]


def copies_per_frame(specialist: ForceField, frames: Sequence[Atoms], options: AugmentationOptions) -> int:
    """How many copies of every frame stay within a number of edges, at least one where any are wanted.

    Parameters
    ----------
    specialist
        Whose cutoff counts the edges.
    frames
        All frames that will be copied.
    options
        ``copies`` and ``max_copied_edges``.
    """
    if options.copies <= 1:
        return options.copies
    n_edges = sum(_edge_counts(specialist, frames))
    return min(options.copies, max(options.max_copied_edges // max(n_edges, 1), 1))


def _edge_counts(specialist: ForceField, frames: Sequence[Atoms]) -> list[int]:
    return [build_graph(atoms, specialist.cutoff).n_edges for atoms in frames]
