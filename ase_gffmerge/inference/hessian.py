r"""Second derivatives of the energy, row by row, so that memory does not grow with their number.

.. math:: H_{ia,jb} = \frac{\partial^2 E}{\partial r_{ia}\,\partial r_{jb}}

One reverse pass gives the gradient together with the graph of its computation; every row of the Hessian is a further reverse
pass through that graph (a Hessian-vector product with a unit vector).
"""

import numpy as np
import torch

from ase_gffmerge.graphs.derivatives import EdgeFunction
from ase_gffmerge.graphs.graph import AtomGraph, edge_vectors
from ase_gffmerge.runtime.progress import Progress, no_progress


def hessian(function: EdgeFunction, graph: AtomGraph, *, progress: Progress = no_progress) -> np.ndarray:
    """Hessian (3 n_atoms, 3 n_atoms) of a structure's energy in eV/Å^2, symmetric.

    Parameters
    ----------
    function
        A potential that can be differentiated twice; the ones prepared for inference cannot.
    graph
        The structure, on the potential's device; its positions decide the precision of the geometry.
    progress
        Called with a fraction (0 to 1) and a description.
    """
    positions = graph.positions.detach().clone().requires_grad_()
    with torch.inference_mode(False), torch.enable_grad():
        energies, _ = function(edge_vectors(graph, positions), graph)
        size = positions.numel()
        if not energies.requires_grad or graph.n_edges == 0:
            return np.zeros((size, size))
        (gradient,) = torch.autograd.grad(energies.sum(), positions, create_graph=True)
        rows = torch.empty(size, size, dtype=gradient.dtype)
        for i, component in enumerate(gradient.flatten()):
            (row,) = torch.autograd.grad(component, positions, retain_graph=True)
            rows[i] = row.flatten().cpu()
            progress((i + 1) / size, f"Hessian, row {i + 1} of {size}")
    matrix = rows.double().numpy()
    return 0.5 * (matrix + matrix.T)
