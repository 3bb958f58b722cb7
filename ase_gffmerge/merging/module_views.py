"""One module for every model that shares with the others whatever is merged, and has of its own what each model keeps."""

from collections.abc import Mapping, Sequence
from copy import deepcopy

import torch
from torch import Tensor, nn

from ase_gffmerge.errors import ArgumentError, IncompatibleSpecialistsError
from ase_gffmerge.merging.module_calls import solvable_layers
from ase_gffmerge.merging.module_layers import is_within

REFIT, KEPT = "refit", "kept"


def check_modules(models: Sequence[nn.Module]) -> None:
    """Refuse what cannot be merged.

    Raises
    ------
    IncompatibleSpecialistsError
        For fewer than two models, or for what is no module.
    """
    for model in models:
        if not isinstance(model, nn.Module):
            raise IncompatibleSpecialistsError(
                f"a {type(model).__name__} is not a torch network; give the modules themselves (of a calculator, with "
                "module=lambda calc: calc.model)"
            )
    if len(models) < 2:
        raise IncompatibleSpecialistsError(
            f"a merge needs at least two models, got {len(models)}; use a single one as it is"
        )


def own_modules(
    models: Sequence[nn.Module], heads: str | Sequence[str] | Mapping[str, str]
) -> dict[str, str]:
    """Names of the submodules that every model keeps, each with ``"refit"`` or ``"kept"``.

    Raises
    ------
    ArgumentError
        For another word, or a name that a model does not have.
    IncompatibleSpecialistsError
        When other parameters differ in shape.
    """
    differing = _differing(models)
    if isinstance(heads, str):
        names = (
            differing
            or [
                name
                for name, module in models[0].named_modules()
                if name.split(".")[-1] == "head" and isinstance(module, nn.Linear)
            ][-1:]
        )
        found = dict.fromkeys(names, heads)
    else:
        found = dict(heads) if isinstance(heads, Mapping) else dict.fromkeys(heads, REFIT)
    known = [dict(model.named_modules()) for model in models]
    for name, how in found.items():
        if how not in (REFIT, KEPT):
            raise ArgumentError(
                f"heads={how!r}: heads are 'refit' or 'kept'; to name them, give a list of names"
            )
        if not name or any(name not in own for own in known):
            raise ArgumentError(f"heads names {name!r}, which is no submodule of every model")
    rest = [name for name in differing if not any(is_within(name, own) for own in found)]
    if rest:
        raise IncompatibleSpecialistsError(
            f"the models hold different networks (first difference: {rest[0]}); give models of one architecture, or name in "
            "heads= what every module may keep"
        )
    return found


def _differing(models: Sequence[nn.Module]) -> list[str]:
    """The smallest submodules, all of which every model has, outside of which all parameters have the same shape."""
    shapes = [{name: p.shape for name, p in model.named_parameters()} for model in models]
    names = sorted({name for own in shapes for name in own if any(o.get(name) != own[name] for o in shapes)})
    layers = [set(solvable_layers(model)) for model in models]
    known = [dict(model.named_modules()) for model in models]
    found: list[str] = []
    for name in names:
        path = name.rpartition(".")[0]
        while path and not all(path in own for own in known):
            path = path.rpartition(".")[0]
        ancestors = [
            a for a in layers[0] if a and is_within(path, a)
        ]  # a convolution that holds a linear layer
        path = min([path, *ancestors], key=len)
        if not path:
            raise IncompatibleSpecialistsError(
                f"the models hold different parameters (first difference: {name}), which no submodule of its own holds; "
                "give models of one architecture"
            )
        found.append(path)
    return [name for name in dict.fromkeys(found) if not any(is_within(name, o) for o in found if o != name)]


@torch.no_grad()
def shared_views(models: Sequence[nn.Module], own: tuple[str, ...]) -> list[nn.Module]:
    """Copies of the models that share one tensor, the mean, for every parameter and buffer that is not their own."""
    views = [deepcopy(model) for model in models]
    alike = average_into(views[0], models, own=own)
    tensors = _state(views[0])
    for view in views[1:]:
        state = _state(view)
        shared = {id(state[name]): tensors[name] for name in alike}
        for module in view.modules():
            for held in (module._parameters, module._buffers):
                held.update({key: shared[id(x)] for key, x in held.items() if id(x) in shared})  # type: ignore[misc]
    return views


@torch.no_grad()
def average_into(target: nn.Module, models: Sequence[nn.Module], *, own: tuple[str, ...] = ()) -> list[str]:
    """Set parameters and buffers of real numbers to their mean over the models; returns their names.

    Parameters
    ----------
    target
        A module of the models' kind.
    models
        The models.
    own
        Submodules that are left as they are.
    """
    states = [_state(model) for model in models]
    averaged = []
    for name, tensor in _state(target).items():
        if not tensor.is_floating_point() or any(is_within(name, head) for head in own):
            continue
        found = [state[name] for state in states if name in state and state[name].shape == tensor.shape]
        if len(found) == len(models):
            tensor.copy_(torch.stack([x.detach().double().cpu() for x in found]).mean(0))
            averaged.append(name)
    return averaged


def _state(module: nn.Module) -> dict[str, Tensor]:
    return dict(module.named_parameters()) | dict(module.named_buffers())
