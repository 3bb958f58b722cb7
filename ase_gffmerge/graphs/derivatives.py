r"""Energies, forces and stress of a batch from one reverse pass; Hessians.

Geometry enters a potential only through the edge vectors
:math:`\mathbf d_e = \mathbf r_j - \mathbf r_i + S\,h`, so the one gradient
:math:`\mathbf g_e = \partial E/\partial\mathbf d_e` holds every first derivative:

.. math::

   \mathbf F_i = \sum_{e:\,i\leftarrow j} \mathbf g_e - \sum_{e:\,k\leftarrow i} \mathbf g_e ,\qquad
   \frac{\partial E}{\partial\varepsilon_{ab}} = \tfrac12\sum_e (d_{ea} g_{eb} + d_{eb} g_{ea}),\qquad
   \sigma = \frac1V \frac{\partial E}{\partial\varepsilon},

where the strain acts on row vectors, :math:`h \to h(1+\varepsilon)`.

Second derivatives of the energy, row by row, so that memory does not grow with their number.

.. math:: H_{ia,jb} = \frac{\partial^2 E}{\partial r_{ia}\,\partial r_{jb}}

One reverse pass gives the gradient together with the graph of its computation; every row of the Hessian is a further reverse
pass through that graph (a Hessian-vector product with a unit vector).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ase_gffmerge.graphs.graph import AtomGraph, Topology, edge_vectors
from ase_gffmerge.runtime.progress import Progress, no_progress


class EdgeFunction(Protocol):
    """What a potential is to everything that evaluates it: energies as a function of edge vectors."""

    def __call__(self, vectors: Tensor, graph: Topology) -> tuple[Tensor, Sequence[Tensor]]:
        """Per-atom energies (n_atoms,) in eV, and the readout's inputs, (n_atoms, channels) each.

        Parameters
        ----------
        vectors
            Edge vectors (n_edges, 3) in Å.
        graph
            Constants: elements, specialists and edges.
        """
        ...


EdgeDerivatives = tuple[Tensor, Tensor, Sequence[Tensor]]
"""Gradient (n_edges, 3) of the energy with respect to the edge vectors, energies and the readout's inputs."""


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
    readout_inputs : (n_atoms, channels) each
        What the readout read: scalars after the blocks. Extrapolation grades and distillation use them.
    energy_std, forces_std : (n_structures,) eV, (n_atoms, 3) eV/Å
        Standard deviations, where they were asked for.
    """

    energies: Tensor
    energy: Tensor
    forces: Tensor
    strain_derivative: Tensor
    readout_inputs: tuple[Tensor, ...] = ()
    energy_std: Tensor | None = None
    forces_std: Tensor | None = None

    def stress(self, cell: Tensor) -> Tensor:
        """Stress (n_structures, 3, 3) in eV/Å^3 for cells (n_structures, 3, 3) in Å."""
        return self.strain_derivative / torch.linalg.det(cell).abs()[:, None, None]


def predict(function: EdgeFunction, graph: AtomGraph, *, differentiable: bool = False) -> Prediction:
    """Evaluate energies, forces and strain derivatives with one forward and one reverse pass.

    Geometry is in the type of the graph up to the edge vectors, whatever type the weights have: vectors far from the
    origin keep their digits, and forces sum to zero, also in float32.

    Parameters
    ----------
    function
        A potential.
    graph
        One graph or a batch.
    differentiable
        Keep the graph of the derivative itself, for training on forces.
    """
    vectors = edge_vectors(graph)
    return assemble(graph, vectors, differentiate(function, vectors, graph, differentiable=differentiable))


def differentiate(
    function: EdgeFunction, vectors: Tensor, graph: Topology, *, differentiable: bool = False
) -> EdgeDerivatives:
    """Evaluate an edge function and its gradient by a reverse pass.

    Parameters
    ----------
    function
        A potential.
    vectors, graph
        Its arguments.
    differentiable
        Keep the graph of the derivative itself.
    """
    vectors = vectors.detach().requires_grad_()
    with torch.enable_grad():
        energies, scalars = function(vectors, graph)
        if vectors.numel() == 0 or not energies.requires_grad:
            gradient = torch.zeros_like(vectors)
        else:
            (gradient,) = torch.autograd.grad(energies.sum(), vectors, create_graph=differentiable)
    if differentiable:
        return gradient, energies, scalars
    return gradient, energies.detach(), [x.detach() for x in scalars]


def assemble(graph: AtomGraph, vectors: Tensor, derivatives: EdgeDerivatives) -> Prediction:
    """Sum gradients of the edges into forces and strain derivatives.

    Parameters
    ----------
    graph
        One graph or a batch.
    vectors
        Its edge vectors (n_edges, 3) in Å.
    derivatives
        What was evaluated for them, in any type.
    """
    gradient, energies, scalars = derivatives
    vectors, gradient = vectors.detach(), gradient.to(vectors.dtype)
    sender, receiver = graph.edge_index
    forces = torch.zeros_like(graph.positions)
    forces = forces.index_add(0, receiver, gradient).index_add(0, sender, -gradient)
    if graph.n_structures == 1:
        virial = (vectors.mT @ gradient)[None]
        energy, strain_derivative = energies.sum()[None], 0.5 * (virial + virial.mT)
    else:
        structure, n = graph.structure_index, graph.n_structures
        outer = vectors[:, :, None] * gradient[:, None, :]
        strain_derivative = outer.new_zeros(n, 3, 3).index_add(
            0, structure[receiver], 0.5 * (outer + outer.mT)
        )
        energy = energies.new_zeros(n).index_add(0, structure, energies)
    return Prediction(energies, energy, forces, strain_derivative, tuple(scalars))


def hessian(
    function: EdgeFunction,
    graph: AtomGraph,
    *,
    indices: Sequence[int] | None = None,
    progress: Progress = no_progress,
) -> np.ndarray:
    """Hessian (3 n_atoms, 3 n_atoms) of a structure's energy in eV/Å^2, symmetric; or the rows of some atoms alone.

    Parameters
    ----------
    function
        A potential that can be differentiated twice; the ones prepared for inference cannot.
    graph
        The structure, on the potential's device; its positions decide the precision of the geometry.
    indices
        Atoms whose rows (3 n_indices, 3 n_atoms) are wanted.
    progress
        Called with a fraction (0 to 1) and a description.
    """
    positions = graph.positions.detach().clone().requires_grad_()
    with torch.inference_mode(False), torch.enable_grad():
        energies, _ = function(edge_vectors(graph, positions), graph)
        chosen = range(len(positions)) if indices is None else indices
        size = 3 * len(chosen)
        if not energies.requires_grad or graph.n_edges == 0:
            return np.zeros((size, positions.numel()))
        (gradient,) = torch.autograd.grad(energies.sum(), positions, create_graph=True)
        rows = torch.empty(size, positions.numel(), dtype=gradient.dtype)
        for i, component in enumerate(gradient[list(chosen)].flatten()):
            (row,) = torch.autograd.grad(component, positions, retain_graph=True)
            rows[i] = row.flatten().cpu()
            progress((i + 1) / size, f"Hessian, row {i + 1} of {size}")
    matrix = rows.double().numpy()
    return matrix if indices is not None else 0.5 * (matrix + matrix.T)


def hessian_products(
    function: EdgeFunction, graph: AtomGraph, directions: Tensor, *, differentiable: bool = False
) -> Tensor:
    r"""Products of every structure's Hessian with a direction, :math:`\sum_{jb} H_{ia,jb}\,u_{jb}` (n_atoms, 3) in eV/Å^2.

    Parameters
    ----------
    function
        A potential that can be differentiated twice, or three times for training.
    graph
        One graph or a batch.
    directions
        Displacements u (n_atoms, 3) without unit.
    differentiable
        Keep the graph of the derivative itself, for training on the products.
    """
    positions = graph.positions.detach().clone().requires_grad_()
    with torch.enable_grad():
        energies, _ = function(edge_vectors(graph, positions), graph)
        if not energies.requires_grad or graph.n_edges == 0:
            return torch.zeros_like(directions)
        (gradient,) = torch.autograd.grad(energies.sum(), positions, create_graph=True)
        (products,) = torch.autograd.grad(
            (gradient * directions).sum(), positions, create_graph=differentiable
        )
    return products
