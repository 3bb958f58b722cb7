"""Structures as graphs: neighbour lists, batches, and derivatives of the energy."""

from ase_gffmerge.graphs.derivatives import Prediction, predict
from ase_gffmerge.graphs.graph import batch_graphs, build_graph
from ase_gffmerge.graphs.neighbor_list import neighbour_list

__all__ = ["Prediction", "batch_graphs", "build_graph", "neighbour_list", "predict"]
