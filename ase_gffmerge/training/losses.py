"""Targets on graphs, and the loss against them."""

from collections.abc import Sequence

import numpy as np
import torch
from ase import Atoms
from torch import Tensor
from torch_geometric.data import Batch, Data

from ase_gffmerge.graphs import batch_graphs, build_graph, predict
from ase_gffmerge.models import Potential
from ase_gffmerge.training.config import TrainConfig


def labelled_graph(atoms: Atoms, potential: Potential, references: np.ndarray) -> Data:
    """Graph with targets ``energy`` (1,) less references, ``forces`` (n_atoms, 3), ``stress`` (1, 3, 3)."""
    graph = build_graph(atoms, potential.hyper.cutoff, dtype=potential.dtype)
    rows = potential.species_row.cpu().numpy()[atoms.numbers]
    energy = atoms.get_potential_energy() - references[rows].sum()
    graph.energy = torch.tensor([energy], dtype=potential.dtype)
    graph.forces = torch.as_tensor(atoms.get_forces(), dtype=potential.dtype)
    has_stress = atoms.cell.rank == 3 and atoms.calc is not None and "stress" in atoms.calc.results
    stress = atoms.get_stress(voigt=False) if has_stress else np.full((3, 3), np.nan)
    graph.stress = torch.as_tensor(stress, dtype=potential.dtype)[None]
    return graph


def loss_terms(potential: Potential, batch: Batch, config: TrainConfig) -> Tensor:
    """Weighted mean absolute errors of energy per atom, force vectors (2-norm) and stress components."""
    prediction = predict(potential, batch, differentiable=True)
    n_atoms = torch.bincount(batch.batch, minlength=len(batch.energy))
    rows = potential.species_row[batch.atomic_numbers]
    shift = torch.zeros_like(prediction.energy).index_add(0, batch.batch, potential.references[rows])
    energy = ((prediction.energy - shift).to(batch.energy.dtype) - batch.energy).abs() / n_atoms
    forces = (prediction.forces - batch.forces).square().sum(dim=-1).add(1e-12).sqrt()
    loss = config.energy_weight * energy.mean() + config.force_weight * forces.mean()
    labelled = torch.isfinite(batch.stress).all(dim=(1, 2))
    if config.stress_weight and labelled.any():
        volume = torch.linalg.det(batch.cell[labelled]).abs()[:, None, None]
        stress = prediction.strain_derivative[labelled] / volume
        loss = loss + config.stress_weight * (stress - batch.stress[labelled]).abs().mean()
    return loss


def validate(potential: Potential, graphs: Sequence[Data], batch_size: int) -> dict[str, float]:
    """Force MAE (eV/Å) and energy MAE (eV/atom) over labelled graphs."""
    forces, energies = [], []
    for start in range(0, len(graphs), batch_size):
        batch = batch_graphs(graphs[start : start + batch_size]).to(potential.device)
        prediction = predict(potential, batch)
        rows = potential.species_row[batch.atomic_numbers]
        shift = torch.zeros_like(prediction.energy).index_add(0, batch.batch, potential.references[rows])
        n_atoms = torch.bincount(batch.batch)
        forces.append((prediction.forces - batch.forces).abs().flatten())
        energies.append((prediction.energy - shift - batch.energy).abs() / n_atoms)
    return {"force_mae": float(torch.cat(forces).mean()), "energy_mae": float(torch.cat(energies).mean())}
