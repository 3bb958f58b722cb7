r"""Directional derivatives: tensors that carry them, and the directions along which energies must agree.

Layers that agree with a specialist in value need not agree in their derivatives, which forces are. A dual number
(forward-mode differentiation) carries, beside each tensor x, its derivatives
:math:`\dot x_p = \partial x/\partial\mathbf r\cdot v_p` along P random displacements of the atoms. As a layer is affine,
:math:`y = x W + b` implies :math:`\dot y_p = \dot x_p W`: the derivatives are further rows of the same least-squares problem
(rows without the ones column), which therefore stays convex.

Directions along which a readout must reproduce the derivative of the specialists' energies.

Geometry enters a potential through its edge vectors :math:`\mathbf d_e`, so a direction is a tangent of these:

* a displacement v of the atoms, :math:`\dot{\mathbf d}_e = v_j - v_i`; the energy changes by
  :math:`-\sum_i\mathbf F_i\cdot v_i`;
* a strain ε of a structure with three cell vectors, :math:`\dot{\mathbf d}_e = \mathbf d_e\,\varepsilon`; the energy
  changes by :math:`\sum_{ab}(\partial E/\partial\varepsilon)_{ab}\,\varepsilon_{ab}`, volume times stress.

Displacements are the unit vectors of a small structure, or random ones with :math:`\mathbb E\sum_p v_p v_p^\top = 1`, an
unbiased sketch of the same normal equations. Strains are an orthonormal basis of the symmetric matrices times a weight.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torch.func import jvp, vmap

from ase_gffmerge.graphs import Prediction
from ase_gffmerge.graphs.graph import AtomGraph
from ase_gffmerge.models.layers.linear import many_directions

Tensors = tuple[Tensor, ...]


@dataclass(frozen=True)
class Dual:
    """Values and derivatives.

    Attributes
    ----------
    value
        Tensors x of any shapes (...).
    tangent
        For each of them the derivatives (n_directions, ...); empty when there are no directions.
    """

    value: Tensors
    tangent: Tensors

    def __add__(self, other: "Dual") -> "Dual":
        """Concatenate two duals as tuples."""
        return Dual(self.value + other.value, self.tangent + other.tangent)

    def __getitem__(self, part: slice) -> "Dual":
        """Select some of the tensors."""
        return Dual(self.value[part], self.tangent[part])


def pushforward(function: Callable[..., Tensor | Tensors], inputs: Dual) -> Dual:
    """Evaluate ``function(*tensors)`` (a tensor or a tuple of tensors) and its derivatives along all directions."""
    outputs = [tensor.detach() for tensor in differentiable_pushforward(function, inputs)]
    n = len(outputs) // 2 if inputs.tangent else len(outputs)
    return Dual(tuple(outputs[:n]), tuple(outputs[n:]))


def differentiable_pushforward(function: Callable[..., Tensor | Tensors], inputs: Dual) -> Tensors:
    """Values and then derivatives as one tuple, differentiable with respect to what ``function`` closes over."""

    def as_tuple(*tensors: Tensor) -> Tensors:
        out = function(*tensors)
        return out if isinstance(out, tuple) else (out,)

    if not inputs.tangent:
        return as_tuple(*inputs.value)
    values_and_tangents = vmap(lambda *t: jvp(as_tuple, inputs.value, t), out_dims=(None, 0))  # type: ignore[arg-type]
    with many_directions():
        values, tangents = values_and_tangents(*inputs.tangent)  # type: ignore[misc]
    return values + tangents


@dataclass(frozen=True)
class Directions:
    """Directions for all structures of a batch at once.

    Attributes
    ----------
    displacements : (n_displacements, n_atoms, 3)
    strains : (n_strains, n_structures, 3, 3)
        Zero for structures without volume; no strains at all if none has one.
    """

    displacements: Tensor
    strains: Tensor

    @classmethod
    def draw(cls, graph: AtomGraph, n_displacements: int, *, stress_weight: float, seed: int) -> Self:
        """Choose directions for a batch.

        Parameters
        ----------
        graph
            The batch.
        n_displacements
            Displacements per structure; structures with fewer coordinates use all of them.
        stress_weight
            Length of the strains; 0 leaves them out.
        seed
            Of the random displacements.
        """
        solid = torch.linalg.matrix_rank(graph.cell.double()) == 3
        strains = graph.positions.new_zeros(0, graph.n_structures, 3, 3)
        if stress_weight and solid.any():
            basis = stress_weight * symmetric_basis().to(graph.positions)
            strains = basis[:, None] * solid.to(graph.positions)[:, None, None]
        return cls(displacement_directions(graph, n_displacements, seed=seed), strains)

    def tangents(self, graph: AtomGraph, edge_vectors: Tensor) -> Tensor:
        """Tangents (n_directions, n_edges, 3) of the edge vectors (n_edges, 3)."""
        sender, receiver = graph.edge_index
        moved = self.displacements[:, sender] - self.displacements[:, receiver]
        strained = torch.einsum(
            "ea,peab->peb", edge_vectors, self.strains[:, graph.structure_index[receiver]]
        )
        return torch.cat([moved, strained])

    def work(self, graph: AtomGraph, prediction: Prediction) -> Tensor:
        """Change of the energy (n_directions, n_structures) along every direction."""
        power = -(prediction.forces * self.displacements).sum(-1)
        moved = power.new_zeros(len(power), graph.n_structures).index_add(1, graph.structure_index, power)
        strained = (prediction.strain_derivative * self.strains).sum(dim=(-2, -1))
        return torch.cat([moved, strained])


def symmetric_basis() -> Tensor:
    """Orthonormal basis (6, 3, 3) of the symmetric matrices."""
    basis = torch.zeros(6, 3, 3, dtype=torch.float64)
    for p, (a, b) in enumerate([(0, 0), (1, 1), (2, 2), (1, 2), (0, 2), (0, 1)]):
        basis[p, a, b] = basis[p, b, a] = 1.0 if a == b else math.sqrt(0.5)
    return basis


def displacement_directions(graph: AtomGraph, n_displacements: int, *, seed: int) -> Tensor:
    """Unit vectors, or Gaussian ones for structures with more coordinates, (n_displacements, n_atoms, 3).

    Parameters
    ----------
    graph
        The batch.
    n_displacements
        At most so many per structure.
    seed
        Of the random ones.
    """
    counts = torch.bincount(graph.structure_index).tolist()
    n_rows = min(n_displacements, 3 * max(counts))
    directions = torch.zeros(n_rows, len(graph), 3, dtype=graph.positions.dtype)
    generator = torch.Generator().manual_seed(seed)
    start = 0
    for n in counts:
        block = directions[:, start : start + n].view(n_rows, n, 3)
        if 3 * n <= n_rows:
            block[: 3 * n] = torch.eye(3 * n).view(3 * n, n, 3)
        else:
            block[:] = torch.randn(n_rows, n, 3, generator=generator, dtype=torch.float64) / math.sqrt(n_rows)
        start += n
    return directions.to(graph.positions.device)
