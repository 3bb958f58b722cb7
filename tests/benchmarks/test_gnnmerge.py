"""The benchmarks of graph networks on tiny graphs: they run through, resume, and say what they measured."""

import json
import sys

import numpy as np
import pytest
import torch


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
def test_every_table_of_the_benchmark(folder, script, monkeypatch, capsys):
    module = script("benchmark_gnnmerge")
    monkeypatch.setattr("ase_gffmerge.methods.modules_layerwise.STEPS", 2)
    threads = torch.get_num_threads()
    command = ["benchmark", folder, "--out", folder / "out", "--seeds", 1, "--epochs", 3, "--kinds", "GCN"]
    monkeypatch.setattr(sys, "argv", [*map(str, command), "--json"])
    module.main()
    document = json.loads(capsys.readouterr().out)
    assert list(document) == list(module.TABLES)
    for table, kinds in document.items():
        rows = kinds["GCN"]
        assert ("ties" in rows) == (table == module.SHARED)
        assert {"specialists", "joint", "gnnmerge++", "gffmerge", "mean+heads"} <= set(rows)
        assert ("gnnmerge" in rows) == (table == module.ADAM)
        assert all(0 <= row["score"][0] <= 100 for row in rows.values())
        assert (rows["gffmerge"]["all classes"] is None) == ("+" in table)
    monkeypatch.setattr(module, "measure", None)  # everything is there: nothing is measured again
    monkeypatch.setattr(sys, "argv", [*map(str, command)])
    module.main()
    assert "| gffmerge |" in capsys.readouterr().out
    assert (folder / "out" / "gnnmerge.png").stat().st_size > 1000
    torch.set_num_threads(threads)


def test_a_made_graph_is_sampled_as_it_is(script):
    module = script("benchmark_large_graph")
    made = module.MadeGraph(800)
    whole, sample = made.whole(), made.sample(torch.arange(100, 164))
    assert whole.edge_index.shape == (2, 8000)
    assert sample.batch_size == 64
    assert torch.equal(sample.x[:64], whole.x[100:164])
    links = set(zip(*whole.edge_index.tolist(), strict=True))
    nodes = [int((whole.x == x).all(1).nonzero()[0]) for x in sample.x]
    assert all((nodes[i], nodes[j]) in links for i, j in zip(*sample.edge_index.tolist(), strict=True))
    own = whole.y[whole.edge_index[0]] == whole.y[whole.edge_index[1]]
    assert own.double().mean() > 0.6
