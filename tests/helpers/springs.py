"""A potential simple enough to know what its dynamics must do."""

from types import SimpleNamespace

import torch
from ase.data import covalent_radii
from torch import Tensor

from ase_gffmerge.graphs.graph import Topology


class Springs:
    """Every pair within the cutoff is a spring of length ``length`` Å and stiffness ``stiffness`` eV/Å²."""

    dtype, device, species = torch.float64, torch.device("cpu"), (1, 6, 8)
    hyper = SimpleNamespace(cutoff=6.0, n_embeddings=1)

    def __init__(self, *, stiffness: float = 20.0, length: float = 1.0):
        self.stiffness, self.length = stiffness, length

    def for_inference(self) -> "Springs":
        return self

    def __call__(self, vectors: Tensor, graph: Topology) -> tuple[Tensor, list[Tensor]]:
        stretch = vectors.norm(dim=1) - self.length
        per_edge = 0.25 * self.stiffness * stretch**2  # half of a pair's energy: two edges per pair
        return per_edge.new_zeros(len(graph)).index_add(0, graph.edge_index[1], per_edge), []


class Bonded(Springs):
    """Springs of covalent length between unlike atoms; beyond a quarter of stretch or squeeze they pull no more."""

    def __call__(self, vectors: Tensor, graph: Topology) -> tuple[Tensor, list[Tensor]]:
        receiver, sender = graph.edge_index
        radii = torch.as_tensor(covalent_radii)[graph.atomic_numbers]
        length = radii[receiver] + radii[sender]
        strain = (vectors.norm(dim=1) / length - 1).clamp(-0.25, 0.25)
        per_edge = 0.25 * self.stiffness * (length * strain) ** 2
        per_edge = per_edge * (graph.atomic_numbers[receiver] != graph.atomic_numbers[sender])
        return per_edge.new_zeros(len(graph)).index_add(0, sender, per_edge), []
