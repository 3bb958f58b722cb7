"""Targets on graphs, and the loss against them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
from ase import Atoms
from torch import Tensor

from ase_gffmerge.data.labels import energy_label, force_labels, frame_weight, stress_label
from ase_gffmerge.forcefield.conditioning import with_indices
from ase_gffmerge.graphs import Prediction, batch_graphs, build_graph, predict
from ase_gffmerge.graphs.graph import AtomGraph
from ase_gffmerge.inference.errors import relative_error
from ase_gffmerge.inference.predict import FramePredictions, predict_batches
from ase_gffmerge.models import Potential
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
    features : (n_atoms, n_features)
        Scalars after all blocks, which distillation may match; else without columns.
    """

    energy: Tensor
    forces: Tensor
    stress: Tensor
    weight: Tensor
    features: Tensor

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
    ) -> Self:
        """Give a graph with targets.

        Parameters
        ----------
        graph
            Without targets.
        energy, forces, stress, features
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


def validate(potential: Potential, graphs: Sequence[LabeledGraph], batch_size: int) -> dict[str, float]:
    """Force MAE (eV/Å) and energy MAE (eV/atom) over graphs with targets, each counting by its weight.

    Parameters
    ----------
    potential
        On its device.
    graphs
        At least one.
    batch_size
        Graphs per batch.
    """
    sums = torch.zeros(4, dtype=torch.float64)
    own = dealt(graphs, size=lambda graph: graph.n_edges)
    for start in range(0, len(own), batch_size):
        batch = batch_graphs(own[start : start + batch_size]).to(potential.device)
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
