"""Structures as graphs: neighbor lists, batches, and derivatives of the energy."""

from ase_gffmerge.graphs.derivatives import EdgeFunction, Prediction, hessian, predict
from ase_gffmerge.graphs.graph import AtomGraph, Topology, batch_graphs, build_graph, edge_vectors
from ase_gffmerge.graphs.neighbor_list import find_neighbors

__all__ = [
    "AtomGraph",
    "EdgeFunction",
    "Prediction",
    "Topology",
    "batch_graphs",
    "build_graph",
    "edge_vectors",
    "find_neighbors",
    "hessian",
    "predict",
]
