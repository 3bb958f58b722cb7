"""Targets on graphs, and the loss against them."""

from collections.abc import Sequence

import numpy as np
import torch
from ase import Atoms
from torch import Tensor
from torch_geometric.data import Batch, Data

from ase_gffmerge.forcefield.conditioning import with_indices
from ase_gffmerge.graphs import Prediction, batch_graphs, build_graph, predict
from ase_gffmerge.models import Potential
from ase_gffmerge.training.config import TrainConfig


def labelled_graph(atoms: Atoms, potential: Potential, references: np.ndarray) -> Data:
    """Graph with targets ``energy`` (1,) less references, ``forces`` (n_atoms, 3), ``stress`` (1, 3, 3), ``weight`` (1,)."""
    prepared = with_indices(atoms, potential.hyper.n_embeddings, default=0)
    graph = build_graph(prepared, potential.hyper.cutoff, dtype=potential.dtype)
    rows = potential.species_row.cpu().numpy()[atoms.numbers]
    energy = atoms.get_potential_energy() - references[rows].sum()
    graph.energy = torch.tensor([energy], dtype=potential.dtype)
    graph.forces = torch.as_tensor(atoms.get_forces(apply_constraint=False), dtype=potential.dtype)
    has_stress = atoms.cell.rank == 3 and atoms.calc is not None and "stress" in atoms.calc.results
    stress = atoms.get_stress(voigt=False) if has_stress else np.full((3, 3), np.nan)
    graph.stress = torch.as_tensor(stress, dtype=potential.dtype)[None]
    graph.weight = torch.ones(1, dtype=potential.dtype)
    return graph


def labelled_graphs(frames: Sequence[Atoms], potential: Potential) -> list[Data]:
    """One :func:`labelled_graph` per frame, for the reference energies of ``potential``."""
    references = potential.references.cpu().numpy()
    return [labelled_graph(atoms, potential, references) for atoms in frames]


def weigh(groups: Sequence[Sequence[Data]], scales: Sequence[float] | None = None) -> None:
    r"""Set weights that give every group of graphs the same say, in place.

    .. math:: w_k = \frac{\bar s}{s_k}\,\frac{\sum_j N_j}{K N_k}

    with :math:`N_k` atoms in group k and its scale of forces :math:`s_k` (``scales``, eV/Å; default: equal).
    """
    scales = scales or [1.0] * len(groups)
    n_atoms = [sum(len(graph.pos) for graph in group) for group in groups]
    for group, n, scale in zip(groups, n_atoms, scales, strict=True):
        weight = sum(scales) / len(scales) / scale * sum(n_atoms) / (len(groups) * n)
        for graph in group:
            graph.weight.fill_(weight)


def reduced_energy(potential: Potential, batch: Batch, prediction: Prediction) -> Tensor:
    """Predicted energies (n_structures,) less the reference energies, in the type of the targets."""
    rows = potential.species_row[batch.atomic_numbers]
    shift = torch.zeros_like(prediction.energy).index_add(0, batch.batch, potential.references[rows])
    return (prediction.energy - shift).to(batch.energy.dtype)


def loss_terms(potential: Potential, batch: Batch, config: TrainConfig) -> Tensor:
    """Weighted mean absolute errors of energy per atom, force vectors (2-norm) and stress components."""
    prediction = predict(potential, batch, differentiable=True)
    n_atoms = torch.bincount(batch.batch, minlength=len(batch.energy))
    energy = (reduced_energy(potential, batch, prediction) - batch.energy).abs() / n_atoms
    forces = (prediction.forces - batch.forces).square().sum(dim=-1).add(1e-12).sqrt()
    loss = config.energy_weight * (batch.weight * energy).mean()
    loss = loss + config.force_weight * (batch.weight[batch.batch] * forces).mean()
    labelled = torch.isfinite(batch.stress).all(dim=(1, 2))
    if config.stress_weight and labelled.any():
        volume = torch.linalg.det(batch.cell[labelled]).abs()[:, None, None]
        stress = (prediction.strain_derivative[labelled] / volume - batch.stress[labelled]).abs()
        loss = loss + config.stress_weight * (batch.weight[labelled, None, None] * stress).mean()
    return loss


def validate(potential: Potential, graphs: Sequence[Data], batch_size: int) -> dict[str, float]:
    """Force MAE (eV/Å) and energy MAE (eV/atom) over labelled graphs, each counting by its weight."""
    forces, energies = [], []
    for start in range(0, len(graphs), batch_size):
        batch = batch_graphs(graphs[start : start + batch_size]).to(potential.device)
        prediction = predict(potential, batch)
        n_atoms = torch.bincount(batch.batch)
        error = (reduced_energy(potential, batch, prediction) - batch.energy).abs() / n_atoms
        energies.append(batch.weight * error)
        forces.append(batch.weight[batch.batch, None] * (prediction.forces - batch.forces).abs())
    return {"force_mae": float(torch.cat(forces).mean()), "energy_mae": float(torch.cat(energies).mean())}
