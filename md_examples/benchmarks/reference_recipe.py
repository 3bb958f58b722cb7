"""The arithmetic of the published reference scripts, to compare the time of ours with: statistics and solve of every layer.

Every linear layer has a hook that casts what enters and what leaves it to float64 and adds to the normal equations; then
each layer is solved by LU with an absolute ridge, and a singular value decomposition tells its condition number (after the
description of arXiv 2606.03232; not its code).
"""

import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ase_gffmerge import ForceField
from ase_gffmerge.graphs import batch_graphs, build_graph
from ase_gffmerge.graphs.graph import edge_vectors
from ase_gffmerge.merging.calibration import MAX_EDGES
from ase_gffmerge.models import Potential
from ase_gffmerge.models.affine_maps import is_affine, rows_entering
from ase_gffmerge.runtime.devices import chunks

RIDGE = 1e-6


class NormalEquations:
    """Sums of products of one layer's rows, in float64."""

    def __init__(self) -> None:
        self.xx: Tensor | float = 0.0
        self.xy: Tensor | float = 0.0

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add the rows of one batch."""
        x = x.reshape(-1, x.shape[-1]).double()
        x = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
        self.xx = self.xx + x.T @ x
        self.xy = self.xy + x.T @ y.reshape(len(x), -1).double()

    def solve(self) -> tuple[Tensor, float]:
        """Coefficients and condition number."""
        assert isinstance(self.xx, Tensor)
        system = self.xx + RIDGE * torch.eye(len(self.xx), dtype=torch.float64)
        singular = torch.linalg.svdvals(system)
        return torch.linalg.solve(system, self.xy), float(singular[0] / singular[-1])


@torch.no_grad()
def reference_recipe(specialists: Sequence[ForceField]) -> tuple[dict[str, Tensor], float]:
    """Coefficients of every plain linear layer, and the seconds that they took."""
    started = time.perf_counter()
    equations: dict[str, NormalEquations] = {}
    for specialist in specialists:
        potential = specialist.potential
        handles = [
            module.register_forward_hook(_hook(equations, name)) for name, module in _layers(potential)
        ]
        graphs = [
            build_graph(a, potential.hyper.cutoff, dtype=potential.dtype) for a in specialist.calibration
        ]
        for group in chunks(graphs, MAX_EDGES, size=lambda graph: graph.n_edges):
            batch = batch_graphs(group)
            potential(edge_vectors(batch), batch)
        for handle in handles:
            handle.remove()
    solved = {name: system.solve()[0] for name, system in equations.items() if isinstance(system.xx, Tensor)}
    return solved, time.perf_counter() - started


def _layers(potential: Potential) -> list[tuple[str, nn.Module]]:
    return [(name, module) for name, module in potential.named_modules() if is_affine(module)]


def _hook(equations: dict[str, NormalEquations], name: str):  # type: ignore[no-untyped-def]
    system = equations.setdefault(name, NormalEquations())

    def hook(module: nn.Module, inputs: tuple, output: Tensor) -> None:  # type: ignore[type-arg]
        system.add(rows_entering(module, inputs), output)

    return hook
