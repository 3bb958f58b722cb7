r"""Fisher merging: a mean in which every weight counts as much as the specialist's outputs depend on it.

.. math::

   w = \frac{\sum_k (\hat I_k + \varepsilon)\, w_k}{\sum_k (\hat I_k + \varepsilon)},\qquad
   \hat I_k = I_k / \langle I_k \rangle

(Matena and Raffel, arXiv 2111.09832, eq. 4) with the diagonal of the Fisher information. If energies and forces are
measured with Gaussian noise, that is the mean squared derivative of the outputs

.. math::

   I = \Bigl\langle \sum_o \Bigl(\frac{\partial y_o}{\partial w}\Bigr)^2 \Bigr\rangle_{\rm frames}
     = \Bigl\langle \mathbb E_v \Bigl(\frac{\partial}{\partial w} \sum_o v_o y_o\Bigr)^2 \Bigr\rangle_{\rm frames},
   \qquad y = \bigl(E/n,\; F_{ia}/\sqrt{3n}\bigr)

of a structure of n atoms, for random signs v: no labels are needed, and one gradient per batch of frames gives an
unbiased estimate, since the outputs of different frames have independent signs. E and F are weighted as in the
specialists' training. Dividing by the mean over the weights gives every specialist the same say. The floor ε, in units of
that mean, keeps weights that nothing depends on; a large one makes the plain mean.
"""

from collections.abc import Sequence
from copy import deepcopy

import torch
from ase import Atoms
from torch import Tensor

from ase_gffmerge.graphs import batch_graphs, build_graph, predict
from ase_gffmerge.graphs.graph import AtomGraph
from ase_gffmerge.least_squares.gauss_newton import random_signs
from ase_gffmerge.merging.disagreement import DisagreementMetric
from ase_gffmerge.merging.weight_space import WeightSpace, weighted_mean
from ase_gffmerge.methods.base import MergeInputs, MergeOutput, Requirement, method
from ase_gffmerge.methods.weight_space import grid_of, tune, weight_space
from ase_gffmerge.models import Potential
from ase_gffmerge.runtime.devices import chunks
from ase_gffmerge.runtime.progress import Progress

FLOORS = (1e-6, 1e-4, 1e-2, 1e-1, 1.0, 10.0)
"""Values of ε that are tried."""

PROBES = 2
"""Random sign vectors per batch."""

BATCH_ATOMS = 60
"""Atoms per batch; smaller batches give more independent estimates."""


def fisher_information(
    potential: Potential, frames: Sequence[Atoms], *, probes: int = PROBES, seed: int = 0
) -> Tensor:
    """Diagonal (P,) of the Fisher information, float64, in the order of ``potential.parameters()``.

    Parameters
    ----------
    potential
        A specialist; it is not changed.
    frames
        Structures to average over.
    probes
        Random sign vectors per batch.
    seed
        Seed of the signs.
    """
    model = deepcopy(potential).requires_grad_(True)
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros((), dtype=torch.float64, device=model.device)
    for group in chunks(frames, BATCH_ATOMS):
        graphs = [build_graph(atoms, model.hyper.cutoff, dtype=model.dtype) for atoms in group]
        batch = batch_graphs(graphs).to(model.device)
        for _ in range(probes):
            energy_signs = random_signs((len(group),), like=batch.positions, generator=generator)
            force_signs = random_signs(
                tuple(batch.positions.shape), like=batch.positions, generator=generator
            )
            total = total + squared_derivatives(model, batch, energy_signs, force_signs)
    return total / (probes * len(frames))


def squared_derivatives(
    model: Potential, batch: AtomGraph, energy_signs: Tensor, force_signs: Tensor
) -> Tensor:
    """Squared derivatives (P,) of the signed sum of all outputs y of a batch with respect to the weights.

    Parameters
    ----------
    model
        A potential whose weights require gradients.
    batch
        Structures.
    energy_signs, force_signs : (n_structures,), (n_atoms, 3)
        Signs v of their energies and forces.
    """
    n_atoms = torch.bincount(batch.structure_index, minlength=len(energy_signs)).to(energy_signs)
    prediction = predict(model, batch, differentiable=True)
    energies = (energy_signs / n_atoms * prediction.energy).sum()
    forces = (force_signs / (3 * n_atoms).sqrt()[batch.structure_index, None] * prediction.forces).sum()
    gradients = torch.autograd.grad(energies + forces, list(model.parameters()), materialize_grads=True)
    return torch.cat([gradient.flatten() for gradient in gradients]).double().square()


@method("fisher", citation="Matena and Raffel, arXiv 2111.09832", needs=(Requirement.FRAMES,))
def fisher(merge_inputs: MergeInputs, progress: Progress) -> MergeOutput:
    """Fisher merging with the floor of least disagreement."""
    space = weight_space(merge_inputs)
    metric = DisagreementMetric.of(space.specialists)
    weights = _relative_information(space, progress)

    def build(floor: float) -> Potential:
        return space.potential(weighted_mean(space.vectors, space.known * (weights + floor)))

    grid = grid_of(floor=FLOORS)
    return tune(build, grid, metric, progress=lambda x, text: progress(0.8 + 0.2 * x, text)).merge_output()


def _relative_information(space: WeightSpace, progress: Progress) -> Tensor:
    """Information (K, P) in units of its mean over the weights that a specialist knows."""
    rows = []
    for k, specialist in enumerate(space.specialists):
        progress(0.8 * k / len(space.specialists), f"Fisher information of {specialist.name}")
        potential = space.potential(space.vectors[k], references_of=k)
        information = fisher_information(potential, specialist.calibration)
        rows.append(information * space.known[k].sum() / information.sum())
    return torch.stack(rows)
