"""Two graph neural networks that classify different nodes become one: no potential, no label, about a second.

A stochastic block model of six classes is drawn at random. One network (GraphSAGE) learns to tell classes 0, 1 and 2 apart,
another one, from an initialisation of its own, classes 3, 4 and 5; both see the whole graph, but only labels of their own
classes. ``merge_modules`` makes one network of them, which is asked with and without being told whose node it is.
"""

import time

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch_geometric.data import Data
from torch_geometric.nn import SAGEConv

from ase_gffmerge import merge_modules

N_CLASSES, PER_CLASS, FEATURES, HIDDEN = 6, 200, 24, 64
INSIDE, OUTSIDE, NOISE = 0.03, 0.004, 1.5  # probabilities of links; spread of the features of a class


class Classifier(nn.Module):
    """Two convolutions and a linear layer."""

    def __init__(self, n_classes: int):
        super().__init__()
        self.first, self.second = SAGEConv(FEATURES, HIDDEN), SAGEConv(HIDDEN, HIDDEN)
        self.head = nn.Linear(HIDDEN, n_classes)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        """Logits (n_nodes, n_classes)."""
        x = torch.relu(self.first(x, edge_index))
        return self.head(torch.relu(self.second(x, edge_index)))


def block_model() -> tuple[Tensor, Tensor, Tensor]:
    """Features, edges and labels."""
    labels = torch.arange(N_CLASSES).repeat_interleave(PER_CLASS)
    same = labels[:, None] == labels
    linked = torch.rand(same.shape) < torch.where(same, INSIDE, OUTSIDE)
    edges = (linked | linked.T).fill_diagonal_(False).nonzero().T
    features = torch.randn(N_CLASSES, FEATURES)[labels] + NOISE * torch.randn(len(labels), FEATURES)
    return features, edges, labels


def trained(graph: Data, n_classes: int) -> Classifier:
    """A network trained on the labelled nodes of a graph."""
    model = Classifier(n_classes)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=5e-4)
    for _ in range(60):
        optimizer.zero_grad()
        logits = model(graph.x, graph.edge_index)
        cross_entropy(logits[graph.train_mask], graph.y[graph.train_mask]).backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def main() -> None:
    """Train two specialists, merge them, compare."""
    torch.manual_seed(0)
    features, edges, labels = block_model()
    training = torch.rand(len(labels)) < 0.5
    graphs, models = [], []
    for first in (0, 3):
        own = (labels >= first) & (labels < first + 3)
        y = torch.where(own, labels - first, -1)
        graphs.append(Data(x=features, edge_index=edges, y=y, train_mask=training & own))
        with torch.enable_grad():
            models.append(trained(graphs[-1], 3))

    start = time.perf_counter()
    result = merge_modules(models, graphs)
    seconds = time.perf_counter() - start
    print(result.summary())

    def accuracy(views: list[nn.Module]) -> float:
        found = [
            (view(g.x, g.edge_index).argmax(1) == g.y)[(g.y >= 0) & ~training].float().mean()
            for view, g in zip(views, graphs, strict=True)
        ]
        return 100 * float(sum(found)) / len(found)

    merged = [result.for_model(k) for k in (0, 1)]
    alone, together = accuracy(models), accuracy(merged)
    everything = result.all_classes()(features, edges).argmax(1)
    without = 100 * float((everything == labels)[~training].float().mean())
    print(f"test accuracy: specialists {alone:.1f} %, merged {together:.1f} % ({seconds:.2f} s)")
    print(f"one network for all six classes, nobody says whose node it is: {without:.1f} %")
    assert together > alone - 2
    assert without > 100 / N_CLASSES + 30
    mean = [row.relative for row in result.disagreements if row.model == "mean"]
    ours = [row.relative for row in result.disagreements if row.model == "merged"]
    assert max(ours) < 0.5 * max(mean)


if __name__ == "__main__":
    main()
