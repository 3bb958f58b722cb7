"""One module for every model that shares with the others whatever is merged, and has of its own what each model keeps.

And the module that needs no task, as it knows where the classes of all models lie in what enters the heads.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy

import torch
from torch import Tensor, nn

from ase_gffmerge.errors import ArgumentError, IncompatibleSpecialistsError
from ase_gffmerge.merging.module_calls import has_mean, solvable_layers
from ase_gffmerge.models.torch_layers import intercepted, is_within

REFIT, KEPT = "refit", "kept"


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
    if found and all(any(is_within(name, own) for own in found) for name, _ in models[0].named_parameters()):
        raise IncompatibleSpecialistsError(
            f"outside of what every model keeps ({', '.join(found)}) they have nothing in common that could be merged; "
            "give models of one architecture, or name less in heads="
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
def shared_views(
    models: Sequence[nn.Module], own: tuple[str, ...], *, weights: Sequence[float] | None = None
) -> list[nn.Module]:
    """Copies of the models that share one tensor, the mean, for every parameter and buffer that is not their own.

    Parameters
    ----------
    models, own, weights
        As for :func:`average_into`.
    """
    try:
        views = [deepcopy(model) for model in models]
    except RuntimeError as error:
        raise IncompatibleSpecialistsError(
            f"a model cannot be copied ({error}); take out what it computes weights with, such as "
            "torch.nn.utils.remove_weight_norm(layer), or tensors with gradients that it keeps"
        ) from error
    alike = average_into(views[0], models, own=own, weights=weights)
    tensors = _state(views[0])
    for view in views[1:]:
        state = _state(view)
        shared = {id(state[name]): tensors[name] for name in alike}
        for module in view.modules():
            for held in (module._parameters, module._buffers):
                held.update({key: shared[id(x)] for key, x in held.items() if id(x) in shared})  # type: ignore[misc]
    return views


@torch.no_grad()
def average_into(
    target: nn.Module,
    models: Sequence[nn.Module],
    *,
    own: tuple[str, ...] = (),
    weights: Sequence[float] | None = None,
) -> list[str]:
    """Set parameters and buffers of real or complex numbers to their mean over the models; returns their names.

    Parameters
    ----------
    target
        A module of the models' kind.
    models
        The models.
    own
        Submodules that are left as they are.
    weights
        How much each model counts; default: all the same.
    """
    states = [_state(model) for model in models]
    averaged = []
    for name, tensor in _state(target).items():
        if not has_mean(tensor) or any(is_within(name, head) for head in own):
            continue
        found = [state[name] for state in states if name in state and state[name].shape == tensor.shape]
        if len(found) == len(models):
            exact = torch.promote_types(tensor.dtype, torch.float64)
            tensor.copy_(weighted_mean([x.detach().cpu().to(exact) for x in found], weights))
            averaged.append(name)
    return averaged


def weighted_mean(tensors: Sequence[Tensor], weights: Sequence[float] | None = None) -> Tensor:
    """Mean of tensors of one shape, each of which counts as much as its weight says."""
    stacked = torch.stack(list(tensors))
    if weights is None or len(set(weights)) == 1:
        return stacked.mean(0)
    share = torch.tensor(weights, dtype=stacked.dtype, device=stacked.device)
    return torch.tensordot(share / share.sum(), stacked, dims=1)


def _state(module: nn.Module) -> dict[str, Tensor]:
    return dict(module.named_parameters()) | dict(module.named_buffers())


# One module for all tasks

MAX_ROWS = 20_000
"""Rows of each model, evenly thinned, from which the places of classes are found."""

SHRINKAGE = 0.05
"""Relative ridge of the classes' covariance."""

SAME = 0.01
"""Relative difference of logits that are the same in numbers of half precision."""

SURENESS = 2.0
"""Logarithm of the odds that a row belongs to a model for every standard deviation by which its evidence is larger."""


class SideBySide(nn.Module):
    """Outputs of several modules on the same input, concatenated along the last dimension."""

    def __init__(self, members: Sequence[nn.Module]):
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, *args: object, **kwargs: object) -> Tensor:
        """All outputs (n, sum of the members' widths)."""
        found = [member(*args, **kwargs) for member in self.members]
        if not all(isinstance(own, Tensor) for own in found):
            raise ArgumentError(
                f"these networks return a {type(found[0]).__name__}, and only single tensors can stand side by side; "
                "evaluate for_model(k) for each k, and put together what belongs together"
            )
        return torch.cat(found, dim=-1)


class AllClasses(nn.Module):
    r"""Log-probabilities of the classes c of all models k, :math:`\log p(k|x) + \log p(c|k,x)`.

    The second term is what the head of model k says, the first comes from :func:`class_regions`.
    """

    def __init__(self, body: nn.Module, sizes: Sequence[int]):
        super().__init__()
        self.body, self.sizes = body, list(sizes)

    def forward(self, *args: object, **kwargs: object) -> Tensor:
        """Log-probabilities (n, number of all classes)."""
        heads, regions = self.body(*args, **kwargs).chunk(2, dim=-1)
        found = []
        for logits, own in zip(
            heads.split(self.sizes, dim=-1), regions.log_softmax(-1).split(self.sizes, dim=-1), strict=True
        ):
            found.append(own.logsumexp(-1, keepdim=True) + logits.log_softmax(-1))
        return torch.cat(found, dim=-1)


class HeadsAndRegions(nn.Module):
    """Outputs of a linear layer, and of another one on the signed square roots of the same input, side by side."""

    def __init__(self, heads: nn.Linear, regions: nn.Linear):
        super().__init__()
        self.heads, self.regions = heads, regions

    def forward(self, x: Tensor) -> Tensor:
        """Both outputs (..., sum of their widths) of inputs (..., d)."""
        return torch.cat([self.heads(x), self.regions(_tamed(x))], dim=-1)


def _tamed(x: Tensor) -> Tensor:
    """Signed square roots: nearer to normal than sums over neighbors, which are large where there are many."""
    return x.sign() * x.abs().sqrt()


def with_head(body: nn.Module, name: str, head: nn.Module) -> nn.Module:
    """Put a head into the place of another one.

    Parameters
    ----------
    body, name
        The module, which is changed, and the head's name in it.
    head
        The new one.
    """
    parent, _, leaf = name.rpartition(".")
    setattr(body.get_submodule(parent), leaf, head)
    return body


def wide_head(heads: Sequence[nn.Linear]) -> nn.Linear:
    """One linear layer with the outputs of several side by side."""
    weights = torch.cat([head.weight.detach() for head in heads])
    biases = [torch.zeros_like(h.weight[:, 0]) if h.bias is None else h.bias.detach() for h in heads]
    wide = nn.Linear(weights.shape[1], len(weights)).to(weights)
    with torch.no_grad():
        wide.weight.copy_(weights)
        wide.bias.copy_(torch.cat(biases))
    return wide


class HeadRows:
    """What enters a head of the merged module on one model's examples, and what that model's own head gives there.

    Attributes
    ----------
    features, logits : (n, d), (n, number of classes)
        Of the rows that count.
    """

    def __init__(self, name: str):
        self.name = name
        self.features, self.logits = torch.zeros(0, 0), torch.zeros(0, 0)
        self._stride, self._ours, self._theirs = 1, torch.zeros(0), torch.zeros(0)
        self._last = True

    @property
    def complete(self) -> bool:
        """Whether there are rows of a linear head of several classes, which has the last word but for a log-softmax."""
        return self._last and len(self.features) > 0 and self.logits.shape[1] > 1

    @contextmanager
    def watching(self, view: nn.Module, model: nn.Module) -> Iterator[None]:
        """Take note of what enters the heads of both modules while they evaluate an example."""
        heads = view.get_submodule(self.name), model.get_submodule(self.name)
        if not all(type(head) is nn.Linear for head in heads):
            yield
            return

        def ours(args: tuple[object, ...]) -> None:
            assert isinstance(args[0], Tensor)
            self._ours = args[0].detach()

        def theirs(args: tuple[object, ...]) -> None:
            assert isinstance(args[0], Tensor)
            self._theirs = heads[1](args[0]).detach()

        with intercepted(heads[0], ours), intercepted(heads[1], theirs):
            yield

    def keep(self, mask: Tensor | None, result: object) -> None:
        """Keep the rows of the last example that count; every second one of all, whenever they are too many.

        Parameters
        ----------
        mask
            Of the rows that count.
        result
            What the model returned.
        """
        self._last = self._last and is_log_softmax_of(self._theirs, result)
        pair = [x.reshape(-1, x.shape[-1]) for x in (self._ours, self._theirs) if x.numel()]
        if len(pair) < 2 or len(pair[0]) != len(pair[1]):
            return
        if mask is not None and len(mask) == len(pair[0]):
            pair = [x[mask.to(x.device)] for x in pair]
        held = [self.features, self.logits] if self.complete else [x[:0] for x in pair]
        pair = [torch.cat([old, new[:: self._stride]]) for old, new in zip(held, pair, strict=True)]
        while len(pair[0]) > MAX_ROWS:
            pair, self._stride = [x[::2] for x in pair], 2 * self._stride
        self.features, self.logits = pair
        self._ours = self._theirs = torch.zeros(0)


def is_log_softmax_of(logits: Tensor, result: object) -> bool:
    """Whether a result is a head's output (n, number of classes), but for a constant of every row."""
    if not isinstance(result, Tensor) or result.shape != logits.shape:
        return False
    rest, spread = (x.double() - x.double().mean(-1, keepdim=True) for x in (result - logits, logits))
    return bool(rest.norm() <= SAME * spread.norm())


def complete_rows(seen: Sequence[HeadRows | None]) -> tuple[HeadRows, ...]:
    """Rows of all models; none where one of them has none, as the places of its classes are not known then."""
    found = tuple(rows for rows in seen if rows is not None and rows.complete)
    return found if len(found) == len(seen) else ()


ALIKE = 1e-4
"""Relative difference of rows that are the same: sums on a GPU are not added up in the same order every time."""


def _same_rows(x: Tensor, y: Tensor) -> bool:
    return x.shape == y.shape and bool((x - y).norm() <= ALIKE * y.norm())


def class_regions(models: Sequence[HeadRows]) -> nn.Linear:
    r"""Linear layer whose outputs are log-probabilities, up to a constant, of every class of every model.

    Its inputs are the square roots of the features (:class:`HeadsAndRegions`). Each class is a normal distribution of them,
    with a covariance that all share; as many rows belong to it as its model believes. Where all models have the same rows,
    nobody says whose they are: they are dealt out once by the evidence (logsumexp) of every model's logits, in standard
    deviations from its mean over the rows, as one model may be surer of everything.
    """
    first, sizes = models[0].features, [own.logits.shape[1] for own in models]
    features = [_tamed(own.features.double()) for own in models]
    logits = [own.logits.double() for own in models]
    if all(_same_rows(own.features, first) for own in models):
        evidence = torch.stack([y.logsumexp(1) for y in logits], 1)
        spread = evidence.std(0, correction=0).clamp(min=1e-30)
        owners = (SURENESS * (evidence - evidence.mean(0)) / spread).softmax(1)
        shares = owners.repeat_interleave(torch.tensor(sizes, device=first.device), dim=1)
        theta = _normal_classes(features[0], torch.cat([y.softmax(1) for y in logits], 1) * shares)
    else:
        theta = _normal_classes(torch.cat(features), torch.block_diag(*[y.softmax(1) for y in logits]))
    layer = nn.Linear(len(theta) - 1, theta.shape[1]).to(first)
    with torch.no_grad():
        layer.weight.copy_(theta[:-1].T)
        layer.bias.copy_(theta[-1])
    return layer


def _normal_classes(x: Tensor, beliefs: Tensor) -> Tensor:
    """Linear discriminants (d + 1, number of classes) of rows (n, d) that belong to classes with some probability."""
    counts = beliefs.sum(0).clamp(min=1e-9)
    means = x.T @ beliefs / counts
    shares = counts / counts.sum()
    within = (x.T * beliefs.sum(1)) @ x / counts.sum() - (means * shares) @ means.T
    within.diagonal().add_(SHRINKAGE * within.diagonal().mean().clamp(min=1e-30))
    weight = torch.linalg.solve(within, means)
    return torch.cat([weight, (shares.log() - 0.5 * (means * weight).sum(0))[None]])
