"""Bytes per edge of the passes of a merge, counted while they run on a few frames of one specialist."""

from copy import deepcopy
from dataclasses import dataclass

import torch
from ase import Atoms
from torch import Tensor

from ase_gffmerge.data.frames import bare, spread
from ase_gffmerge.forcefield.force_field import ForceField
from ase_gffmerge.graphs import batch_graphs, build_graph, predict
from ase_gffmerge.graphs.derivatives import hessian_products
from ase_gffmerge.graphs.graph import AtomGraph, edge_vectors
from ase_gffmerge.merging.average import working_copies
from ase_gffmerge.merging.blockwise import LinearizedBlock
from ase_gffmerge.merging.calibration import (
    CalibrationBatch,
    CalibrationSet,
    advance,
    build_calibration,
    run_stage,
    stage_inputs,
)
from ase_gffmerge.merging.layerwise import align_layers
from ase_gffmerge.merging.recipe import DistillOptions, Recipe
from ase_gffmerge.merging.tangents import Dual, pushforward
from ase_gffmerge.models import Potential
from ase_gffmerge.models.affine_maps import adjustable_maps
from ase_gffmerge.models.base import Stage
from ase_gffmerge.runtime.memory import PeakMemory
from ase_gffmerge.training.config import TrainConfig
from ase_gffmerge.training.loss import LabeledGraph, distillation_loss, with_features

PROBED_EDGES = 400
"""Edges of the frames that are measured, at least one frame."""


@dataclass(frozen=True, kw_only=True)
class PerEdge:
    """Bytes per edge: what was measured.

    Attributes
    ----------
    held
        Of a calibration batch: states and scalars of specialist and merged model, geometry.
    layer
        While rows enter a layer.
    graphs, product
        Graphs of a linearised block, and these with a product.
    pass_value, pass_direction
        Of a pass through the network with derivatives: by itself, and for every direction.
    training, inference
        Gradient of a loss, of features and products of Hessians too where they are matched; energies and forces.
    """

    held: float
    layer: float
    graphs: float
    product: float
    pass_value: float
    pass_direction: float
    training: float
    inference: float


def measured(specialist: ForceField, recipe: Recipe, device: torch.device) -> PerEdge:
    """Count the bytes per edge of the passes of a merge on a few frames of one specialist.

    Parameters
    ----------
    specialist
        With calibration frames.
    recipe
        Directions of the derivatives.
    device
        Where.
    """
    (own,) = working_copies([specialist.with_calibration(_few(specialist))], device)
    potential = own.potential
    with torch.no_grad():
        (one,) = build_calibration([own], potential, [1.0], directions=recipe.directions)
    n_edges = sum(batch.graph.n_edges for batch in one.batches) or 1
    seen: set[object] = set()
    layer = graphs = product = 0
    for name, stage in potential.named_stages():
        kind = (type(stage), tuple(p.shape for p in stage.parameters()))
        if recipe.method != "mean" and kind not in seen:
            layer = max(layer, _layer_bytes(name, stage, one, recipe))
            if recipe.messages and adjustable_maps(stage):
                found = _block_bytes(stage, one, recipe)
                graphs, product = max(graphs, found[0]), max(product, found[1])
        seen.add(kind)
        with torch.no_grad():
            for batch in one.batches:
                batch.target = batch.merged = advance(stage, batch.target, batch)
                if stage.emits_scalars:
                    batch.target_scalars.append(pushforward(lambda *x: potential.scalars(x), batch.target))
    frames = batch_graphs([batch.graph for batch in one.batches])
    passes = [_pass_bytes(potential, frames, n) for n in (1, 3)] if recipe.readout else [0, 0]
    return PerEdge(
        held=sum(map(_held_bytes, one.batches)) / n_edges,
        layer=layer / n_edges,
        graphs=graphs / n_edges,
        product=product / n_edges,
        pass_value=(passes[0] - (passes[1] - passes[0]) / 2) / n_edges,
        pass_direction=(passes[1] - passes[0]) / 2 / n_edges,
        training=_training_bytes(potential, frames, recipe.refine) / n_edges if recipe.refine else 0.0,
        inference=_inference_bytes(potential, frames),
    )


def labelling_bytes(
    specialist: ForceField, options: DistillOptions, device: torch.device
) -> tuple[float, float]:
    """Count the bytes per edge while a teacher labels a few frames, and those of features and products that are kept.

    Parameters
    ----------
    specialist
        The teacher; 0 for one without calibration frames.
    options
        Which features it gives, and whether products of Hessians.
    device
        Where.
    """
    if not specialist.calibration:
        return 0.0, 0.0
    few = _few(specialist)
    (own,) = working_copies([specialist.with_calibration(few)], device)
    graphs = [build_graph(atoms, own.cutoff, dtype=own.potential.dtype) for atoms in few]
    graph, kept = batch_graphs(graphs).to(device), 0
    found = [_inference_bytes(own.potential, graph)]
    if options.feature_weight:
        with PeakMemory() as memory:
            features = _features(own.potential, graph, options, summed=True)
        kept += features.numel() * features.element_size()
        found.append(memory.peak / (graph.n_edges or 1))
    if options.hessian_weight:
        with PeakMemory() as memory:
            products = hessian_products(own.potential, graph, torch.ones_like(graph.positions))
        kept += 2 * products.numel() * products.element_size()
        found.append(memory.peak / (graph.n_edges or 1))
    return max(found), kept / (graph.n_edges or 1)


def _features(
    potential: Potential, graph: AtomGraph, options: DistillOptions, *, summed: bool = False
) -> Tensor:
    function = with_features(potential, options.feature_match, summed=summed)
    return predict(function, graph).readout_inputs[-1]


def _inference_bytes(potential: Potential, graph: AtomGraph) -> float:
    with PeakMemory() as memory:
        predict(potential.for_inference(), graph)
    return memory.peak / (graph.n_edges or 1)


def _few(specialist: ForceField) -> list[Atoms]:
    """Frames of :data:`PROBED_EDGES` together, at least one."""
    few: list[Atoms] = []
    n_edges = 0
    for atoms in spread(specialist.calibration, 20):
        few.append(bare(atoms))
        n_edges += build_graph(few[-1], specialist.cutoff).n_edges
        if n_edges >= PROBED_EDGES:
            break
    return few


def _layer_bytes(name: str, stage: Stage, calibration_set: CalibrationSet, recipe: Recipe) -> int:
    own = deepcopy(stage)
    with torch.no_grad(), PeakMemory() as memory:
        align_layers(name, own, [stage], [calibration_set], recipe, run=run_stage, inputs=stage_inputs)
    return memory.peak


def _block_bytes(stage: Stage, calibration_set: CalibrationSet, recipe: Recipe) -> tuple[int, int]:
    """What a linearised block keeps, and its peak with both products."""
    with PeakMemory() as memory:
        linear = LinearizedBlock(stage, [stage], [calibration_set], recipe)
        kept = memory.live
        linear.forward(linear.vjp(0, torch.ones_like(linear.residual[0])))
    return kept, memory.peak


def _pass_bytes(potential: Potential, graph: AtomGraph, n_directions: int) -> int:
    vectors = edge_vectors(graph)
    tangents = torch.ones(n_directions, *vectors.shape, dtype=vectors.dtype, device=vectors.device)
    with torch.no_grad(), PeakMemory() as memory:
        pushforward(lambda v: tuple(potential.features(v, graph)), Dual((vectors,), (tangents,)))
    return memory.peak


def _training_bytes(potential: Potential, graph: AtomGraph, options: DistillOptions) -> int:
    """Bytes of a gradient; what teachers' features take beyond the student's own is left out."""
    student = deepcopy(potential.with_core_repulsion(None)).requires_grad_(True)
    batch = LabeledGraph.of(
        graph,
        energy=graph.cell.new_zeros(graph.n_structures),
        forces=torch.zeros_like(graph.positions),
        stress=torch.zeros_like(graph.cell),
        features=_features(student, graph, options) if options.feature_weight else None,
        curvature=graph.positions.repeat(1, 2) if options.hessian_weight else None,
    )
    loss = distillation_loss(TrainConfig(stress_weight=0.0), options)
    with PeakMemory() as memory:
        loss(student, batch, batch).backward()
    return memory.peak


def _held_bytes(batch: CalibrationBatch) -> int:
    """Bytes of a batch whose merged model has the specialist's tensors: here they count twice."""
    duals = [batch.target, *batch.target_scalars]
    tensors = [*batch.geometry.value, *batch.geometry.tangent]
    tensors += [tensor for dual in duals for tensor in (*dual.value, *dual.tangent) for _ in range(2)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
