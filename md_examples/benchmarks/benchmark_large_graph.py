"""A merge from neighborhood samples of a graph that is made on the fly: its peak memory does not grow with the graph.

    python md_examples/benchmarks/benchmark_large_graph.py [--nodes 100000 1000000] [--json]

The graph has ten links for each node, seven of them to nodes of its own class; links and features follow from the node's
number, so that nothing is stored. Two GraphSAGE networks learn different halves of the classes on a graph of 10000 nodes,
and are merged on each graph, in a process of its own, by samples of all its nodes (4 of the neighbors, 2 of theirs).
"""

import argparse
import json
import multiprocessing
import resource
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch_geometric.data import Data
from torch_geometric.nn import SAGEConv

from ase_gffmerge import merge_modules

CLASSES, DEGREE, INSIDE, FEATURES, HIDDEN = 8, 10, 7, 16, 32
FANOUT, BATCH, EPOCHS = (4, 2), 2048, 60


@dataclass(frozen=True)
class MadeGraph:
    """A graph of ``n`` nodes; the class of a node is its number modulo CLASSES."""

    n: int

    def neighbors(self, nodes: Tensor) -> Tensor:
        """Neighbors (len(nodes), DEGREE)."""
        per_class = self.n // CLASSES
        steps = torch.arange(1, DEGREE + 1)
        mixed = (nodes[:, None] // CLASSES * 7919 + 104729 * steps**2 + nodes[:, None] // 97) % per_class
        own = mixed * CLASSES + nodes[:, None] % CLASSES
        other = (mixed * CLASSES + (nodes[:, None] * 31 + steps) % CLASSES) % (per_class * CLASSES)
        return torch.where(steps <= INSIDE, own, other)

    def features(self, nodes: Tensor) -> Tensor:
        """Features (len(nodes), FEATURES): that of the class and something like noise."""
        columns = torch.arange(FEATURES)
        centers = torch.cos(1.7 * (nodes % CLASSES)[:, None] * (columns + 1))
        noise = (
            torch.sin((nodes[:, None] % 100_003).double() * (columns + 1) * 12.9898 + 78.233 * columns)
            * 43758.5453
        )
        return (centers + 2.5 * (noise - noise.floor() - 0.5) * 2).float()

    def sample(self, seeds: Tensor) -> Data:
        """A sampled neighborhood, the seeds first."""
        layers, edges = [seeds], []
        for fanout in FANOUT:
            ends = layers[-1]
            chosen = self.neighbors(ends)[:, torch.randperm(DEGREE)[:fanout]]
            edges.append(torch.stack([chosen.flatten(), ends.repeat_interleave(fanout)]))
            layers.append(chosen.flatten())
        links = torch.cat(edges, dim=1)
        others = torch.unique(torch.cat(layers[1:]))
        nodes = torch.cat([seeds, others[~torch.isin(others, seeds)]])
        order = torch.argsort(nodes)
        local = order[torch.searchsorted(nodes[order], links)]
        return Data(
            x=self.features(nodes),
            edge_index=local,
            y=nodes % CLASSES,
            batch_size=len(seeds),
            num_nodes=len(nodes),
        )

    def whole(self) -> Data:
        """The graph as it is, which is only possible for a small one."""
        nodes = torch.arange(self.n)
        links = torch.stack([self.neighbors(nodes).flatten(), nodes.repeat_interleave(DEGREE)])
        return Data(x=self.features(nodes), edge_index=links, y=nodes % CLASSES)


@dataclass(frozen=True)
class Samples:
    """Sampled neighborhoods of all nodes, one batch of seeds after the other, as often as they are read."""

    graph: MadeGraph

    def __iter__(self) -> Iterator[Data]:
        for seeds in torch.arange(self.graph.n).split(BATCH):
            yield self.graph.sample(seeds)


class Network(nn.Module):
    """Two convolutions and a head."""

    def __init__(self, n_out: int):
        super().__init__()
        self.first, self.second = SAGEConv(FEATURES, HIDDEN), SAGEConv(HIDDEN, HIDDEN)
        self.head = nn.Linear(HIDDEN, n_out)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        """Logits."""
        x = torch.relu(self.first(x, edge_index))
        return self.head(torch.relu(self.second(x, edge_index)))


def specialist(graph: MadeGraph, first: int) -> Network:
    """A network that learned half of the classes."""
    torch.manual_seed(first)
    model, data = Network(CLASSES // 2), graph.whole()
    own = (data.y >= first) & (data.y < first + CLASSES // 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(EPOCHS):
        optimizer.zero_grad()
        cross_entropy(model(data.x, data.edge_index)[own], data.y[own] - first).backward()
        optimizer.step()
    return model


def measured(n: int, states: Sequence[dict[str, Tensor]], send: Any) -> None:
    """Merge on the samples of a graph and send what that took; runs in a process of its own."""
    torch.set_num_threads(1)
    models = [Network(CLASSES // 2) for _ in states]
    for model, state in zip(models, states, strict=True):
        model.load_state_dict(state)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    result = merge_modules(models, Samples(MadeGraph(n)), channels="joint")
    seconds = time.process_time() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    test = MadeGraph(n).sample(torch.arange(0, n, max(1, n // 4096)))
    with torch.no_grad():
        found = result.all_classes()(test.x, test.edge_index).argmax(1)
    seeds = test.batch_size
    send.send(
        {
            "nodes": n,
            "links": n * DEGREE,
            "seconds": seconds,
            "peak MB": peak / 1024,
            "grown MB": (peak - before) / 1024,
            "rows": result.layers[0].rows,
            "accuracy": 100 * float((found == test.y)[:seeds].double().mean()),
            "merged": [row.relative for row in result.disagreements if row.model == "merged"],
            "mean": [row.relative for row in result.disagreements if row.model == "mean"],
        }
    )


def main() -> None:
    """Train once, merge on every graph, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--nodes", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    small = MadeGraph(10_000)
    states = [specialist(small, first).state_dict() for first in (0, CLASSES // 2)]
    rows = []
    for n in options.nodes:
        receive, send = multiprocessing.Pipe(duplex=False)
        process = multiprocessing.get_context("spawn").Process(target=measured, args=(n, states, send))
        process.start()
        rows.append(receive.recv())
        process.join()
    if options.json:
        print(json.dumps(rows, indent=1))
        return
    for row in rows:
        print(
            f"{row['nodes']} nodes, {row['links']} links: {row['seconds']:.0f} s, peak {row['peak MB']:.0f} MB "
            f"({row['grown MB']:.0f} for the merge), accuracy {row['accuracy']:.1f} %, merged differs by "
            f"{100 * max(row['merged']):.1f} %, the mean by {100 * max(row['mean']):.1f} %"
        )


if __name__ == "__main__":
    main()
