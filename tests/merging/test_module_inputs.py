"""What users give to a merge of modules: odd modules, examples and masks, merged rightly or refused with a remedy."""

from copy import deepcopy

import numpy as np
import pytest
import torch
import torch_geometric.nn as geometric
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch_geometric.data import Data, HeteroData

from ase_gffmerge import merge_modules
from ase_gffmerge.errors import ArgumentError, FramesError, IncompatibleSpecialistsError
from helpers.graph_networks import CONVOLUTIONS, HIDDEN, IN, NODES, Net, built, graph, moved, outputs


def relative(result, kind: str = "merged") -> list[float]:
    return [row.relative for row in result.disagreements if row.model == kind]


def parameters(result) -> Tensor:
    return torch.cat([p.detach().flatten() for p in result.module.parameters()])


def test_generators_of_models_and_of_examples_are_lists():
    models = moved(built(CONVOLUTIONS["sage"]))
    plain = merge_modules(models, [[graph(0), graph(1)]] * 2)
    result = merge_modules((model for model in models), (graph(k) for k in (0, 1)))
    assert torch.equal(parameters(result), parameters(plain))


def test_masks_of_any_kind_choose_the_same_nodes():
    models, data = moved(built(CONVOLUTIONS["sage"]), size=0.5), graph(0)
    mask = torch.arange(NODES) % 3 == 0
    expected = merge_modules(models, data, channels="joint", rows=mask)
    kinds = (
        mask.int(),
        mask.numpy(),
        mask.tolist(),
        [mask.numpy(), mask],
        torch.stack([mask, mask]),
        lambda *_: mask.long(),
    )
    for rows in kinds:
        found = merge_modules(models, data, channels="joint", rows=rows)
        assert torch.equal(parameters(found), parameters(expected))
        assert relative(found) == relative(expected)
    assert (
        merge_modules(models, data, channels="joint", rows=[None, np.ones(NODES)]).layers[0].rows == 2 * NODES
    )
    with pytest.raises(FramesError, match="2 models and 1 masks"):
        merge_modules(models, data, channels="joint", rows=[mask])
    with pytest.raises(FramesError, match="indices of nodes"):
        merge_modules(models, data, channels="joint", rows=torch.arange(NODES))


def test_a_model_may_be_a_single_layer():
    models = moved(built(lambda: geometric.GCNConv(IN, 3)), size=0.5)
    data = [graph(0), graph(1)]
    result = merge_modules(models, data)
    assert result.layers[0].rows == 2 * NODES
    assert max(relative(result)) < max(relative(result, "mean"))


class Typed(nn.Module):
    """Two kinds of nodes, asked for by the names of all of their attributes."""

    def __init__(self):
        super().__init__()
        self.conv, self.out = geometric.SAGEConv((IN, IN), HIDDEN), nn.Linear(HIDDEN, 2)

    def forward(
        self, x: dict, edge_index: dict, scale: Tensor | None = None, y: Tensor | None = None
    ) -> Tensor:
        found = self.conv((x["a"], x["b"]), edge_index["a", "to", "b"])
        return self.out(found.relu()) * scale


def test_graphs_of_several_kinds_of_nodes_stay_as_they_are():
    data = HeteroData(scale=torch.tensor(2.0))
    data["a"].x, data["b"].x = graph(0).x, graph(1).x
    data["a", "to", "b"].edge_index = graph(0).edge_index
    model = built(Typed)
    result = merge_modules([model, model], data)
    assert max(relative(result)) < 1e-10
    assert data.node_types == ["a", "b"]


class Whole(nn.Module):
    """Takes a graph as a whole."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = geometric.GCNConv(IN, HIDDEN, cached=True), nn.Linear(HIDDEN, 2)

    def forward(self, data: Data, scale: float = 1.0) -> Tensor:
        return scale * self.head(self.conv(data.x, data.edge_index).relu())


def test_a_convolution_that_keeps_its_graph_keeps_none_of_the_examples():
    models = moved(built(Whole))
    result = merge_modules(models, [[graph(0), graph(1)]] * 2)
    own = merge_modules([m for m in models], [graph(1)] * 2)
    assert all(m.conv._cached_edge_index is None for m in (*models, result.module, own.module))


def test_wrappers_are_refused_with_a_remedy():
    models = [nn.DataParallel(model) for model in moved(built(CONVOLUTIONS["gcn"]))]
    with pytest.raises(FramesError, match="give the module inside"):
        merge_modules(models, graph(0))


def test_models_that_cannot_be_averaged_are_refused_with_a_remedy():
    models, data = moved(built(CONVOLUTIONS["gcn"])), graph(0)
    with pytest.raises(IncompatibleSpecialistsError, match="float32 on cpu in model 1"):
        merge_modules([models[0], deepcopy(models[1]).float()], data)
    with pytest.raises(IncompatibleSpecialistsError, match="has no values yet"):
        merge_modules([geometric.SAGEConv(-1, 6), geometric.SAGEConv(-1, 6)], data)
    with pytest.raises(IncompatibleSpecialistsError, match="nothing in common"):
        merge_modules([geometric.GCN(IN, 6, n, 3).double() for n in (2, 3)], data)
    with pytest.raises(FramesError, match="missing a required argument: 'edge_index'"):
        merge_modules([model.first for model in models], (data.x, data.edge_index))
    with pytest.raises(ArgumentError, match="no model 2"):
        merge_modules(models, data).for_model(2)
    kept = deepcopy(models[0])
    kept.held = kept.head.weight * 2
    with pytest.raises(IncompatibleSpecialistsError, match="cannot be copied"):
        merge_modules([kept, models[1]], data)
    scripted = [torch.jit.script(nn.Linear(IN, 2)) for _ in range(2)]
    with pytest.raises(IncompatibleSpecialistsError, match="RecursiveScriptModule is not"):
        merge_modules(scripted, data.x)


class Bent(geometric.GATConv):
    """Not affine in its bias."""

    def forward(self, x, edge_index):
        return torch.tanh(super().forward(x, edge_index))


class Cosine(nn.Linear):
    """Not affine in its weight."""

    def forward(self, x):
        return nn.functional.linear(x, nn.functional.normalize(self.weight, dim=1), self.bias)


class Odd(nn.Module):
    """Layers that only look like those that a merge knows, complex numbers, and integers that differ."""

    def __init__(self):
        super().__init__()
        self.first, self.cosine = Bent(IN, HIDDEN), Cosine(HIDDEN, HIDDEN)
        self.normed, self.head = weight_norm(nn.Linear(HIDDEN, HIDDEN)), nn.Linear(HIDDEN, 2)
        self.phase = nn.Parameter(torch.ones(HIDDEN, dtype=torch.complex128))
        self.register_buffer("order", torch.arange(HIDDEN))

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        x = torch.tanh(self.normed(self.cosine(self.first(x, edge_index))))
        return self.head((x[:, self.order] * self.phase).abs())


def test_what_only_looks_like_a_known_layer_is_averaged_and_named():
    models = moved(built(Odd))
    with torch.no_grad():
        models[0].phase.fill_(1)
        models[1].phase.fill_(1j)
    models[1].order.copy_(models[1].order.roll(1))
    result = merge_modules(models, graph(0))
    assert {layer.name.split(" ")[0] for layer in result.layers} == {"first.lin", "head"}
    assert {"first.bias", "first.att_src", "cosine.weight", "phase"} < set(result.averaged)
    torch.testing.assert_close(
        result.module.phase.detach(), torch.full((HIDDEN,), 0.5 + 0.5j, dtype=torch.complex128)
    )
    assert result.kept == ("order",)
    assert "own of every model: head, order" in result.summary()
    assert max(relative(merge_modules([models[0], models[0]], graph(0)))) < 1e-10


class Between(nn.Module):
    """Convolutions from nodes of one kind to nodes of another."""

    def __init__(self):
        super().__init__()
        self.relations = geometric.RGCNConv((IN, 4), HIDDEN, 2)
        self.attention = geometric.GATConv((IN, 4), HIDDEN, add_self_loops=False)
        self.out = nn.Linear(HIDDEN, 2)

    def forward(self, x: Tensor, edge_index: Tensor, edge_type: Tensor) -> Tensor:
        found = self.relations((x, x[:, :4]), edge_index, edge_type)
        return self.out(torch.tanh(found + self.attention((x, None), edge_index)))


def test_senders_of_another_width_and_receivers_without_features():
    model = built(Between)
    same = merge_modules([model, model], graph(0))
    assert max(relative(same)) < 1e-10
    models = moved(model)
    result = merge_modules(models, graph(0))
    assert sum(relative(result)) < sum(relative(result, "mean"))
    assert "attention.lin_dst" in result.unreached


class Tied(nn.Module):
    """A head with the weight of the layer before."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(IN, IN), nn.Linear(IN, IN)
        self.head.weight = self.body.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x)))


def test_a_weight_of_two_layers_is_solved_once():
    """A solution for the second would undo that for the first, and one for every head that of the others."""
    models, examples = moved(built(Tied)), [graph(0).x, graph(1).x]
    result = merge_modules(models, examples)
    assert [layer.name for layer in result.layers] == ["body"]
    assert max(relative(result)) < 1.1 * max(relative(result, "mean"))
    without = merge_modules(models, examples, heads=())
    assert without.averaged == ("head.bias",)
    assert without.unreached == ()
    assert max(relative(merge_modules([models[0], models[0]], examples))) < 1e-10


class Last(Net):
    """Something comes after the head."""

    def __init__(self, last):
        super().__init__(geometric.SAGEConv)
        self.last = last

    def forward(self, x: Tensor, edge_index: Tensor, edge_attr: Tensor, edge_type: Tensor) -> Tensor:
        return self.last(super().forward(x, edge_index, edge_attr, edge_type))


@pytest.mark.parametrize("last", [torch.nn.Softmax(1), torch.nn.LogSoftmax(1), torch.nn.Sigmoid()])
def test_classes_of_networks_that_go_on_after_their_heads(last):
    """But for a log-softmax, log-probabilities cannot be told: outputs stand side by side as they are."""
    result = merge_modules(moved(built(lambda: Last(last)), size=1.0), [graph(0), graph(1)])
    found = outputs(result.all_classes(), graph(0))
    each = [outputs(result.for_model(k), graph(0)) for k in (0, 1)]
    if isinstance(last, torch.nn.LogSoftmax):
        torch.testing.assert_close(found.exp().sum(1), torch.ones(NODES).double())
        torch.testing.assert_close(found[:, :3].log_softmax(1), each[0])
    else:
        torch.testing.assert_close(found, torch.cat(each, 1))


class Several(Net):
    def forward(
        self, x: Tensor, edge_index: Tensor, edge_attr: Tensor, edge_type: Tensor
    ) -> dict[str, Tensor]:
        return {"logits": super().forward(x, edge_index, edge_attr, edge_type)}


def test_classes_of_networks_with_several_outputs_are_refused():
    result = merge_modules(moved(built(lambda: Several(geometric.SAGEConv))), graph(0))
    with pytest.raises(ArgumentError, match="return a dict"):
        outputs(result.all_classes(), graph(0))
