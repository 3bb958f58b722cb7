"""Small graph networks of every kind, and random graphs for them."""

from collections.abc import Callable
from copy import deepcopy
from itertools import pairwise

import torch
import torch_geometric.nn as geometric
from torch import Tensor, nn
from torch_geometric.data import Data

IN, HIDDEN, NODES, EDGES = 5, 6, 60, 240


def graph(seed: int = 0, *, nodes: int = NODES, edges: int = EDGES) -> Data:
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(nodes, (2, edges), generator=generator)
    return Data(
        x=torch.randn(nodes, IN, generator=generator, dtype=torch.float64),
        edge_index=index,
        edge_attr=torch.randn(edges, 3, generator=generator, dtype=torch.float64),
        edge_type=torch.randint(2, (edges,), generator=generator),
        batch=torch.arange(nodes) // (nodes // 3),
    )


class Net(nn.Module):
    """Two convolutions of a kind, something between them, and a head."""

    def __init__(
        self, conv: Callable[[int, int], nn.Module], extra: tuple[str, ...] = (), *, classes: int = 3
    ):
        super().__init__()
        self.first, self.second = conv(IN, HIDDEN), conv(HIDDEN, HIDDEN)
        self.between: nn.Module = nn.Identity()
        self.head = nn.Linear(HIDDEN, classes)
        self.extra = extra

    def forward(self, x: Tensor, edge_index: Tensor, edge_attr: Tensor, edge_type: Tensor) -> Tensor:
        more = [{"edge_attr": edge_attr, "edge_type": edge_type}[name] for name in self.extra]
        x = torch.relu(self.between(self.first(x, edge_index, *more)))
        return self.head(torch.relu(self.second(x, edge_index, *more)))


def mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


CONVOLUTIONS: dict[str, Callable[[], Net]] = {
    "gcn": lambda: Net(geometric.GCNConv),
    "sage": lambda: Net(geometric.SAGEConv),
    "sage, no root": lambda: Net(lambda a, b: geometric.SAGEConv(a, b, root_weight=False, normalize=True)),
    "gat": lambda: Net(lambda a, b: geometric.GATConv(a, b // 2, heads=2)),
    "gat, edges": lambda: Net(
        lambda a, b: geometric.GATConv(a, b, heads=2, concat=False, edge_dim=3, residual=True), ("edge_attr",)
    ),
    "gatv2": lambda: Net(lambda a, b: geometric.GATv2Conv(a, b // 2, heads=2, edge_dim=3), ("edge_attr",)),
    "gin": lambda: Net(lambda a, b: geometric.GINConv(mlp(a, 8, b), train_eps=True)),
    "transformer": lambda: Net(
        lambda a, b: geometric.TransformerConv(a, b // 2, heads=2, edge_dim=3), ("edge_attr",)
    ),
    "transformer, beta": lambda: Net(lambda a, b: geometric.TransformerConv(a, b // 2, heads=2, beta=True)),
    "tag": lambda: Net(lambda a, b: geometric.TAGConv(a, b, K=2)),
    "cheb": lambda: Net(lambda a, b: geometric.ChebConv(a, b, K=3)),
    "graph": lambda: Net(geometric.GraphConv),
    "rgcn": lambda: Net(lambda a, b: geometric.RGCNConv(a, b, 2), ("edge_type",)),
    "rgcn, bases": lambda: Net(lambda a, b: geometric.RGCNConv(a, b, 2, num_bases=2), ("edge_type",)),
    "nnconv": lambda: Net(lambda a, b: geometric.NNConv(a, b, mlp(3, 4, a * b)), ("edge_attr",)),
}


def moved(model: nn.Module, n: int = 2, *, size: float = 0.1) -> list[nn.Module]:
    """Copies of a model with every weight moved by a random tenth of its tensor's size."""
    found = []
    for k in range(n):
        generator = torch.Generator().manual_seed(k + 1)
        copy = deepcopy(model)
        with torch.no_grad():
            for parameter in copy.parameters():
                step = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
                parameter += size * (parameter.abs().mean() + 0.1) * step
        found.append(copy)
    return found


def built(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make().double()


def outputs(model: nn.Module, data: Data) -> Tensor:
    with torch.no_grad():
        return model.eval()(data.x, data.edge_index, data.edge_attr, data.edge_type)
