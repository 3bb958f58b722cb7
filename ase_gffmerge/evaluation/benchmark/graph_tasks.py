"""Graph data sets, tasks on them, and the networks that are trained for a task and then merged."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.sparse as sparse
import torch
import torch.nn.functional as functional
import torch_geometric.nn as geometric
from torch import Tensor, nn
from torch_geometric.data import Data

from ase_gffmerge.errors import FramesError

WIDTH, HIDDEN, EMBEDDING = 256, 128, 64
"""Features after the singular-value decomposition, channels of a layer, and those of a node in link prediction."""

LEARNING_RATE, DECAY, DROPOUT = 0.01, 5e-4, 0.5

CONVOLUTIONS: dict[str, Callable[[int, int], nn.Module]] = {
    "GCN": geometric.GCNConv,
    "SAGE": geometric.SAGEConv,
    "GAT": lambda n_in, n_out: geometric.GATConv(n_in, n_out // 8, heads=8),
    "GIN": lambda n_in, n_out: geometric.GINConv(
        nn.Sequential(nn.Linear(n_in, n_out), nn.ReLU(), nn.Linear(n_out, n_out))
    ),
    "Transformer": lambda n_in, n_out: geometric.TransformerConv(n_in, n_out // 8, heads=8),
}


class Network(nn.Module):
    """Two convolutions and a linear head, as in GNNMerge (arXiv 2503.03384)."""

    def __init__(self, kind: str, n_in: int, n_out: int):
        super().__init__()
        self.first, self.second = CONVOLUTIONS[kind](n_in, HIDDEN), CONVOLUTIONS[kind](HIDDEN, HIDDEN)
        self.head = nn.Linear(HIDDEN, n_out)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        """Logits of classes, or embeddings whose scalar products are logits of links, (n, n_out)."""
        for layer in (self.first, self.second):
            x = functional.dropout(functional.relu(layer(x, edge_index)), DROPOUT, self.training)
        return self.head(x)


@dataclass(frozen=True)
class Links:
    """Pairs of nodes (2, n_pairs), and whether they are linked (n_pairs,): 1 or 0."""

    pairs: Tensor
    linked: Tensor

    def scores(self, embeddings: Tensor) -> Tensor:
        """Logits of the pairs (n_pairs,): scalar products of the nodes' embeddings."""
        return (embeddings[self.pairs[0]] * embeddings[self.pairs[1]]).sum(1)


@dataclass(frozen=True)
class Task:
    """A graph with masks of training, validation and test nodes, or links in their place.

    Attributes
    ----------
    data
        Labels are counted within the task; nodes of other tasks have -1.
    n_out
        Number of classes, or of channels of an embedding.
    classes
        The labels that the classes had.
    links
        What is predicted instead of classes; the masks are theirs.
    """

    data: Data
    n_out: int
    classes: tuple[int, ...] = ()
    links: Links | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Everything that training sees, by name."""
        links = {} if self.links is None else {"pairs": self.links.pairs, "linked": self.links.linked}
        return {str(key): value for key, value in self.data.to_dict().items()} | links

    def loss(self, output: Tensor, mask: Tensor) -> Tensor:
        """Cross-entropy of some nodes or pairs."""
        if self.links is None:
            return functional.cross_entropy(output[mask], self.data.y[mask])
        logits, truth = self.links.scores(output)[mask], self.links.linked[mask]
        return functional.binary_cross_entropy_with_logits(logits, truth)

    def score(self, output: Tensor, mask: Tensor) -> float:
        """Accuracy of some nodes, or area under the receiver operating characteristic of some pairs, in percent."""
        if self.links is None:
            return 100 * float((output.argmax(1) == self.data.y)[mask].double().mean())
        ranks = self.links.scores(output)[mask].argsort().argsort().double() + 1
        positive = self.links.linked[mask] > 0
        n, m = int(positive.sum()), int((~positive).sum())
        return 100 * float((ranks[positive].sum() - n * (n + 1) / 2) / (n * m))


def read_graph(path: Path, *, width: int | None = WIDTH) -> tuple[Tensor, Tensor, Tensor]:
    """Features (rows of length 1; their leading singular vectors), undirected edges and labels of a file.

    Raises
    ------
    FramesError
        When the file is not there or is no graph of shchur/gnn-benchmark.
    """
    try:
        held = np.load(path)
    except (OSError, ValueError) as error:
        raise FramesError(
            f"{path}: no graph could be read ({error}); put {path.name} of shchur/gnn-benchmark there"
        ) from error
    if "node_features" in held:
        features, labels = sparse.csr_matrix(held["node_features"]), held["node_labels"]
        pairs, n = held["edges"].T, len(held["node_labels"])
    else:
        features, adjacency = (
            sparse.csr_matrix(
                (held[f"{key}_data"], held[f"{key}_indices"], held[f"{key}_indptr"]),
                shape=held[f"{key}_shape"],
            )
            for key in ("attr", "adj")
        )
        labels, pairs, n = held["labels"], np.stack(adjacency.nonzero()), adjacency.shape[0]
    pairs = np.unique(np.sort(pairs[:, pairs[0] != pairs[1]], axis=0), axis=1)
    if pairs.max() >= n:
        raise FramesError(f"{path}: links name {pairs.max() + 1} nodes where features are given for {n}")
    lengths = np.sqrt(np.asarray(features.multiply(features).sum(1))).clip(1e-9)
    x = sparse.csr_matrix(features.multiply(1 / lengths), dtype=np.float64)
    if width and min(x.shape) > width:
        left, values, _ = sparse.linalg.svds(x, k=width, v0=np.ones(min(x.shape)))
        dense = left[:, ::-1] * values[::-1]
    else:
        dense = x.toarray()
    scale = (dense.shape[1] / np.square(dense).sum(1).mean()) ** 0.5 / 4
    edges = torch.tensor(np.concatenate([pairs, pairs[::-1]], axis=1), dtype=torch.long)
    return (
        torch.tensor(scale * dense, dtype=torch.float32),
        edges,
        torch.tensor(labels.astype(np.int64)),
    )


def parts(n: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Masks (n,) of 60 % for training, 20 % for validation and 20 % for tests."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    masks = [torch.zeros(n, dtype=torch.bool) for _ in range(3)]
    for mask, own in zip(masks, order.tensor_split([int(0.6 * n), int(0.8 * n)]), strict=True):
        mask[own] = True
    return masks[0], masks[1], masks[2]


def split_classes(path: Path, n_tasks: int, *, seed: int, width: int | None = WIDTH) -> list[Task]:
    """One graph, its classes dealt out at random to several tasks.

    Parameters
    ----------
    path
        See :func:`read_graph`.
    n_tasks
        Number of tasks.
    seed
        Of masks and of the classes' order.
    width
        Features after the singular-value decomposition; ``None``: as they are.
    """
    x, edges, y = read_graph(path, width=width)
    masks = parts(len(y), seed)
    n_classes = int(y.max()) + 1
    order = torch.randperm(n_classes, generator=torch.Generator().manual_seed(seed))
    return [_nodes(x, edges, y, masks, classes.tolist()) for classes in order.tensor_split(n_tasks)]


def _nodes(x: Tensor, edges: Tensor, y: Tensor, masks: Sequence[Tensor], classes: list[int]) -> Task:
    labels = torch.full_like(y, -1)
    for i, label in enumerate(classes):
        labels[y == label] = i
    own = labels >= 0
    train, validation, test = (mask & own for mask in masks)
    data = Data(x=x, edge_index=edges, y=labels, train_mask=train, val_mask=validation, test_mask=test)
    return Task(data, len(classes), tuple(classes))


def predict_links(path: Path, *, seed: int, width: int | None = WIDTH) -> Task:
    """Link prediction: messages along 60 % of the links, tests on others and on as many pairs without a link.

    Parameters
    ----------
    path, width
        As in :func:`split_classes`.
    seed
        Of masks and of the pairs without a link.
    """
    x, edges, y = read_graph(path, width=width)
    undirected = edges[:, edges[0] < edges[1]]
    generator = torch.Generator().manual_seed(seed)
    wrong = torch.randint(len(y), undirected.shape, generator=generator)
    pairs = torch.cat([undirected, wrong], dim=1)
    linked = (torch.arange(pairs.shape[1]) < undirected.shape[1]).float()
    train, validation, test = parts(undirected.shape[1], seed)
    kept = undirected[:, train]
    masks = {
        name: torch.cat([mask, mask])
        for name, mask in (("train_mask", train), ("val_mask", validation), ("test_mask", test))
    }
    data = Data(x=x, edge_index=torch.cat([kept, kept.flip(0)], dim=1), y=y, **masks)
    return Task(data, EMBEDDING, links=Links(pairs, linked))


def train(views: Sequence[nn.Module], tasks: Sequence[Task], *, epochs: int) -> None:
    """Train modules, one per task, which may share parameters; what was best on validation is kept.

    Parameters
    ----------
    views, tasks
        Modules and their tasks.
    epochs
        Steps of the optimizer.
    """
    parameters = list(dict.fromkeys(p for view in views for p in view.parameters()))
    optimizer = torch.optim.Adam(parameters, lr=LEARNING_RATE, weight_decay=DECAY)
    best, kept = -1.0, deepcopy([view.state_dict() for view in views])
    for _ in range(epochs):
        for view in views:
            view.train()
        optimizer.zero_grad()
        for view, task in zip(views, tasks, strict=True):
            task.loss(view(task.data.x, task.data.edge_index), task.data.train_mask).backward()
        optimizer.step()
        score = sum(scores(views, tasks, "val_mask"))
        if score >= best:
            best, kept = score, deepcopy([view.state_dict() for view in views])
    for view, state in zip(views, kept, strict=True):
        view.load_state_dict(state)


@torch.no_grad()
def scores(views: Sequence[nn.Module], tasks: Sequence[Task], mask: str = "test_mask") -> list[float]:
    """Score of every module on its own task.

    Parameters
    ----------
    views, tasks
        Modules and their tasks.
    mask
        Which nodes or pairs: train_mask, val_mask or test_mask.
    """
    return [
        task.score(view.eval()(task.data.x, task.data.edge_index), task.data[mask])
        for view, task in zip(views, tasks, strict=True)
    ]


@torch.no_grad()
def score_without_task(views: Sequence[nn.Module], tasks: Sequence[Task]) -> float | None:
    """Accuracy on the test nodes of all tasks when nobody says which task a node belongs to; one graph only.

    Parameters
    ----------
    views
        Modules for each of the tasks, whose outputs are put side by side, or one with the classes of all.
    tasks
        The tasks.
    """
    data = tasks[0].data
    if any(task.data.x is not data.x or not task.classes for task in tasks):
        return None
    logits = torch.cat([view.eval()(data.x, data.edge_index) for view in views], dim=1)
    truth, test, first = torch.full_like(data.y, -1), torch.zeros_like(data.test_mask), 0
    for task in tasks:
        own = task.data.y >= 0
        truth[own] = task.data.y[own] + first
        test, first = test | task.data.test_mask, first + task.n_out
    return 100 * float((logits.argmax(1) == truth)[test].double().mean())
