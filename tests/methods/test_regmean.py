import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ase_gffmerge.graphs import batch_graphs, build_graph
from ase_gffmerge.graphs.graph import edge_vectors
from ase_gffmerge.merging.calibration import build_calibration
from ase_gffmerge.methods import METHODS
from ase_gffmerge.methods.regmean import input_grams, merge_blockwise, regression_mean, solve_maps


def silent(fraction: float, text: str) -> None:
    assert 0 <= fraction <= 1
    assert text


@settings(deadline=None, max_examples=10)
@given(k=st.integers(2, 4), d=st.integers(1, 5), m=st.integers(1, 4), seed=st.integers(0, 1000))
def test_full_gram_matrices_solve_the_least_squares_problem(k, d, m, seed) -> None:
    """min_W sum_k |X_k W - X_k W_k|^2 / n_k on stacked rows."""
    rng = np.random.default_rng(seed)
    rows = [rng.standard_normal((20 + 5 * i, d)) for i in range(k)]
    weights = [rng.standard_normal((d, m)) for _ in range(k)]
    a = np.concatenate([x / np.sqrt(len(x)) for x in rows])
    b = np.concatenate([x @ w / np.sqrt(len(x)) for x, w in zip(rows, weights)])
    expected = np.linalg.lstsq(a, b, rcond=None)[0]
    grams = [torch.as_tensor(x.T @ x / len(x)) for x in rows]
    found = regression_mean(grams, [torch.as_tensor(w) for w in weights], alpha=1.0)
    np.testing.assert_allclose(found, expected, atol=1e-7)


def test_the_shrink_of_the_off_diagonal() -> None:
    """At alpha = 0 every input is a regression of its own: a mean weighted with its mean square."""
    rng = np.random.default_rng(0)
    grams = [x.T @ x for x in rng.standard_normal((2, 9, 3))]
    weights = list(rng.standard_normal((2, 3, 4)))
    tensors = [[torch.as_tensor(x) for x in xs] for xs in (grams, weights)]
    diagonals = [np.diag(gram)[:, None] for gram in grams]
    expected = sum(d * w for d, w in zip(diagonals, weights)) / sum(diagonals)
    np.testing.assert_allclose(regression_mean(*tensors, alpha=0.0), expected, atol=1e-8)
    shrunk = [0.7 * gram + 0.3 * np.diag(np.diag(gram)) for gram in grams]
    expected = np.linalg.solve(sum(shrunk), sum(g @ w for g, w in zip(shrunk, weights)))
    np.testing.assert_allclose(regression_mean(*tensors, alpha=0.7), expected, atol=1e-7)


def test_directions_without_inputs_keep_the_mean() -> None:
    gram = torch.diag(torch.tensor([1.0, 0.0], dtype=torch.float64))
    weights = [torch.tensor([[w], [w]], dtype=torch.float64) for w in (1.0, 3.0)]
    found = regression_mean([gram, 3 * gram], weights, alpha=1.0)
    torch.testing.assert_close(found, torch.tensor([[2.5], [2.0]], dtype=torch.float64))


def linear_rows(specialist) -> dict[str, np.ndarray]:
    """Inputs of all ``nn.Linear`` on the specialist's own frames."""
    rows: dict[str, np.ndarray] = {}
    handles = [
        module.register_forward_hook(
            lambda _, inputs, output, name=name: rows.update({name: inputs[0].flatten(0, -2).numpy()})
        )
        for name, module in specialist.potential.named_modules()
        if isinstance(module, nn.Linear)
    ]
    graph = batch_graphs([build_graph(atoms, specialist.cutoff) for atoms in specialist.calibration])
    specialist.potential(edge_vectors(graph), graph)
    for handle in handles:
        handle.remove()
    return rows


def test_every_layer_of_a_merged_painn_is_the_regression_of_its_own_inputs(make_merge_inputs) -> None:
    """Predictions rather than weights are compared, since few atoms leave some directions open."""
    merge_inputs = make_merge_inputs("painn", 2, frames=8)
    specialists = merge_inputs.specialists
    mean = METHODS["mean"].run(merge_inputs, silent).potentials[0]
    grams = [
        input_grams(
            s.potential,
            [lambda s=s, t=t: s.potential(edge_vectors(t.graph), t.graph) for t in calibration_set.batches],
        )
        for s, calibration_set in zip(
            specialists, build_calibration(specialists, mean, [1.0, 1.0], directions=0)
        )
    ]
    potentials = [s.potential for s in specialists]
    solve_maps(mean, potentials, grams, alpha=1.0)
    recorded = [linear_rows(specialist) for specialist in specialists]
    assert len(recorded[0]) == 2 * 7 + 2
    for name in recorded[0]:
        rows = [r[name] / np.sqrt(len(r[name])) for r in recorded]
        targets = [x @ p.get_submodule(name).weight.T.numpy() for x, p in zip(rows, potentials)]
        a, b = np.concatenate(rows), np.concatenate(targets)
        expected = a @ np.linalg.lstsq(a, b, rcond=1e-7)[0]
        layer = mean.get_submodule(name)
        np.testing.assert_allclose(a @ layer.weight.T.numpy(), expected, atol=1e-5 * np.abs(b).max())
        if layer.bias is not None:
            biases = [p.get_submodule(name).bias for p in potentials]
            torch.testing.assert_close(layer.bias, (biases[0] + biases[1]) / 2)


def test_blocks_are_fed_by_the_merged_model(make_merge_inputs, architecture) -> None:
    """In the first block both methods see the same inputs if the embeddings are the same, later not."""
    merge_inputs = make_merge_inputs(architecture, 2)
    specialists = merge_inputs.specialists
    specialists[1].potential.embedding.copy_(specialists[0].potential.embedding)
    mean = METHODS["mean"].run(merge_inputs, silent).potentials[0]
    calibration_sets = build_calibration(specialists, mean, [1.0, 1.0], directions=0)
    sequential = merge_blockwise(mean, specialists, calibration_sets, alpha=0.5)
    grams = [
        input_grams(
            s.potential,
            [lambda s=s, t=t: s.potential(edge_vectors(t.graph), t.graph) for t in calibration_set.batches],
        )
        for s, calibration_set in zip(specialists, calibration_sets)
    ]
    solve_maps(mean, [s.potential for s in specialists], grams, alpha=0.5)
    first, last = (
        [(a - b).abs().max() for a, b in zip(x.parameters(), y.parameters())]
        for x, y in ((sequential.stages[0], mean.stages[0]), (sequential.readout, mean.readout))
    )
    assert max(first) < 1e-12
    assert max(last) > 1e-6
