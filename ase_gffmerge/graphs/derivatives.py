r"""Energies, forces and stress of a batch from one reverse pass.

Geometry enters a potential only through the edge vectors
:math:`\mathbf d_e = \mathbf r_j - \mathbf r_i + S\,h`, so the one gradient
:math:`\mathbf g_e = \partial E/\partial\mathbf d_e` holds every first derivative:

.. math::

   \mathbf F_i = \sum_{e:\,i\leftarrow j} \mathbf g_e - \sum_{e:\,k\leftarrow i} \mathbf g_e ,\qquad
   \frac{\partial E}{\partial\varepsilon_{ab}} = \tfrac12\sum_e (d_{ea} g_{eb} + d_{eb} g_{ea}),\qquad
   \sigma = \frac1V \frac{\partial E}{\partial\varepsilon},

where the strain acts on row vectors, :math:`h \to h(1+\varepsilon)`.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ase_gffmerge.graphs.graph import AtomGraph, edge_vectors


class EnergyModel(Protocol):
    """Anything that maps a graph with ``edge_vectors`` to per-atom energies (n_atoms,) in eV."""

    def __call__(self, graph: AtomGraph) -> Tensor:
        """Per-atom energies (n_atoms,) in eV."""
        ...


@dataclass(frozen=True)
class Prediction:
    """What a potential says about a batch of structures.

    Attributes
    ----------
    energies : (n_atoms,) eV
    energy : (n_structures,) eV
    forces : (n_atoms, 3) eV/Å
    strain_derivative : (n_structures, 3, 3) eV
        dE/d(strain), symmetric; divide by the volume for the stress (positive under tension).
    """

    energies: Tensor
    energy: Tensor
    forces: Tensor
    strain_derivative: Tensor

    def stress(self, cell: Tensor) -> Tensor:
        """Stress (n_structures, 3, 3) in eV/Å^3 for cells (n_structures, 3, 3) in Å."""
        return self.strain_derivative / torch.linalg.det(cell).abs()[:, None, None]


def predict(model: EnergyModel, graph: AtomGraph, *, differentiable: bool = False) -> Prediction:
    """Evaluate energies, forces and strain derivatives with one forward and one reverse pass.

    Parameters
    ----------
    model
        A potential; it reads ``graph.edge_vectors``.
    graph
        One graph or a batch.
    differentiable
        Keep the graph of the derivative itself, for training on forces.
    """
    vectors = edge_vectors(graph).detach().requires_grad_()
    graph.edge_vectors = vectors
    with torch.enable_grad():
        energies = model(graph)
        if vectors.numel() == 0 or not energies.requires_grad:
            gradient = torch.zeros_like(vectors)
        else:
            (gradient,) = torch.autograd.grad(energies.sum(), vectors, create_graph=differentiable)
    del graph.edge_vectors
    if not differentiable:
        energies = energies.detach()
    return assemble(graph, energies, vectors.detach(), gradient)


def assemble(graph: AtomGraph, energies: Tensor, vectors: Tensor, gradient: Tensor) -> Prediction:
    """Sum per-edge gradients (n_edges, 3) in eV/Å into forces and strain derivatives."""
    sender, receiver = graph.edge_index
    forces = (
        torch.zeros_like(graph.positions).index_add(0, receiver, gradient).index_add(0, sender, -gradient)
    )
    if graph.n_structures == 1:
        virial = (vectors.mT @ gradient)[None]
        return Prediction(energies, energies.sum()[None], forces, 0.5 * (virial + virial.mT))
    structure, n_structures = graph.structure_index, graph.n_structures
    outer = vectors[:, :, None] * gradient[:, None, :]
    virial = outer.new_zeros(n_structures, 3, 3).index_add(0, structure[receiver], 0.5 * (outer + outer.mT))
    energy = energies.new_zeros(n_structures).index_add(0, structure, energies)
    return Prediction(energies, energy, forces, virial)
