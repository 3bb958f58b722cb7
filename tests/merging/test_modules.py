"""Any graph networks, merged: every kind of layer, rows, heads, and what a merge says of itself."""

from collections.abc import Callable
from copy import deepcopy

import numpy as np
import pytest
import torch
import torch_geometric.nn as geometric
from torch import Tensor, nn
from torch_geometric.data import Data, HeteroData

from ase_gffmerge import merge_modules
from ase_gffmerge.errors import ArgumentError, FramesError, IncompatibleSpecialistsError
from ase_gffmerge.merging.module_views import HeadRows, class_regions
from helpers.graph_networks import CONVOLUTIONS, HIDDEN, IN, NODES, Net, built, graph, mlp, moved, outputs


def errors(result, kind: str) -> list[float]:
    return [row.relative for row in result.disagreements if row.model == kind]


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_copies_give_the_model_back_and_others_come_nearer_than_the_mean(kind):
    model = built(CONVOLUTIONS[kind])
    data = [graph(0), graph(1)]
    same = merge_modules([model, deepcopy(model)], data)
    for k in (0, 1):
        torch.testing.assert_close(
            outputs(same.for_model(k), data[k]), outputs(model, data[k]), rtol=0, atol=1e-10
        )
    assert same.unreached == ()
    result = merge_modules(moved(model), data)
    assert max(errors(result, "merged")) < 0.95 * max(errors(result, "mean"))
    hopeless = {"eps": "gin", "comp": "rgcn, bases"}
    assert {name.rpartition(".")[2] for name in result.averaged} <= {
        n for n, of in hopeless.items() if of == kind
    }


class Blocks(nn.Module):
    """Everything of torch that a merge knows: a table, attention, normalizations, a layer called twice."""

    def __init__(self):
        super().__init__()
        self.table, self.norm = nn.Embedding(4, 6), nn.BatchNorm1d(6)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.twice, self.layer_norm = nn.Linear(6, 6), nn.LayerNorm(6)
        self.graph_norm, self.instance = geometric.GraphNorm(6), geometric.LayerNorm(6, mode="graph")
        self.out = nn.Linear(6, 2)

    def forward(self, kinds: Tensor, batch: Tensor) -> Tensor:
        x = self.norm(self.table(kinds))
        x = x + self.attention(x[None], x[None], x[None], need_weights=False)[0][0]
        x = self.layer_norm(x + torch.tanh(self.twice.forward(torch.tanh(self.twice(x)))))
        return self.out(self.instance(torch.tanh(self.graph_norm(x, batch))))


def kinds(seed: int) -> Data:
    generator = torch.Generator().manual_seed(seed)
    return Data(
        kinds=torch.randint(4, (90,), generator=generator), batch=torch.arange(90) // 30, num_nodes=90
    )


def warmed(models: list[nn.Module]) -> list[nn.Module]:
    """Models whose batch normalizations have statistics of their own."""
    for k, model in enumerate(models):
        for norm in model.modules():
            if isinstance(norm, nn.BatchNorm1d):
                generator = torch.Generator().manual_seed(k)
                norm.running_mean.copy_(0.3 * torch.randn(6, generator=generator, dtype=torch.float64))
                norm.running_var.copy_(0.5 + torch.rand(6, generator=generator, dtype=torch.float64))
    return models


def test_layers_of_torch_and_statistics_of_batches():
    model = warmed([built(Blocks)])[0]
    same = merge_modules([model, deepcopy(model)], [kinds(0), kinds(1)])
    with torch.no_grad():
        ours, theirs = (m.eval()(kinds(0).kinds, kinds(0).batch) for m in (same.module, model))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
    models = warmed(moved(model))
    result = merge_modules(models, [kinds(0), kinds(1)], ridge=1e-5)
    assert max(errors(result, "merged")) < 0.8 * max(errors(result, "mean"))
    assert result.recalibrated == ("norm",)
    assert result.unreached == ()
    assert set(result.averaged) == {"graph_norm.mean_scale"}
    merged = result.module
    with torch.no_grad():
        entering = [merged.table(kinds(k).kinds) for k in (0, 1)]
    mean = torch.stack([x.mean(0) for x in entering]).mean(0)
    square = torch.stack([x.square().mean(0) for x in entering]).mean(0)
    torch.testing.assert_close(merged.norm.running_mean, mean)
    torch.testing.assert_close(merged.norm.running_var, square - mean.square())
    assert [layer.name for layer in result.layers][:3] == ["table", "norm", "attention.query"]


def test_a_convolution_is_the_least_squares_solution_of_the_rows_that_count():
    """NumPy solves the stacked rows of a first GCN layer, whose inputs depend on no weights."""
    models = moved(built(CONVOLUTIONS["gcn"]), size=0.5)
    data = [graph(0), graph(1)]
    masks = [torch.arange(NODES) % 3 == 0, torch.arange(NODES) % 2 == 0]
    result = merge_modules(models, data, rows=masks, ridge=1e-13, channels="joint")
    rows, targets = [], []
    for model, item, mask in zip(models, data, masks, strict=True):
        adjacency = torch.zeros(NODES, NODES, dtype=torch.float64)
        index, weight = geometric.conv.gcn_conv.gcn_norm(
            item.edge_index, num_nodes=NODES, dtype=torch.float64
        )
        adjacency.index_put_((index[1], index[0]), weight, accumulate=True)
        x = torch.cat([adjacency @ item.x, torch.ones(NODES, 1, dtype=torch.float64)], 1)[mask]
        theta = torch.cat([model.first.lin.weight.T, model.first.bias[None]]).detach()
        y = x @ theta
        scale = float((y.square().mean() * len(x)) ** -0.5)
        rows.append(scale * x.numpy())
        targets.append(scale * y.numpy())
    expected = np.linalg.lstsq(np.concatenate(rows), np.concatenate(targets), rcond=None)[0]
    merged = result.module.first
    found = torch.cat([merged.lin.weight.T, merged.bias[None]]).detach().numpy()
    np.testing.assert_allclose(found, expected, atol=1e-8)
    assert result.layers[0].rows == 20 + 30


@pytest.mark.parametrize("kind", ["sage", "gat", "transformer", "gin"])
def test_divided_channels(kind):
    """Unrelated models: each has its own channels, the first layer's are exactly its own; copies are still copies."""
    models = [deepcopy(built(CONVOLUTIONS[kind])) for _ in range(2)]
    torch.manual_seed(1)
    other = CONVOLUTIONS[kind]().double()
    models[1].load_state_dict(other.state_dict())
    data = [graph(0), graph(1)]
    results = {how: merge_modules(models, data, channels=how) for how in ("joint", "divided", "auto")}
    best = min(("joint", "divided"), key=lambda how: results[how].relative_disagreement)
    assert results["auto"].channels == best
    assert results["auto"].relative_disagreement == results[best].relative_disagreement
    with torch.no_grad():
        args = (data[0].x, data[0].edge_index, data[0].edge_attr)[: 3 if models[0].extra else 2]
        ours = results["divided"].module.first(*args)
        for k, half in enumerate((slice(0, HIDDEN // 2), slice(HIDDEN // 2, HIDDEN))):
            if kind != "gin":  # whose first layer has a hidden one
                torch.testing.assert_close(
                    ours[:, half], models[k].eval().first(*args)[:, half], atol=1e-2, rtol=0.1
                )
    same = merge_modules([models[0], models[0]], data, channels="divided")
    assert max(errors(same, "merged")) < 1e-10


def test_heads_are_refitted_kept_or_named():
    base = built(lambda: Net(geometric.SAGEConv))
    models = moved(base, 3)
    for k, model in enumerate(models):
        model.head = built(lambda k=k: nn.Linear(HIDDEN, 2 + k))
    data = [graph(k) for k in range(3)]
    refitted, kept = (merge_modules(models, data, heads=how) for how in ("refit", "kept"))
    assert refitted.heads == kept.heads == ("head",)
    assert "head of model 2" in [layer.name for layer in refitted.layers]
    for k, model in enumerate(models):
        assert torch.equal(kept.head(k)["head"].weight, model.head.weight)
        assert errors(refitted, "merged")[k] < errors(kept, "merged")[k]
        assert outputs(refitted.for_model(k), data[k]).shape[1] == 2 + k
    together = refitted.all_classes(calibrated=False)
    separate = torch.cat([outputs(refitted.for_model(k), data[0]) for k in range(3)], dim=1)
    torch.testing.assert_close(outputs(together, data[0]), separate)
    assert isinstance(together.head, nn.Linear)
    assert set(refitted.seconds) == {"total", "layers"}
    named = merge_modules(models, data, heads={"head": "kept", "second": "refit"})
    assert named.heads == ("head", "second")
    assert outputs(named.all_classes(), data[0]).shape == (NODES, 9)
    shared = merge_modules(moved(base), data[:2], heads=())
    assert shared.heads == ()
    with pytest.raises(ArgumentError, match="no heads"):
        shared.all_classes()


class Told(nn.Module):
    """Two classes of a body that is the same for all models."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.body, self.head = nn.Linear(2, 2), nn.Linear(2, 2)
        with torch.no_grad():
            self.body.weight.copy_(torch.eye(2))
            self.body.bias.zero_()
            self.head.weight.copy_(weight)
            self.head.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


@pytest.mark.parametrize("known", [True, False])
def test_whose_classes_they_are_is_found_from_where_they_lie(known):
    """The second model is surer of everything; its heads side by side would take all rows."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.arange(4).repeat(100)
    places = torch.tensor([[0.0, 5.0], [0.0, -5.0], [5.0, 0.0], [-5.0, 0.0]])
    x = (places[truth] + torch.randn(400, 2, generator=generator)).double()
    models = [Told(torch.tensor(rows)).double() for rows in ([[0.0, 1], [0, -1]], [[1.5, 0.9], [-1.5, -0.9]])]
    result = merge_modules(models, [x[truth < 2], x[truth > 1]] if known else x)
    plain, found = (result.all_classes(calibrated=how)(x) for how in (False, True))
    torch.testing.assert_close(found.exp().sum(1), torch.ones(400).double(), atol=1e-6, rtol=0)
    right, before = ((x.argmax(1) == truth).double().mean() for x in (found, plain))
    assert before < 0.9
    assert right > 0.97
    for k in (0, 1):  # what a model says of its own classes stays
        own = found[:, 2 * k : 2 * k + 2].log_softmax(1)
        torch.testing.assert_close(own, result.for_model(k)(x).log_softmax(1))


def test_neither_constants_in_the_logits_nor_long_tails_hide_whose_classes_they_are():
    generator = torch.Generator().manual_seed(0)
    truth = torch.arange(4).repeat(100)
    places = torch.tensor([[0.0, 5.0], [0.0, -5.0], [5.0, 0.0], [-5.0, 0.0]])
    sizes = torch.randn(400, 1, generator=generator).exp()  # as nodes have neighbors: few have many
    x = (sizes * (places[truth] + torch.randn(400, 2, generator=generator))).double()
    models = [Told(torch.tensor(rows)).double() for rows in ([[0.0, 1], [0, -1]], [[1.0, 0], [-1.0, 0]])]
    with torch.no_grad():
        models[1].head.bias.fill_(30.0)
    found = merge_modules(models, x).all_classes()(x)
    assert (found.argmax(1) == truth).double().mean() > 0.95


def test_rows_that_differ_in_round_off_are_the_same_rows():
    """Sums on a GPU are not added up in the same order every time."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 3, generator=generator)
    seen = [HeadRows("head") for _ in range(2)]
    for k, rows in enumerate(seen):
        rows.features = x * (1 + k * 1e-7 * torch.randn(x.shape, generator=generator))
        rows.logits = torch.cat([x[:, :1], -x[:, :1]], 1) if k == 0 else torch.cat([x[:, 1:2], -x[:, 1:2]], 1)
    rough = class_regions(seen)
    assert not torch.equal(seen[0].features, seen[1].features)
    seen[1].features = x.clone()
    exact = class_regions(seen)
    torch.testing.assert_close(rough.weight, exact.weight, rtol=1e-3, atol=1e-3)
    seen[1].features = x.flip(0)
    assert not torch.allclose(class_regions(seen).weight, exact.weight, rtol=1e-2, atol=1e-2)


def test_weights_count_in_means_and_solves():
    class Scaled(Told):
        def __init__(self, weight: Tensor):
            super().__init__(weight)
            self.scale, self.norm = nn.Parameter(weight[0, :1].clone()), nn.BatchNorm1d(2)
            nn.init.constant_(self.norm.weight, float(weight[0, 0]))

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.norm(self.body(x))) * self.scale)

    models = [Scaled(torch.eye(2) * size).double() for size in (1.0, 2.0)]
    x = torch.randn(50, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    first = merge_modules(models, x, heads=(), weights=[1e6, 1.0])
    assert "scale" in first.averaged
    torch.testing.assert_close(first.module.scale, models[0].scale, rtol=1e-4, atol=0)
    assert errors(first, "merged")[0] < 1e-2 < errors(first, "merged")[1]
    third = merge_modules(models, x, heads=(), weights=[2, 1])
    torch.testing.assert_close(third.module.scale, torch.full_like(models[0].scale, 4 / 3))


def test_rows_are_labelled_or_confident_nodes():
    models = moved(built(CONVOLUTIONS["sage"]), size=1.0)
    data = graph(0)
    labels = [torch.where(torch.rand(NODES) < 0.5, 1, -1) for _ in models]
    labelled = [Data(**data.to_dict(), y=y) for y in labels]
    by_label = merge_modules(models, labelled, rows="labelled")
    by_mask = merge_modules(models, [data, data], rows=[y >= 0 for y in labels])
    by_function = merge_modules(models, data, rows=lambda k, item: labels[k] >= 0)
    evidence = torch.stack([outputs(model, data).logsumexp(1) for model in models]).argmax(0)
    confident = merge_modules(models, data, rows="confidence")
    by_owner = merge_modules(models, data, rows=[evidence == k for k in (0, 1)])
    for one, other in ((by_label, by_mask), (by_label, by_function), (confident, by_owner)):
        for a, b in zip(one.module.parameters(), other.module.parameters(), strict=True):
            assert torch.equal(a, b)
    assert not torch.equal(by_label.module.first.lin_l.weight, confident.module.first.lin_l.weight)


def test_models_and_their_modes_stay_as_they_are():
    models = [model.train() for model in moved(built(CONVOLUTIONS["gat"]))]
    models[0].second.eval()
    modes = [[part.training for part in model.modules()] for model in models]
    before = [deepcopy(model.state_dict()) for model in models]
    heard: list[float] = []
    merge_modules(models, graph(0), progress=lambda fraction, text: heard.append(fraction))
    assert modes == [[part.training for part in model.modules()] for model in models]
    for model, state in zip(models, before, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        assert all("forward" not in vars(part) for part in model.modules())
    assert heard == sorted(heard)
    assert heard[-1] == 1.0


class Hidden(nn.Module):
    """Uses one layer behind the back of every hook, and another not at all."""

    def __init__(self):
        super().__init__()
        self.first, self.behind, self.idle = nn.Linear(IN, HIDDEN), nn.Linear(HIDDEN, HIDDEN), nn.Linear(2, 2)
        self.power = nn.Parameter(torch.ones(HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.first(x)) @ self.behind.weight.T * self.power


def test_what_nothing_reaches_is_named():
    result = merge_modules(moved(built(Hidden)), graph(0))
    assert result.unreached == ("behind", "idle")
    assert result.averaged == ("power", "behind.weight", "behind.bias", "idle.weight", "idle.bias")
    text = result.summary()
    assert "power" in text
    assert "never called" in text
    batches = merge_modules(moved(built(Hidden)), [[graph(0).x, graph(1).x]] * 2)
    assert batches.layers[0].rows == 4 * NODES


def test_bad_input_is_refused():
    models = moved(built(CONVOLUTIONS["gcn"]))
    data = graph(0)
    with pytest.raises(IncompatibleSpecialistsError, match="at least two"):
        merge_modules(models[:1], data)
    with pytest.raises(IncompatibleSpecialistsError, match="not a torch network"):
        merge_modules([models[0], "model"], data)
    with pytest.raises(FramesError, match="examples for 3"):
        merge_modules(models, [data, data, data])
    with pytest.raises(FramesError, match="no examples"):
        merge_modules(models, [data, []])
    with pytest.raises(FramesError, match="takes 'edge_index'"):
        merge_modules(models, Data(x=data.x))
    with pytest.raises(FramesError, match="rows='owned'"):
        merge_modules(models, data, rows="owned")
    with pytest.raises(FramesError, match="mask of 3 rows"):
        merge_modules(models, data, rows=torch.ones(3, dtype=torch.bool))
    with pytest.raises(ArgumentError, match="'refit' or 'kept'"):
        merge_modules(models, data, heads="new")
    with pytest.raises(ArgumentError, match="no submodule"):
        merge_modules(models, data, heads=["top"])
    with pytest.raises(ArgumentError, match="'joint' and 'divided'"):
        merge_modules(models, data, channels="split")
    with pytest.raises(ArgumentError, match="3 weights"):
        merge_modules(models, data, weights=[1, 1, 1])
    for weights in ([1, 0], [1, -1], [1, float("nan")], ["1", 1]):
        with pytest.raises(ArgumentError, match="must be positive numbers"):
            merge_modules(models, data, weights=weights)
    for ridge in (-1.0, float("nan"), "small"):
        with pytest.raises(ArgumentError, match="no relative ridge"):
            merge_modules(models, data, ridge=ridge)
    with pytest.raises(FramesError, match="model 1 returns NaN"):
        merge_modules(models, [data, Data(**data.to_dict() | {"x": data.x * torch.nan})])
    nobody = torch.zeros(NODES, dtype=torch.bool)
    with pytest.raises(FramesError, match="not a single row of model 1"):
        merge_modules(models, data, rows=[~nobody, nobody])
    other = built(lambda: Net(lambda a, b: geometric.GCNConv(a, b, bias=False)))
    other.first = geometric.GCNConv(IN, 9).double()
    with pytest.raises(IncompatibleSpecialistsError, match="first difference: first"):
        merge_modules([models[0], other], data, heads=["head"])
    with pytest.raises(IncompatibleSpecialistsError, match="call no layer"):
        merge_modules([nn.Identity(), nn.Identity()], data.x)


READY_MADE: dict[str, Callable[[int], nn.Module]] = {
    "GCN": lambda c: geometric.GCN(IN, 8, 2, c, norm="BatchNorm"),
    "GraphSAGE": lambda c: geometric.GraphSAGE(IN, 8, 2, c, jk="cat", norm="GraphNorm"),
    "GAT": lambda c: geometric.GAT(IN, 8, 2, c, v2=True, heads=2),
    "PNA": lambda c: geometric.PNA(
        IN, 8, 2, c, aggregators=["mean", "max"], scalers=["identity", "amplification"], deg=torch.arange(9)
    ),
}
OWN = {"GCN": "convs.1", "GraphSAGE": "lin", "GAT": "convs.1"}


@pytest.mark.parametrize("kind", READY_MADE)
def test_models_of_torch_geometric_with_outputs_of_different_width(kind):
    """Their last layer is the head, whatever it is; the batch's seeds are no argument of theirs."""
    data = [Data(x=graph(k).x, edge_index=graph(k).edge_index, batch_size=NODES - k) for k in (0, 1)]
    torch.manual_seed(0)
    models = [READY_MADE[kind](c).double() for c in (2, 3)]
    result = merge_modules(models, data)
    if kind in OWN:
        assert result.heads == (OWN[kind],)
    assert all(a < 0.75 * b for a, b in zip(errors(result, "merged"), errors(result, "mean"), strict=True))
    with torch.no_grad():
        together = result.all_classes()(data[0].x, data[0].edge_index)
    assert together.shape == (NODES, 5)


class Typed(nn.Module):
    """Two kinds of nodes."""

    def __init__(self):
        super().__init__()
        self.conv = geometric.HeteroConv(
            {
                ("a", "to", "b"): geometric.SAGEConv((IN, IN), HIDDEN),
                ("b", "to", "a"): geometric.GATConv((IN, IN), HIDDEN, add_self_loops=False),
            }
        )
        self.out = nn.Linear(HIDDEN, 2)

    def forward(self, x_dict, edge_index_dict):
        return {kind: self.out(x) for kind, x in self.conv(x_dict, edge_index_dict).items()}


def typed(seed: int) -> HeteroData:
    data, one, other = HeteroData(), graph(seed), graph(seed + 1)
    data["a"].x, data["b"].x = one.x + seed, other.x[:40] - seed
    data["a", "to", "b"].edge_index = torch.stack([one.edge_index[0], one.edge_index[1] % 40])
    data["b", "to", "a"].edge_index = torch.stack([other.edge_index[0] % 40, other.edge_index[1]])
    return data


def test_graphs_with_several_kinds_of_nodes():
    result = merge_modules(moved(built(Typed)), [typed(0), typed(2)])
    assert max(errors(result, "merged")) < 0.8 * max(errors(result, "mean"))
    names = [layer.name for layer in result.layers]
    assert names.count("out") == 1
    assert {"conv.convs.<a___to___b>", "conv.convs.<b___to___a>.att_src[0]"} <= set(names)
    assert result.averaged == ()


class Molecules(nn.Module):
    """One number per graph."""

    def __init__(self):
        super().__init__()
        self.conv = geometric.GINConv(mlp(IN, 16, 16))
        self.out = nn.Linear(16, 1)

    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor) -> Tensor:
        return self.out(torch.tanh(geometric.global_add_pool(torch.tanh(self.conv(x, edge_index)), batch)))


def shifted(seed: int) -> Data:
    """A graph whose features are of another kind for seeds from 9 on."""
    data = graph(seed)
    data.x = (
        data.x * torch.tensor([1.0, 1.0, 1.0, 0.1, 0.1] if seed < 9 else [0.1, 0.1, 0.1, 1.0, 1.0]).double()
    )
    return data


def test_a_number_per_graph():
    models = moved(built(Molecules), size=0.3)
    result = merge_modules(models, [[shifted(k) for k in range(9)], [shifted(k + 9) for k in range(9)]])
    assert max(errors(result, "merged")) < 0.8 * max(errors(result, "mean"))
    assert [row.agreement for row in result.disagreements] == 4 * [None]
    assert result.layers[-1].rows == 2 * 9 * 3
