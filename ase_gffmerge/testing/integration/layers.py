"""Checks of the layers that a merge solves, and of merges of a model with itself and with relatives."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import import_module

import torch
from ase import Atoms
from torch import Tensor, nn

from ase_gffmerge.forcefield.force_field import ForceField
from ase_gffmerge.graphs import batch_graphs, build_graph
from ase_gffmerge.graphs.graph import edge_vectors
from ase_gffmerge.models import Potential
from ase_gffmerge.models.affine_maps import AffineMap, affine_maps, rows_entering
from ase_gffmerge.testing.calculator.harness import check, require
from ase_gffmerge.testing.integration.subject import IntegrationSubject

_ABOVE = "ase_gffmerge.workflows.merge"
"""What merges; a name and no import, as it stands above this room."""

QUICK = {
    "preset": "closed-form",
    "readout": None,
    "messages": False,
    "directions": 0,
    "core_repulsion": "none",
    "allow_identical": True,
}
"""Every layer solved, and nothing that a format may not hold."""


@check(9)
def layers_are_found(subject: IntegrationSubject) -> str:
    """Most weights are in layers that a merge solves."""
    potential = subject.potential
    solved = {id(x) for one in affine_maps(potential).values() for x in one.module.parameters(recurse=False)}
    sizes = {name: value.numel() for name, value in potential.named_parameters() if name != "embedding"}
    rest = [name for name, value in potential.named_parameters() if id(value) not in solved and name in sizes]
    share = 1 - sum(sizes[name] for name in rest) / max(sum(sizes.values()), 1)
    require(
        share > 0.5,
        f"only {share:.0%} of the weights are in layers that are known; left out: {', '.join(rest[:4])}",
    )
    return f"{share:.0%} of the weights; averaged: {', '.join(['embedding', *rest[:8]])}{' ...' if len(rest) > 8 else ''}"


@check(10)
def layers_are_what_their_maps_say(subject: IntegrationSubject) -> str:
    """Every layer is read and written exactly, and a change of its coefficients changes its output by rows times change."""
    potential = double(subject.potential)
    entering = _entering(potential, subject.structures)
    compared = 0
    for name, one in affine_maps(potential).items():
        before = {key: value.detach().clone() for key, value in one.module.named_parameters(recurse=False)}
        theta = one.read().clone()
        one.write(theta)
        for key, value in one.module.named_parameters(recurse=False):
            gap = float((value - before[key]).abs().max())
            require(
                gap <= 1e-12 * (1 + float(value.abs().max())),
                f"writing {name} back changes its {key} by {gap:.2g}",
            )
        if (layer := _layer_name(potential, one)) in entering:
            compared += _responds(one, theta, entering[layer], name)
        with torch.no_grad():
            for key, value in one.module.named_parameters(recurse=False):
                value.copy_(before[key])
    require(compared > 0, "no layer of any map is called")
    return f"{compared} of {len(affine_maps(potential))}; the others are activated within the layer, or not called"


def _layer_name(potential: Potential, one: AffineMap) -> str:
    return next(name for name, module in potential.named_modules() if module is one.module)


def _entering(potential: Potential, structures: Sequence[Atoms]) -> dict[str, tuple[object, ...]]:
    """Arguments of the first call of every layer with maps."""
    found: dict[str, tuple[object, ...]] = {}
    layers = {_layer_name(potential, one): one.module for one in affine_maps(potential).values()}

    def hook(name: str) -> Callable[[nn.Module, tuple[object, ...]], None]:
        def remember(module: nn.Module, inputs: tuple[object, ...]) -> None:
            found.setdefault(name, inputs)

        return remember

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    graph = batch_graphs([build_graph(atoms, potential.hyper.cutoff) for atoms in structures])
    with torch.no_grad():
        potential(edge_vectors(graph), graph)
    for handle in handles:
        handle.remove()
    return found


@torch.no_grad()
def _responds(one: AffineMap, theta: Tensor, inputs: tuple[object, ...], name: str) -> int:
    """Whether the layer is linear up to its output, where its response to a change is compared with the rows'."""
    generator = torch.Generator().manual_seed(0)
    change = torch.randn(theta.shape, generator=generator, dtype=torch.float64)
    outputs = []
    for step in (0.0, 1.0, 2.0):
        one.write(theta + step * change)
        outputs.append(one.module(*inputs))
    one.write(theta)
    if not all(isinstance(output, Tensor) for output in outputs):
        return 0
    first, second = (output - outputs[0] for output in outputs[1:])
    if float((second - 2 * first).norm()) > 1e-9 * float(second.norm()):
        return 0
    expected = float((one.design(rows_entering(one.module, inputs)) @ change).norm())
    require(
        abs(float(first.norm()) - expected) <= 1e-9 * (1 + expected),
        f"a change of {name} changes its output by {float(first.norm()):.4g}, the map says {expected:.4g}",
    )
    return 1


def double(potential: Potential) -> Potential:
    """A copy in double precision, with its own weights."""
    with torch.random.fork_rng(devices=[]):
        copy = type(potential)(potential.hyper, potential.species)
    copy.double().load_state_dict(potential.state_dict())
    return copy.eval().requires_grad_(False)


@check(11)
def identical_specialists_merge_into_themselves(subject: IntegrationSubject) -> str:
    """The merge of two copies has their results."""
    original = ForceField(name="copy", potential=double(subject.potential), calibration=subject.structures)
    merged = _merged([original, replace(original, name="other")])
    return subject.compare(merged, original.potential, "the copies that were merged", 1e-8)


@check(12)
def relatives_merge_into_what_can_be_written(subject: IntegrationSubject) -> str:
    """The merge of two models that were moved away from this one is read as it was written."""
    pair = []
    for seed in (1, 2):
        moved, generator = double(subject.potential), torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for value in moved.parameters():
                noise = torch.randn(value.shape, generator=generator, dtype=value.dtype)
                value.add_(0.01 * value.abs().mean() * noise)
        pair.append(ForceField(name=f"relative {seed}", potential=moved, calibration=subject.structures))
    merged = _merged(pair)
    return subject.compare(subject.again(merged).double(), merged, "the merge", 1e-5)


def _merged(specialists: Sequence[ForceField]) -> Potential:
    """Their merge by :data:`QUICK`."""
    merge = import_module(_ABOVE).merge
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged, _ = merge(specialists, QUICK, device="cpu")
    found: Potential = merged.potential
    return found
