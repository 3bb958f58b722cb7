"""The benchmark of a graph that is larger than memory, in miniature."""

import torch


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
