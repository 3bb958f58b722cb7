"""Targets on graphs, and the loss against them; features of a student that distillation matches with its teachers'."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
from ase import Atoms
from torch import Tensor, nn

from ase_gffmerge.data.labels import energy_label, force_labels, frame_weight, stress_label
from ase_gffmerge.errors import IncompatibleSpecialistsError
from ase_gffmerge.forcefield.conditioning import with_indices
from ase_gffmerge.graphs import Prediction, batch_graphs, build_graph, predict
from ase_gffmerge.graphs.derivatives import EdgeFunction, hessian_products
from ase_gffmerge.graphs.graph import AtomGraph, Topology
from ase_gffmerge.inference.errors import relative_error
from ase_gffmerge.inference.predict import FramePredictions, edge_batches, predict_batches
from ase_gffmerge.merging.recipe import DistillOptions, FeatureMatch
from ase_gffmerge.models import Potential
from ase_gffmerge.models.base import State
from ase_gffmerge.runtime.distributed import add_up, dealt
from ase_gffmerge.training.config import TrainConfig


@dataclass(frozen=True, kw_only=True, eq=False)
class LabeledGraph(AtomGraph):
    """A graph, or a batch, with what a potential is trained on.

    Attributes
    ----------
    energy : (n_structures,) eV
        Less the reference energies.
    forces : (n_atoms, 3) eV/Å
    stress : (n_structures, 3, 3) eV/Å^3
        NaN where it is not known.
    weight : (n_structures,)
        How much a structure counts in the loss.
    features : (n_atoms or n_edges, ..., n_features)
        What distillation may match (:func:`with_features`); else without columns.
    curvature : (n_atoms, 6)
        A direction, and the product of the Hessian with it in eV/Å^2, which distillation may match; else without columns.
    """

    energy: Tensor
    forces: Tensor
    stress: Tensor
    weight: Tensor
    features: Tensor
    curvature: Tensor

    @classmethod
    def of(
        cls,
        graph: AtomGraph,
        *,
        energy: Tensor,
        forces: Tensor,
        stress: Tensor,
        weight: float = 1.0,
        features: Tensor | None = None,
        curvature: Tensor | None = None,
    ) -> Self:
        """Give a graph with targets.

        Parameters
        ----------
        graph
            Without targets.
        energy, forces, stress, features, curvature
            As the attributes of the class.
        weight
            Of the one structure.
        """
        return cls(
            **vars(graph),
            energy=energy,
            forces=forces,
            stress=stress,
            weight=torch.full_like(energy, weight),
            features=forces[:, :0] if features is None else features,
            curvature=forces[:, :0] if curvature is None else curvature,
        )


def labelled_graph(atoms: Atoms, potential: Potential, references: np.ndarray) -> LabeledGraph:
    """Graph of a labelled frame with its labels as targets.

    Parameters
    ----------
    atoms
        With energy and forces, and perhaps stress.
    potential
        Whose cutoff, precision and specialist indices are used.
    references
        Reference energies (n_species,) in eV.
    """
    prepared = with_indices(atoms, potential.hyper.n_embeddings, default=0)
    graph = build_graph(prepared, potential.hyper.cutoff, dtype=potential.dtype)
    rows = potential.species_row.cpu().numpy()[atoms.numbers]
    energy = energy_label(atoms) - references[rows].sum()
    stress = stress_label(atoms)
    stress = np.full((3, 3), np.nan) if stress is None else stress
    return LabeledGraph.of(
        graph,
        energy=torch.tensor([energy], dtype=potential.dtype),
        forces=torch.as_tensor(force_labels(atoms), dtype=potential.dtype),
        stress=torch.as_tensor(stress, dtype=potential.dtype)[None],
        weight=frame_weight(atoms),
    )


def labelled_graphs(frames: Sequence[Atoms], potential: Potential) -> list[LabeledGraph]:
    """One :func:`labelled_graph` per frame, for the reference energies of ``potential``."""
    references = potential.references.cpu().numpy()
    return [labelled_graph(atoms, potential, references) for atoms in frames]


def weigh(
    groups: Sequence[Sequence[LabeledGraph]], scales: Sequence[float] | None = None
) -> list[list[LabeledGraph]]:
    r"""Scale weights of graphs so that every group of them counts the same; within a group their ratios stay.

    .. math:: w_k = \frac{\bar s}{s_k}\,\frac{\sum_j N_j}{K N_k}

    is their mean over the :math:`N_k` atoms of group k, whose scale of forces is :math:`s_k` (``scales``, eV/Å; default:
    equal).
    """
    scales = scales or [1.0] * len(groups)
    n_atoms = [sum(len(graph) for graph in group) for group in groups]
    before = [sum(float(graph.weight) * len(graph) for graph in group) for group in groups]
    factors = [
        sum(scales) / len(scales) / scale * sum(n_atoms) / (len(groups) * n) / (weight / n or 1.0)
        for n, scale, weight in zip(n_atoms, scales, before, strict=True)
    ]
    return [
        [replace(graph, weight=graph.weight * factor) for graph in group]
        for group, factor in zip(groups, factors, strict=True)
    ]


def _reduced_energy(potential: Potential, batch: LabeledGraph, prediction: Prediction) -> Tensor:
    """Predicted energies (n_structures,) less the reference energies, in the type of the targets."""
    rows = potential.species_row[batch.atomic_numbers]
    shift = torch.zeros_like(prediction.energy).index_add(
        0, batch.structure_index, potential.references[rows]
    )
    return (prediction.energy - shift).to(batch.energy.dtype)


def loss_terms(
    potential: Potential,
    batch: LabeledGraph,
    config: TrainConfig,
    *,
    whole: LabeledGraph | None = None,
    prediction: Prediction | None = None,
) -> Tensor:
    """Weighted mean absolute errors of energy per atom, force vectors (2-norm) and stress components.

    Parameters
    ----------
    potential
        What is trained.
    batch
        Structures with targets.
    config
        The weights of the terms.
    whole
        The batch that ``batch`` is a part of: means are over its structures and atoms, so that the parts' losses add up to
        that of the whole. Default: ``batch`` itself.
    prediction
        Of the potential for the batch, differentiable; default: it is evaluated here.
    """
    whole = whole or batch
    prediction = prediction or predict(potential, batch, differentiable=True)
    n_atoms = torch.bincount(batch.structure_index, minlength=len(batch.energy))
    energy = (_reduced_energy(potential, batch, prediction) - batch.energy).abs() / n_atoms
    forces = (prediction.forces - batch.forces).square().sum(dim=-1).add(1e-12).sqrt()
    loss = config.energy_weight * (batch.weight * energy).sum() / whole.n_structures
    loss = loss + config.force_weight * (batch.weight[batch.structure_index] * forces).sum() / len(whole)
    labelled = torch.isfinite(batch.stress).all(dim=(1, 2))
    if config.stress_weight and labelled.any():
        volume = torch.linalg.det(batch.cell[labelled]).abs()[:, None, None]
        stress = (prediction.strain_derivative[labelled] / volume - batch.stress[labelled]).abs()
        n_components = 9 * int(torch.isfinite(whole.stress).all(dim=(1, 2)).sum())
        loss = (
            loss + config.stress_weight * (batch.weight[labelled, None, None] * stress).sum() / n_components
        )
    return loss


PROJECTION = "projection"
"""Name of the student's layer that maps its features to those of its teachers, while it learns."""


def with_features(potential: Potential, match: FeatureMatch, *, summed: bool = False) -> EdgeFunction:
    """Give a potential's energies, and behind the readout's inputs the features that distillation matches.

    Parameters
    ----------
    potential
        Of teacher or student.
    match
        See :class:`~ase_gffmerge.merging.recipe.DistillOptions`; edges and vectors are those of the last block that has any.
    summed
        Whether ``edges-to-nodes`` are sums over the edges of every atom, as of a teacher, or scalars, as of a student.

    Raises
    ------
    IncompatibleSpecialistsError
        When called, where the architecture has no such features.
    """

    def function(vectors: Tensor, graph: Topology) -> tuple[Tensor, list[Tensor]]:
        states: list[State] = []
        hooks = [
            stage.register_forward_hook(lambda _, given, made: states.append(made))
            for stage in potential.stages
        ]
        try:
            energies, scalars = potential(vectors, graph)
        finally:
            for hook in hooks:
                hook.remove()
        if match == "nodes" or (match == "edges-to-nodes" and not summed):
            return energies, [*scalars, torch.cat(scalars, dim=-1)]
        if match == "vectors":
            found = [x for x in map(potential.vectors, states) if x is not None]
        else:
            n = potential.node_entries
            found = [state[n] for state in states if len(state) > n and len(state[n]) == graph.n_edges]
        if not found:
            kind = match.split("-")[0]
            raise IncompatibleSpecialistsError(
                f"a {potential.architecture} network has no features of {kind} to match; set feature_match to nodes, or "
                "feature_weight to 0"
            )
        features = found[-1]
        if match == "edges-to-nodes":
            features = features.new_zeros(len(graph), features.shape[1]).index_add(
                0, graph.edge_index[1], features
            )
        return energies, [*scalars, features]

    return function


def add_projection(
    student: Potential, graphs: Sequence[LabeledGraph], match: FeatureMatch, *, alike: bool
) -> None:
    """Give a student a layer :data:`PROJECTION` that maps its features to those of its teachers.

    Parameters
    ----------
    student
        To be trained.
    graphs
        Of all teachers, with features.
    match
        Which features; those of vectors are mapped without a bias, so that they stay vectors.
    alike
        Whether student and teachers are of one kind and size: then features are compared as they are.

    Raises
    ------
    IncompatibleSpecialistsError
        When the teachers' features differ in size, or the student has none.
    """
    if alike and match != "edges-to-nodes":
        return
    size, *others = sorted({graph.features.shape[-1] for graph in graphs})
    if others:
        raise IncompatibleSpecialistsError(
            f"features of the specialists differ in size ({[size, *others]}); set feature_weight to 0"
        )
    function = with_features(student, match)
    own = predict(function, graphs[0].to(student.device)).readout_inputs[-1].shape[-1]
    layer = nn.Linear(own, size, bias=match != "vectors").to(dtype=student.dtype, device=student.device)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) / own**0.5)
        if layer.bias is not None:
            layer.bias.zero_()
    student.add_module(PROJECTION, layer)


def distillation_loss(
    config: TrainConfig, options: DistillOptions
) -> Callable[[Potential, LabeledGraph, LabeledGraph], Tensor]:
    """Errors of energies, forces and stresses; of features, and of products of Hessians, relative to their size."""

    def loss(potential: Potential, batch: LabeledGraph, whole: LabeledGraph) -> Tensor:
        matching = options.feature_weight > 0
        function = with_features(potential, options.feature_match) if matching else potential
        prediction = predict(function, batch, differentiable=True)
        terms = loss_terms(potential, batch, config, whole=whole, prediction=prediction)
        atoms = batch.weight[batch.structure_index]
        if matching:
            features = prediction.readout_inputs[-1]
            if PROJECTION in potential._modules:
                features = potential.get_submodule(PROJECTION)(features)
            weight = atoms[batch.edge_index[1]] if options.feature_match == "edges" else atoms
            difference = (features - batch.features).abs().flatten(1).sum(dim=1)
            terms = terms + options.feature_weight * (weight * difference).sum() / _size(whole.features)
        if options.hessian_weight:
            directions, products = batch.curvature.split(3, dim=1)
            found = hessian_products(potential, batch, directions, differentiable=True)
            difference = (found - products).abs().sum(dim=1)
            terms = terms + options.hessian_weight * (atoms * difference).sum() / _size(
                whole.curvature[:, 3:]
            )
        return terms

    return loss


def _size(targets: Tensor) -> float:
    return float(targets.abs().sum()) or 1.0


def validate(potential: Potential, graphs: Sequence[LabeledGraph], batch_size: int) -> dict[str, float]:
    """Force MAE (eV/Å) and energy MAE (eV/atom) over graphs with targets, each counting by its weight.

    Parameters
    ----------
    potential
        On its device.
    graphs
        At least one.
    batch_size
        Most graphs per batch; fewer of many edges (:func:`.edge_batches`).
    """
    sums = torch.zeros(4, dtype=torch.float64)
    own = dealt(graphs, size=lambda graph: graph.n_edges)
    batches = [own[start : start + batch_size] for start in range(0, len(own), batch_size)]
    for part in (part for batch in batches for part in edge_batches(batch, device=potential.device)):
        batch = batch_graphs(part).to(potential.device)
        prediction = predict(potential, batch)
        n_atoms = torch.bincount(batch.structure_index)
        error = (_reduced_energy(potential, batch, prediction) - batch.energy).abs() / n_atoms
        forces = batch.weight[batch.structure_index, None] * (prediction.forces - batch.forces).abs()
        found = (batch.weight * error).double().sum(), forces.double().sum()
        sums += torch.tensor([*map(float, found), len(error), forces.numel()], dtype=torch.float64)
    add_up(sums)
    energy, force, n_energies, n_forces = sums.tolist()
    return {"force_mae": force / n_forces, "energy_mae": energy / n_energies}


def relative_error_on(potential: Potential, graphs: Sequence[LabeledGraph]) -> float:
    """Error of a potential relative to the size of the targets, see :mod:`ase_gffmerge.inference.errors`."""
    device, cells = potential.device, [graph.cell[0].double() for graph in graphs]
    numbers = [graph.atomic_numbers.numpy() for graph in graphs]
    known = [bool(torch.isfinite(graph.stress).all()) for graph in graphs]
    found = predict_batches(lambda batch: (predict(potential, batch), None), graphs, device=device)
    predictions = [prediction for prediction, _ in found]
    volumes = [float(torch.linalg.det(cell).abs()) for cell in cells]
    return relative_error(
        FramePredictions(
            numbers=numbers,
            energies=np.array([p.energy.item() for p in predictions]),
            forces=[p.forces.double().numpy() for p in predictions],
            stresses=[
                p.strain_derivative[0].double().numpy() / volume if there else None
                for p, volume, there in zip(predictions, volumes, known, strict=True)
            ],
        ),
        FramePredictions(
            numbers=numbers,
            energies=np.array([graph.energy.item() for graph in graphs]),
            forces=[graph.forces.double().numpy() for graph in graphs],
            stresses=[
                graph.stress[0].double().numpy() if there else None
                for graph, there in zip(graphs, known, strict=True)
            ],
        ),
    )
