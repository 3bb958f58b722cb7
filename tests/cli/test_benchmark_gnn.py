"""``gffmerge benchmark gnn`` on tiny graphs: it runs through, goes on, and says what it measured."""

from copy import deepcopy

import numpy as np
import pytest
import torch

from ase_gffmerge.evaluation.benchmark import graph_networks as benchmark
from ase_gffmerge.evaluation.benchmark import graph_tasks


@pytest.fixture
def folder(tmp_path):
    """Two files as shchur/gnn-benchmark has them: 80 nodes, four classes that links and features follow."""
    rng = np.random.default_rng(0)
    for name in ("cora", "citeseer"):
        labels = np.arange(80) % 4
        near = rng.random((80, 80)) < np.where(labels[:, None] == labels, 0.2, 0.02)
        words = rng.random((80, 12)) < np.where(labels[:, None] == np.arange(12) % 4, 0.7, 0.1)
        words[:, 0] = True
        held = {"labels": labels.astype(np.int8)}
        for key, matrix in (("adj", near), ("attr", words)):
            rows, columns = matrix.nonzero()
            held |= {
                f"{key}_data": np.ones(len(columns), np.float32),
                f"{key}_indices": columns.astype(np.int32),
                f"{key}_indptr": np.searchsorted(rows, np.arange(81)).astype(np.int32),
                f"{key}_shape": np.array(matrix.shape),
            }
        np.savez(tmp_path / f"{name}.npz", **held)
    return tmp_path


@pytest.mark.slow
def test_every_table_of_the_benchmark(folder, gffmerge, monkeypatch):
    monkeypatch.setattr("ase_gffmerge.methods.modules_layerwise.STEPS", 2)
    command = ["benchmark", "gnn", folder, "--out", folder / "out", "--seeds", 1, "--epochs", 3]
    document = gffmerge(*command, "--kinds", "GCN", "--json").json()
    assert list(document) == list(benchmark.TABLES)
    for table, kinds in document.items():
        rows = kinds["GCN"]
        assert ("ties" in rows) == (table == benchmark.SHARED)
        assert {"specialists", "joint", "gnnmerge++", "gffmerge", "mean+heads"} <= set(rows)
        assert ("gnnmerge" in rows) == (table == benchmark.ADAM)
        assert all(0 <= row["score"][0] <= 100 for row in rows.values())
        assert (rows["gffmerge"]["all classes"] is None) == ("+" in table)
    few = gffmerge(*command, "--kinds", "GCN", "--methods", "regmean", "--json").json()
    assert all(list(kinds["GCN"]) == ["joint", "specialists", "regmean"] for kinds in few.values())
    monkeypatch.setattr(benchmark, "measure", None)  # everything is there: nothing is measured again
    assert "| gffmerge |" in gffmerge(*command, "--kinds", "GCN").out
    assert (folder / "out" / "gnnmerge.png").stat().st_size > 1000


def test_lines_of_another_version_are_measured_again(tmp_path, monkeypatch):
    asked = []

    def measure(table, kind, seed, names, **_):
        asked.append(names)
        return {name: {"tasks": [50.0], "all classes": 20.0, "seconds": 1.0} for name in names}

    monkeypatch.setattr(benchmark, "measure", measure)
    table = ("Cora in two halves",)
    bench = benchmark.GraphBenchmark(
        data=tmp_path, out=tmp_path, tables=table, kinds=("GCN",), methods=("mean",), seeds=1
    )
    for _ in range(2):
        bench.run()
    assert asked == [["joint", "specialists", "mean"]]
    monkeypatch.setattr(benchmark, "MERGE_VERSION", -1)
    bench.run()
    assert len(asked) == 2


def test_training_is_the_same_whatever_was_trained_before(folder):
    task = graph_tasks.split_classes(folder / "cora.npz", 2, seed=0)[0]
    start = graph_tasks.Network("GCN", task.data.num_features, task.n_out)
    found = []
    for seed in (0, 1):
        model = deepcopy(start)
        torch.manual_seed(seed)
        benchmark.trained([model], [task], epochs=3, folder=folder / str(seed))
        found.append(model.state_dict())
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--kinds", "LSTM"), "there is no kind 'LSTM'; choose from: GCN, SAGE"),
        (("--methods", "SWA"), "there is no method 'SWA'; choose from: mean, mean+heads"),
        (("--tables", "Cora"), "there is no table 'Cora'; choose from: Cora in two halves"),
        (
            ("--kinds", "GAT", "--methods", "gnnmerge"),
            "gnnmerge only in 'Cora in two halves' with GCN and SAGE",
        ),
        (("--kinds", "GCN"), "put cora.npz of shchur/gnn-benchmark there"),
    ],
)
def test_what_cannot_be_measured_is_said(tmp_path, gffmerge, options, said):
    assert said in gffmerge("benchmark", "gnn", tmp_path, "--out", "out", *options).error()
