"""The preset ``paper`` against an independent NumPy implementation of the reference method (arXiv 2606.03232)."""

import numpy as np
import pytest
import torch
from torch import nn

from ase_gffmerge import merge
from ase_gffmerge.graphs import batch_graphs, build_graph
from ase_gffmerge.graphs.graph import edge_vectors


def rows_of_every_linear(specialist) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Inputs and outputs (pre-activation) of all ``nn.Linear`` on the specialist's own frames, by hooks."""
    rows: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def record(name: str):
        def hook(module, inputs, output) -> None:
            x, y = inputs[0], output
            rows[name] = x.reshape(-1, x.shape[-1]).numpy(), y.reshape(-1, y.shape[-1]).numpy()

        return hook

    handles = [
        module.register_forward_hook(record(name))
        for name, module in specialist.potential.named_modules()
        if isinstance(module, nn.Linear)
    ]
    graph = batch_graphs([build_graph(atoms, specialist.cutoff) for atoms in specialist.calibration])
    with torch.no_grad():
        specialist.potential(edge_vectors(graph), graph)
    for handle in handles:
        handle.remove()
    return rows


@pytest.mark.filterwarnings("ignore::ase_gffmerge.errors.MergeWarning")
def test_every_layer_solves_the_reference_problem(family) -> None:
    specialists = family("painn", 3, frames=10)
    merged, _ = merge(specialists, "paper")
    recorded = [rows_of_every_linear(specialist) for specialist in specialists]
    assert len(recorded[0]) == 2 * 7 + 2
    for name in recorded[0]:
        x = np.concatenate([np.c_[r[name][0], np.ones(len(r[name][0]))] for r in recorded])
        y = np.concatenate([r[name][1] for r in recorded])
        theta = np.linalg.solve(x.T @ x + 1e-6 * np.eye(x.shape[1]), x.T @ y)
        layer = merged.potential.get_submodule(name)
        predicted = layer(torch.as_tensor(x[:, :-1])).numpy()
        expected = x @ theta if layer.bias is not None else x[:, :-1] @ theta[:-1]
        np.testing.assert_allclose(predicted, expected, atol=1e-6 * np.abs(expected).max())
    embeddings = torch.stack([specialist.potential.embedding for specialist in specialists])
    torch.testing.assert_close(merged.potential.embedding, embeddings.mean(0))
