"""Methods for modules of any kind: what each promises, and the published ones against NumPy."""

from copy import deepcopy

import numpy as np
import pytest
import torch
from torch import nn
from torch_geometric.data import Data

from ase_gffmerge.errors import IncompatibleSpecialistsError, RecipeError
from ase_gffmerge.merging.module_views import shared_views
from ase_gffmerge.methods import METHODS, Requirement
from ase_gffmerge.methods.modules import MODULE_METHODS, ModuleInputs
from ase_gffmerge.methods.modules_layerwise import chain_of, permuted_module
from helpers.graph_networks import CONVOLUTIONS, HIDDEN, NODES, built, graph, moved, outputs

PULLED_TO_ZERO = {"gnnmerge++": 1e-4}
"""Methods with an absolute ridge towards zero, and what that costs."""
NAMES = [name for name, method in MODULE_METHODS.items() if not method.trains]
DATA = [graph(0), graph(1)]


@pytest.mark.parametrize("name", NAMES)
def test_copies_give_the_model_back_and_models_stay_as_they_are(name):
    model = built(CONVOLUTIONS["gin"])
    inputs = ModuleInputs(models=[model, deepcopy(model)], examples=DATA, base=model)
    before = deepcopy(model.state_dict())
    views = MODULE_METHODS[name].run(inputs)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    for view, data in zip(views, DATA, strict=True):
        expected = outputs(model, data)
        torch.testing.assert_close(
            outputs(view, data), expected, rtol=0, atol=PULLED_TO_ZERO.get(name, 1e-10)
        )


def test_every_method_has_a_source_and_those_for_potentials_are_here_too():
    assert all(method.citation for method in MODULE_METHODS.values())
    known = set(METHODS) & set(MODULE_METHODS)
    assert known >= {
        "mean",
        "task_arithmetic",
        "ties",
        "regmean",
        "procrustes",
        "git_rebasin",
        "gffmerge",
        "joint",
    }
    assert all(METHODS[name].citation == MODULE_METHODS[name].citation for name in known - {"joint"})


def test_git_rebasin_undoes_a_permutation():
    model = built(CONVOLUTIONS["gin"])
    inputs = ModuleInputs(models=[model, model], examples=DATA)
    chain = chain_of(inputs.problem(shared_views(inputs.models, inputs.own)))
    orders = {group: torch.randperm(n) for group, n in chain.sizes.items()}
    assert len(orders) == 4
    other = permuted_module(model, chain, orders)
    torch.testing.assert_close(outputs(other, DATA[0]), outputs(model, DATA[0]))
    assert not torch.equal(other.first.nn[0].weight, model.first.nn[0].weight)
    views = MODULE_METHODS["git_rebasin"].run(ModuleInputs(models=[model, other], examples=DATA, heads=()))
    torch.testing.assert_close(outputs(views[1], DATA[1]), outputs(model, DATA[1]))
    with pytest.raises(IncompatibleSpecialistsError, match="leave git_rebasin out"):
        MODULE_METHODS["git_rebasin"].run(
            ModuleInputs(models=moved(built(CONVOLUTIONS["gat"])), examples=DATA)
        )


def test_gnnmerge_plus_plus_is_the_normal_equations_on_the_models_own_inputs():
    models = moved(built(CONVOLUTIONS["gcn"]))
    masks = [torch.arange(NODES) < 30, torch.arange(NODES) < 45]
    views = MODULE_METHODS["gnnmerge++"].run(ModuleInputs(models=models, examples=DATA, rows=masks))
    rows, targets = [], []
    for model, data, mask in zip(models, DATA, masks, strict=True):
        with torch.no_grad():
            x = torch.relu(model.first(data.x, data.edge_index))[mask]
            y = x @ model.second.lin.weight.T
        rows.append(x.numpy() / len(x) ** 0.5)
        targets.append(y.numpy() / len(x) ** 0.5)
    rows.append(1e-3 * np.eye(HIDDEN))
    targets.append(np.zeros((HIDDEN, HIDDEN)))
    expected = np.linalg.lstsq(np.concatenate(rows), np.concatenate(targets), rcond=None)[0]
    np.testing.assert_allclose(views[0].second.lin.weight.detach().numpy().T, expected, atol=1e-9)
    mean = torch.stack([model.second.bias for model in models]).mean(0)
    torch.testing.assert_close(views[0].second.bias, mean)
    assert torch.equal(views[1].head.weight, models[1].head.weight)


def test_adam_on_embeddings_lowers_what_it_minimizes(monkeypatch):
    monkeypatch.setattr("ase_gffmerge.methods.modules_layerwise.STEPS", 100)
    models = moved(built(CONVOLUTIONS["sage"]), size=0.5)
    inputs = ModuleInputs(models=models, examples=DATA)
    mean, fitted = (MODULE_METHODS[name].run(inputs)[0].first for name in ("mean", "gnnmerge"))

    def loss(layer: nn.Module) -> float:
        with torch.no_grad():
            pairs = [(layer(d.x, d.edge_index), m.first(d.x, d.edge_index)) for m, d in zip(models, DATA)]
        return sum(float((a - b).square().mean()) for a, b in pairs)

    assert loss(fitted) < 0.9 * loss(mean)


def test_methods_with_a_base_ask_for_it_and_choose_by_disagreement():
    base = built(CONVOLUTIONS["graph"])
    models = moved(base, size=0.2)
    inputs = ModuleInputs(models=models, examples=DATA, base=base)
    for name in ("task_arithmetic", "ties"):
        assert MODULE_METHODS[name].needs == {Requirement.BASE}
        with pytest.raises(RecipeError, match="fine-tuned from"):
            MODULE_METHODS[name].run(ModuleInputs(models=models, examples=DATA))
        chosen = MODULE_METHODS[name].run(inputs)
        assert inputs.disagreement(chosen) < inputs.disagreement([base, base])
    chosen = MODULE_METHODS["task_arithmetic"].run(inputs)
    assert inputs.disagreement(chosen) <= inputs.disagreement(inputs.mean()) + 1e-12
    with pytest.raises(IncompatibleSpecialistsError, match="other parameters"):
        MODULE_METHODS["ties"].run(ModuleInputs(models=models, examples=DATA, base=nn.Linear(2, 2)))


def test_the_order_of_the_methods_on_independent_models():
    """Heads in closed form are what helps most; solving the layers before them helps on top."""
    torch.manual_seed(0)
    models = [CONVOLUTIONS["sage"]().double() for _ in range(2)]
    inputs = ModuleInputs(models=models, examples=DATA)
    found = {
        name: inputs.disagreement(MODULE_METHODS[name].run(inputs))
        for name in ("mean", "mean+heads", "sequential", "gffmerge")
    }
    assert found["gffmerge"] < found["mean+heads"] < found["mean"]
    assert found["gffmerge"] <= found["sequential"] < found["mean"]


def test_joint_training_learns_the_labels():
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(NODES) % 3
    x = torch.nn.functional.one_hot(y, 5) + 0.3 * torch.randn(NODES, 5, generator=generator)
    data = Data(**(graph(0).to_dict() | {"x": x.double(), "y": y, "train_mask": torch.arange(NODES) < 40}))
    models = moved(built(CONVOLUTIONS["sage"]))
    views = MODULE_METHODS["joint"].run(ModuleInputs(models=models, examples=data))
    correct = outputs(views[0], data).argmax(1) == y
    assert correct[40:].double().mean() > 0.8
