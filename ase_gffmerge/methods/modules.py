r"""Every way to merge graph neural networks that are no potentials, behind one signature, with sources.

The methods are those for potentials (:data:`ase_gffmerge.methods.METHODS`), on whatever modules share, with the same code
for what they compute; each gives one module per model, which share everything but the heads. Hyper-parameters are chosen by
the mean relative disagreement with the models on their own examples: no labels.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ase_gffmerge.errors import IncompatibleSpecialistsError, RecipeError
from ase_gffmerge.merging.module_calls import (
    Item,
    Run,
    call_module,
    evaluating,
    outputs_of,
    run_module,
)
from ase_gffmerge.merging.module_inputs import Rows, as_examples, check_modules, row_masks
from ase_gffmerge.merging.module_layers import ModuleProblem, align_modules
from ase_gffmerge.merging.module_views import own_modules, shared_views
from ase_gffmerge.merging.modules import RIDGE, ModuleMerge, merge_modules, module_disagreement
from ase_gffmerge.methods.base import Requirement
from ase_gffmerge.methods.task_vectors import DENSITIES, MULTIPLES, SCALES, disjoint_mean, elect_signs, trim
from ase_gffmerge.methods.weight_space import Settings, grid_of
from ase_gffmerge.models.torch_layers import is_within
from ase_gffmerge.runtime.progress import Progress, no_progress
from ase_gffmerge.runtime.registry import Registry

Views = list[nn.Module]
"""One module per model; all but the heads is shared."""

EPOCHS, LEARNING_RATE, DECAY = 80, 0.01, 5e-4
"""Of joint training."""


@dataclass(frozen=True, kw_only=True)
class ModuleInputs:
    """What every method is given; see :func:`.merge_modules` for models, examples, run, rows and heads.

    Attributes
    ----------
    base
        The model that all were fine-tuned from, if there is one.
    ridge
        Relative ridge of this package's own methods.
    """

    models: Sequence[nn.Module]
    examples: object
    run: Run = run_module
    rows: Rows = None
    heads: str | Sequence[str] = "refit"
    base: nn.Module | None = None
    ridge: float = RIDGE

    @property
    def own(self) -> tuple[str, ...]:
        """Names of what every model keeps."""
        return tuple(own_modules(self.models, self.heads))

    def problem(self, views: Sequence[nn.Module]) -> ModuleProblem:
        """The least-squares problems of views."""
        return ModuleProblem(
            models=self.models,
            views=views,
            examples=as_examples(self.examples, len(self.models)),
            run=self.run,
            mask=row_masks(self.rows, self.models, run=self.run),
            weights=[1.0] * len(self.models),
            ridge=self.ridge,
        )

    def mean(self) -> Views:
        """Mean of the weights, with every model's own heads."""
        return shared_views(self.models, self.own)

    def disagreement(self, views: Sequence[nn.Module]) -> float:
        """Mean relative disagreement with the models on their own examples."""
        problem = self.problem(views)
        rows = [module_disagreement(problem, views, "merged", k) for k in range(len(views))]
        return sum(row.relative for row in rows) / len(rows)


ModuleFunction = Callable[[ModuleInputs, Progress], Views]


@dataclass(frozen=True, kw_only=True)
class ModuleMethod:
    """A way to merge modules.

    Attributes
    ----------
    name, citation
        Short name, and where the method comes from.
    needs
        What it cannot do without, beside examples.
    trains
        Whether it trains by gradient descent.
    function
        The method itself; called through :meth:`run`.
    """

    name: str
    citation: str
    needs: frozenset[Requirement]
    trains: bool
    function: ModuleFunction

    def run(self, inputs: ModuleInputs, progress: Progress = lambda fraction, text: None) -> Views:
        """Merge; the models stay as they are.

        Raises
        ------
        RecipeError
            When the method needs a base and there is none.
        """
        check_modules(inputs.models)
        if Requirement.BASE in self.needs and inputs.base is None:
            raise RecipeError(f"{self.name} needs the model that all were fine-tuned from; give it as base=")
        with evaluating(inputs.models):
            views = self.function(inputs, progress)
        for view in views:
            view.eval()
        return views


def module_method(
    name: str, *, citation: str, needs: Sequence[Requirement] = (), trains: bool = False
) -> Callable[[ModuleFunction], ModuleMethod]:
    """Decorate a function that is a method.

    Parameters
    ----------
    name, citation, needs, trains
        See :class:`ModuleMethod`.
    """
    return lambda function: ModuleMethod(
        name=name, citation=citation, needs=frozenset(needs), trains=trains, function=function
    )


@module_method("mean", citation="Wortsman et al. (model soups), arXiv 2203.05482")
def mean(inputs: ModuleInputs, progress: Progress) -> Views:
    """Mean of the weights; heads stay."""
    return inputs.mean()


@module_method("mean+heads", citation="this package: the mean with heads in closed form")
def mean_and_heads(inputs: ModuleInputs, progress: Progress) -> Views:
    """Mean of the weights, and heads fitted to the models' own outputs: the baseline to beat."""
    views = inputs.mean()
    with evaluating(views):
        align_modules(
            inputs.problem(views),
            solved=lambda name: any(is_within(name, own) for own in inputs.own),
            progress=progress,
        )
    return views


@module_method("sequential", citation="this package, after arXiv 2606.03232; heads stay")
def sequential(inputs: ModuleInputs, progress: Progress) -> Views:
    """Every layer on the merged model's inputs; heads stay."""
    return _views(inputs, progress, {name: "kept" for name in inputs.own}, channels="joint")


@module_method(
    "gffmerge, joint", citation="this package, after arXiv 2606.03232; every channel follows all models"
)
def joint_channels(inputs: ModuleInputs, progress: Progress) -> Views:
    """Every layer on the merged model's inputs, heads included, channels joint."""
    return _views(inputs, progress, {name: "refit" for name in inputs.own}, channels="joint")


@module_method("gffmerge", citation="this package, after arXiv 2606.03232")
def gffmerge(inputs: ModuleInputs, progress: Progress) -> Views:
    """Every layer on the merged model's inputs, heads included: :func:`.merge_modules`."""
    return _views(inputs, progress, {name: "refit" for name in inputs.own}, channels="auto")


def _views(inputs: ModuleInputs, progress: Progress, heads: Mapping[str, str], *, channels: str) -> Views:
    return list(merged(inputs, progress, heads, channels=channels).views)


def merged(
    inputs: ModuleInputs,
    progress: Progress = no_progress,
    heads: str | Mapping[str, str] = "refit",
    *,
    channels: str = "auto",
) -> ModuleMerge:
    """:func:`.merge_modules` of the inputs of a method.

    Parameters
    ----------
    inputs, progress
        As every method gets them.
    heads, channels
        See :func:`.merge_modules`.
    """
    return merge_modules(
        inputs.models,
        inputs.examples,
        run=inputs.run,
        rows=inputs.rows,
        heads=heads,
        ridge=inputs.ridge,
        channels=channels,
        progress=progress,
    )


# Weights as vectors


def least_disagreement(
    inputs: ModuleInputs, build: Callable[..., Views], grid: Sequence[Settings], progress: Progress
) -> Views:
    """What settings of least disagreement make, the first among equals.

    Parameters
    ----------
    inputs
        Models and examples.
    build
        Makes views from settings given as keyword arguments.
    grid
        Settings to try.
    progress
        Called with a fraction (0 to 1) and the settings.
    """
    best, least = None, float("inf")
    for i, settings in enumerate(grid):
        progress(i / len(grid), ", ".join(f"{name} {value:g}" for name, value in settings.items()))
        views = build(**settings)
        with evaluating(views):
            value = inputs.disagreement(views)
        if best is None or value < least:
            best, least = views, value
    assert best is not None
    return best


def _vectors(inputs: ModuleInputs) -> tuple[Tensor, Tensor, Callable[[Tensor], Views]]:
    """The base (P,), task vectors (K, P), and what makes views of a vector (P,)."""
    assert inputs.base is not None
    names = [
        name
        for name, _ in inputs.models[0].named_parameters()
        if not any(is_within(name, own) for own in inputs.own)
    ]
    held = dict(inputs.base.named_parameters())
    if any(
        name not in held or held[name].shape != inputs.models[0].get_parameter(name).shape for name in names
    ):
        raise IncompatibleSpecialistsError(
            "the base has other parameters than the models share; give the model that they were fine-tuned from"
        )

    def flat(model: nn.Module) -> Tensor:
        return torch.cat([model.get_parameter(name).detach().double().flatten() for name in names])

    def build(vector: Tensor) -> Views:
        views = inputs.mean()
        parameters = [views[0].get_parameter(name) for name in names]
        with torch.no_grad():
            for parameter, part in zip(
                parameters, vector.split([p.numel() for p in parameters]), strict=True
            ):
                parameter.copy_(part.view_as(parameter))
        return views

    origin = flat(inputs.base)
    return origin, torch.stack([flat(model) for model in inputs.models]) - origin, build


@module_method("task_arithmetic", citation="Ilharco et al., arXiv 2212.04089", needs=(Requirement.BASE,))
def task_arithmetic(inputs: ModuleInputs, progress: Progress) -> Views:
    """Task arithmetic with λ of least disagreement; heads stay."""
    origin, task_vectors, build = _vectors(inputs)
    scales = [share / len(task_vectors) for share in MULTIPLES]
    return least_disagreement(
        inputs,
        lambda scale: build(origin + scale * task_vectors.sum(0)),
        grid_of(scale=scales),
        progress,
    )


@module_method("ties", citation="Yadav et al., arXiv 2306.01708", needs=(Requirement.BASE,))
def ties(inputs: ModuleInputs, progress: Progress) -> Views:
    """TIES with density and λ of least disagreement; heads stay."""
    origin, task_vectors, build = _vectors(inputs)
    known = torch.ones_like(task_vectors, dtype=torch.bool)

    def trimmed(density: float, scale: float) -> Views:
        kept = trim(task_vectors, known, density=density)
        return build(origin + scale * disjoint_mean(kept, elect_signs(kept)))

    return least_disagreement(inputs, trimmed, grid_of(density=DENSITIES, scale=SCALES), progress)


@module_method(
    "joint", citation="the reference: training on all labels", needs=(Requirement.LABELS,), trains=True
)
def joint(inputs: ModuleInputs, progress: Progress) -> Views:
    """A new body with a head for each model, trained with cross-entropy on the labelled nodes (``train_mask``, ``y``)."""
    views = inputs.mean()
    for part in (part for view in views for part in view.modules()):
        reset = getattr(part, "reset_parameters", None)
        if callable(reset):
            reset()
    problem = inputs.problem(views)
    labelled = row_masks("labelled", inputs.models, run=inputs.run)
    parameters = dict.fromkeys(p for view in views for p in view.parameters())
    optimizer = torch.optim.Adam(parameters, lr=LEARNING_RATE, weight_decay=DECAY)
    for view in views:
        view.train()
    with torch.enable_grad():
        for epoch in range(EPOCHS):
            progress(epoch / EPOCHS, f"epoch {epoch}/{EPOCHS}")
            optimizer.zero_grad()
            for k, view in enumerate(views):
                for item in problem.examples[k]:
                    logits, mask = outputs_of(_trained(inputs, view, item))[0], labelled(k, item)
                    nn.functional.cross_entropy(logits[mask], item.y[mask]).backward()
            optimizer.step()
    return views


def _trained(inputs: ModuleInputs, view: nn.Module, item: Item) -> object:
    """Evaluate a module with gradients."""
    if inputs.run is not run_module:
        return inputs.run(view, item)
    return call_module(view, item)


_HERE, _LAYERWISE = "ase_gffmerge.methods.modules", "ase_gffmerge.methods.modules_layerwise"

MODULE_METHODS: Registry[ModuleMethod] = Registry(
    "method",
    group="ase_gffmerge.module_methods",
    own={
        "mean": f"{_HERE}:mean",
        "mean+heads": f"{_HERE}:mean_and_heads",
        "task_arithmetic": f"{_HERE}:task_arithmetic",
        "ties": f"{_HERE}:ties",
        "regmean": f"{_LAYERWISE}:regmean",
        "procrustes": f"{_LAYERWISE}:procrustes",
        "git_rebasin": f"{_LAYERWISE}:git_rebasin",
        "gnnmerge": f"{_LAYERWISE}:gnnmerge",
        "gnnmerge++": f"{_LAYERWISE}:gnnmerge_plus_plus",
        "sequential": f"{_HERE}:sequential",
        "gffmerge, joint": f"{_HERE}:joint_channels",
        "gffmerge": f"{_HERE}:gffmerge",
        "joint": f"{_HERE}:joint",
    },
    name_of=lambda found: found.name if isinstance(found, ModuleMethod) else None,
    error=RecipeError,
)
"""All of them by name, in the order in which tables show them; other packages add theirs as entry points."""
