"""Graphs that come in pieces: sampled neighborhoods with their seeds first, batches of graphs, and what is read once."""

from collections import Counter
from collections.abc import Iterator

import pytest
import torch
import torch_geometric.nn as geometric
from torch import Tensor, nn
from torch_geometric.data import Batch, Data
from torch_geometric.utils import k_hop_subgraph

from ase_gffmerge import merge_modules
from helpers.graph_networks import CONVOLUTIONS, HIDDEN, NODES, Net, built, graph, moved


class Neighborhoods:
    """What torch_geometric's NeighborLoader gives, for which it needs a compiled package: batches of seeds first."""

    def __init__(self, data: Data, *, size: int = 13, keep: float = 1.0):
        self.data, self.size, self.keep = data, size, keep

    def __iter__(self) -> Iterator[Data]:
        for seeds in torch.arange(self.data.num_nodes).split(self.size):
            kept = torch.rand(self.data.num_edges) < self.keep
            nodes, _, _, inside = k_hop_subgraph(
                seeds, 2, self.data.edge_index[:, kept], num_nodes=self.data.num_nodes
            )
            nodes = torch.cat([seeds, nodes[~torch.isin(nodes, seeds)]])
            place = torch.full((self.data.num_nodes,), -1)
            place[nodes] = torch.arange(len(nodes))
            chosen = kept.nonzero()[:, 0][inside]
            yield Data(
                x=self.data.x[nodes],
                edge_index=place[self.data.edge_index[:, chosen]],
                edge_attr=self.data.edge_attr[chosen],
                edge_type=self.data.edge_type[chosen],
                batch_size=len(seeds),
            )


def weights(result) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in result.module.parameters()])


@pytest.mark.parametrize("heads", [("head",), ()])
def test_whole_neighborhoods_give_what_the_graph_gives(heads):
    models = moved(built(lambda: Net(geometric.SAGEConv)))
    data = [graph(0), graph(1)]
    whole = merge_modules(models, data, heads=heads)
    pieces = merge_modules(models, [Neighborhoods(one) for one in data], heads=heads)
    torch.testing.assert_close(weights(pieces), weights(whole), rtol=1e-8, atol=1e-10)
    assert pieces.layers[0].rows == whole.layers[0].rows == 2 * NODES
    for a, b in zip(pieces.disagreements, whole.disagreements, strict=True):
        assert a.relative == pytest.approx(b.relative, rel=1e-8)


def test_sampled_neighborhoods_are_near_what_the_graph_gives():
    models = moved(built(lambda: Net(geometric.SAGEConv)), size=0.5)
    data = [graph(k, nodes=600, edges=6000) for k in (0, 1)]
    torch.manual_seed(0)
    exact = weights(merge_modules(models, data))
    mean = weights(merge_modules(models, data, ridge=1e9))
    errors = [
        float((weights(merge_modules(models, loaders)) - exact).norm() / (mean - exact).norm())
        for keep in (0.5, 0.8, 0.95)
        for loaders in [[Neighborhoods(one, size=60, keep=keep) for one in data]]
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.3


def test_rows_of_a_mask_are_those_of_the_seeds():
    models = moved(built(lambda: Net(geometric.SAGEConv)))
    data = graph(0)
    loader = Neighborhoods(data)
    result = merge_modules(models, loader, rows=lambda k, item: torch.ones(item.num_nodes, dtype=torch.bool))
    torch.testing.assert_close(weights(result), weights(merge_modules(models, data)), rtol=1e-8, atol=1e-10)


def test_batches_and_iterators_are_lists_of_graphs():
    models = moved(built(lambda: Net(geometric.GATConv)))
    data = [graph(0), graph(1)]
    one_by_one = merge_modules(models, [data, data])
    together = merge_modules(models, Batch.from_data_list(data))
    once = merge_modules(models, [iter(data), iter(data)])
    torch.testing.assert_close(weights(together), weights(one_by_one), rtol=1e-8, atol=1e-10)
    assert torch.equal(weights(once), weights(one_by_one))


class InPlace(Net):
    """A network that changes what its layers return, and normalizes batches."""

    def __init__(self):
        super().__init__(geometric.SAGEConv)
        self.between = nn.Sequential(nn.BatchNorm1d(HIDDEN), nn.ReLU(inplace=True))

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        x = self.between(self.first(x, edge_index))
        return self.head(self.second(x, edge_index).relu_().mul_(2))


class Twice(Net):
    """A layer whose first call comes before another layer, and its second call after it."""

    def __init__(self):
        super().__init__(geometric.SAGEConv)
        self.between = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        x = torch.tanh(self.first(x, edge_index))
        x = torch.tanh(self.between(torch.tanh(self.second(x, edge_index))))
        return self.head(torch.tanh(self.second(x, edge_index)))


class Tied(Twice):
    """A layer whose weight is that of a later one, and another layer between the two."""

    def __init__(self):
        super().__init__()
        self.before = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.before.weight = self.second.lin_l.weight

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        x = torch.tanh(self.before(torch.tanh(self.first(x, edge_index))))
        return self.head(torch.tanh(self.second(torch.tanh(self.between(x)), edge_index)))


class Loader:
    """Graphs that could be others whenever they are read."""

    def __init__(self, graphs: list[Data]):
        self.graphs = graphs

    def __iter__(self) -> Iterator[Data]:
        return iter(self.graphs)


@pytest.mark.parametrize("rows", [None, "confidence"])
@pytest.mark.parametrize(
    "make",
    [*(CONVOLUTIONS[kind] for kind in ("gat, edges", "gin", "transformer")), InPlace, Twice, Tied],
)
def test_what_layers_return_on_a_list_is_kept_and_changes_nothing(make, rows):
    models = moved(built(make))
    data = [[graph(0), graph(2)], [graph(1)]]
    kept = merge_modules(models, data, rows=rows)
    again = merge_modules(models, [Loader(graphs) for graphs in data], rows=rows)
    assert torch.equal(weights(kept), weights(again))
    assert kept.disagreements == again.disagreements
    for ours, other in zip(kept.head_rows, again.head_rows, strict=True):
        assert torch.equal(ours.features, other.features)
        assert torch.equal(ours.logits, other.logits)


def test_a_model_evaluates_each_layer_once_for_its_outputs_and_once_for_its_inputs(monkeypatch):
    calls: Counter[int] = Counter()
    original = geometric.SAGEConv.propagate

    def propagate(self, *args, **kwargs):
        calls[id(self)] += 1
        return original(self, *args, **kwargs)

    models = moved(built(lambda: Net(geometric.SAGEConv)))
    monkeypatch.setattr(geometric.SAGEConv, "propagate", propagate)
    merge_modules(models, [graph(0), graph(1)], channels="auto")
    assert [calls[id(layer)] for model in models for layer in (model.first, model.second)] == [2, 2, 2, 2]
    assert max(calls.values()) == 3  # a merged layer has one more for what is said of it
