r"""Merge any graph neural networks: models of one architecture become one, in closed form and without labels.

The generic counterpart of :mod:`.merge` (GNNMerge, arXiv 2503.03384, does the same for node classification with two kinds of
layers): no potential, no frames, only modules and examples that each of them knows. Layers are aligned one after the other
(:mod:`.module_layers`), as those of potentials are; whatever is not linear in its parameters is averaged and named.
Modules that every model keeps, such as the heads of different tasks, are fitted again on the merged body: their inputs are
new, and their outputs are to be those of the model that they come from.
"""

import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from ase_gffmerge.errors import ArgumentError, IncompatibleSpecialistsError
from ase_gffmerge.merging.module_calls import (
    Item,
    Run,
    averaged_names,
    evaluating,
    outputs_of,
    own_buffers,
    run_module,
    solvable_layers,
)
from ase_gffmerge.merging.module_inputs import (
    Rows,
    as_examples,
    check_modules,
    checked_ridge,
    checked_weights,
    require_outputs,
    row_masks,
)
from ase_gffmerge.merging.module_layers import (
    ALIGNED,
    EVALUATED,
    ModuleProblem,
    align_modules,
    execution_order,
)
from ase_gffmerge.merging.module_views import (
    KEPT,
    REFIT,
    AllClasses,
    HeadRows,
    HeadsAndRegions,
    SideBySide,
    class_regions,
    complete_rows,
    own_modules,
    shared_views,
    wide_head,
    with_head,
)
from ase_gffmerge.merging.report import LayerReport
from ase_gffmerge.models.torch_layers import KeptOutputs, is_within
from ase_gffmerge.runtime.progress import Clock, Progress, no_progress, part_of

JOINT, DIVIDED = "joint", "divided"

MAX_KEPT = 2**29
"""Bytes of what layers return that are kept for examples in lists."""

RIDGE = 1e-3
"""Relative ridge: larger than for potentials, as graphs of a few thousand nodes meet layers of hundreds of channels."""


@dataclass(frozen=True, kw_only=True)
class ModuleDisagreement:
    r"""How far a merged module is from one model on that model's examples.

    Attributes
    ----------
    specialist
        Index of the model.
    model
        ``mean`` of the weights, or ``merged``.
    relative
        :math:`\lVert f - f_k\rVert / \lVert f_k\rVert` of all outputs together.
    agreement
        Fraction of rows whose largest output is the same; ``None`` for outputs of a single column.
    """

    specialist: int
    model: str
    relative: float
    agreement: float | None


@dataclass(frozen=True, kw_only=True)
class ModuleMerge:
    """Several modules merged into one.

    Attributes
    ----------
    views
        The merged module with what each model keeps; everything else is shared between them.
    heads
        Names of the submodules that every model keeps.
    layers
        Least-squares problems in the order they were solved.
    averaged
        Parameters and buffers that no problem covers and that are the mean of the models'.
    recalibrated
        Batch normalizations whose statistics were taken anew on the examples.
    unreached
        Layers that could have been solved, but that no example called as modules; they are averaged.
    disagreements
        How mean and merged module differ from each model.
    channels
        ``joint`` or ``divided``: whether channels follow all models, or a single one each.
    head_rows
        What enters the heads, and what each model's own head says there; empty unless every head is one linear layer of
        several classes, and no more than a log-softmax comes after it.
    kept
        Buffers outside of the heads that differ and have no mean, such as integers; every model keeps its own.
    seconds
        Processor time of the whole merge, ``total``, and of Gram matrices and solves in it, ``layers``.
    """

    views: tuple[nn.Module, ...]
    heads: tuple[str, ...]
    layers: tuple[LayerReport, ...]
    averaged: tuple[str, ...]
    recalibrated: tuple[str, ...]
    unreached: tuple[str, ...]
    disagreements: tuple[ModuleDisagreement, ...]
    channels: str
    head_rows: tuple[HeadRows, ...] = ()
    kept: tuple[str, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def module(self) -> nn.Module:
        """The merged module; with the first model's heads, where models have their own."""
        return self.for_model(0)

    @property
    def relative_disagreement(self) -> float:
        """Mean relative disagreement of the merged module with the models."""
        return sum(row.relative for row in self.disagreements if row.model == "merged") / len(self.views)

    def for_model(self, k: int) -> nn.Module:
        """The merged module with the heads of model k, called as that model was."""
        if not 0 <= k < len(self.views):
            raise ArgumentError(f"there is no model {k}; the {len(self.views)} models are counted from 0")
        return deepcopy(self.views[k])

    def head(self, k: int) -> dict[str, nn.Module]:
        """What model k keeps, by name."""
        return {name: deepcopy(self.views[k].get_submodule(name)) for name in self.heads}

    def all_classes(self, *, calibrated: bool = True) -> nn.Module:
        """Module whose outputs are those of all heads, side by side: no task has to be known.

        Parameters
        ----------
        calibrated
            Give log-probabilities: how probable it is that an input belongs to a model, times how probable the model's
            classes are (:class:`.AllClasses`). Heads that are more than one linear layer, have one output, or do not have
            the last word but for a log-softmax, give the networks' outputs as they are. ``False``: all do.

        Raises
        ------
        ArgumentError
            When the models have no heads of their own.
        """
        if not self.heads:
            raise ArgumentError(
                "the models have no heads of their own, so the merged module has all outputs already"
            )
        views = [self.for_model(k) for k in range(len(self.views))]
        heads = [view.get_submodule(self.heads[0]) for view in views]
        linear = [head for head in heads if type(head) is nn.Linear]
        if not self.head_rows:
            return SideBySide(views)
        if not calibrated:
            return with_head(views[0], self.heads[0], wide_head(linear))
        both = HeadsAndRegions(wide_head(linear), class_regions(self.head_rows))
        return AllClasses(with_head(views[0], self.heads[0], both), [head.out_features for head in linear])

    def summary(self) -> str:
        """A few lines for a terminal."""
        lines = [
            f"merge of {len(self.views)} modules, {len(self.layers)} layers solved, channels {self.channels}"
        ]
        for row in self.disagreements:
            same = "" if row.agreement is None else f", same choice in {100 * row.agreement:.1f} %"
            lines.append(f"  model {row.specialist}: {row.model} differs by {100 * row.relative:.1f} %{same}")
        for what, names in (
            ("own of every model", (*self.heads, *self.kept)),
            ("averaged, as no solve covers them", self.averaged),
            ("statistics taken anew", self.recalibrated),
            ("never called as modules", self.unreached),
        ):
            if names:
                lines.append(f"  {what}: {', '.join(names)}")
        return "\n".join(lines)


def merge_modules(
    models: Sequence[nn.Module],
    examples: object,
    *,
    run: Run | None = None,
    rows: Rows = None,
    heads: str | Sequence[str] | Mapping[str, str] = REFIT,
    weights: Sequence[float] | None = None,
    ridge: float = RIDGE,
    channels: str = "auto",
    progress: Progress = no_progress,
) -> ModuleMerge:
    """Merge modules of one architecture.

    Parameters
    ----------
    models
        At least two. They are evaluated in ``eval()`` mode and left as they were.
    examples
        For each model what it knows: a graph of torch_geometric, or a list or loader of graphs, batches of graphs or
        sampled neighborhoods (seed nodes first, as ``NeighborLoader`` gives them), or of whatever ``run`` understands.
        A single graph or loader serves all models. Labels are not used.
    run
        ``run(model, item)`` evaluates a model on one example. Default: a graph's attributes are passed as the arguments of
        their names, tuples as positional and dictionaries as keyword arguments.
    rows
        Which nodes of an example count (:func:`.row_masks`): ``None`` (all), ``"labelled"``, ``"confidence"``, a mask, one
        for each model, the name of an attribute, or a function of the model's index and the example.
    heads
        Submodules of which every model keeps its own: ``"refit"`` (fitted again on the merged body) or ``"kept"`` (as they
        are) for those whose parameters differ in shape between the models, or else a last linear layer named ``head``;
        or their names, or one of the two words for each name.
    weights
        How much each model counts, in solves and means; positive, default: all the same.
    ridge
        Relative ridge, anchored at the mean of the weights.
    channels
        ``"joint"``: every channel follows all models, which is right for models that were fine-tuned from one.
        ``"divided"``: every channel of an inner layer follows one of them, for models of independent initialisations.
        ``"auto"`` does both and keeps what disagrees less with the models on their examples.
    progress
        Called with a fraction (0 to 1) and a description.

    Raises
    ------
    IncompatibleSpecialistsError
        For fewer than two models, for models of different architecture, or if no layer is called that a merge knows.
    FramesError
        When examples are missing, do not fit the models, or none of their rows counts.
    """
    models = list(models)
    check_modules(models)
    say, ridge = checked_weights(weights, len(models)), checked_ridge(ridge)
    clock, start = Clock(time.process_time), time.process_time()
    evaluate, groups = run or run_module, as_examples(examples, len(models))
    if channels not in ("auto", JOINT, DIVIDED):
        raise ArgumentError(f"channels={channels!r}: there are 'auto', 'joint' and 'divided'")
    own = own_modules(models, heads)
    mean = shared_views(models, tuple(own), weights=say)
    kept = [name for name, how in own.items() if how == KEPT]
    ways = (JOINT, DIVIDED) if channels == "auto" else (channels,)
    found: list[ModuleMerge] = []
    held = all(isinstance(group, list | tuple) for group in groups)
    memory = KeptOutputs(MAX_KEPT if held else 0)  # a loader's items are new every time
    for model in (*models, *mean):
        memory.settle(model, solvable_layers(model))

    def evaluate_model(model: nn.Module, item: Item) -> object:
        with memory.replayed(model, item):
            return evaluate(model, item)

    with evaluating([*models, *mean]):
        problem = ModuleProblem(
            models=models,
            views=mean,
            examples=groups,
            run=evaluate,
            mask=row_masks(rows, models, run=evaluate_model),
            weights=say,
            ridge=ridge,
            kept=memory,
            clock=clock,
        )
        steps = execution_order(problem)
        of_mean = [module_disagreement(problem, mean, "mean", k) for k in range(len(models))]
        for view in mean:
            memory.forget(view)
        for i, way in enumerate(ways):
            views = deepcopy(mean)
            problem = replace(problem, views=views, divided=way == DIVIDED)
            alignment = align_modules(
                problem,
                steps=steps,
                solved=lambda name: not any(is_within(name, head) for head in kept),
                progress=part_of(progress, 0.9 * i / len(ways), 0.9 * (i + 1) / len(ways)),
            )
            if not alignment.reached:
                raise IncompatibleSpecialistsError(
                    "the examples call no layer that a merge knows; are these the modules that are evaluated, and not "
                    "compiled or copied ones?"
                )
            for view in views:  # what is said of the result was computed with all of it
                memory.forget(view)
            seen = [HeadRows(*own) if len(own) == 1 else None for _ in models]
            of_merged = [module_disagreement(problem, views, "merged", k, seen=h) for k, h in enumerate(seen)]
            found.append(
                ModuleMerge(
                    views=tuple(views),
                    heads=tuple(own),
                    layers=alignment.reports,
                    averaged=averaged_names(
                        models,
                        views[0],
                        reached=alignment.solved,
                        recalibrated=alignment.recalibrated,
                        own=tuple(own),
                    ),
                    kept=own_buffers(models, tuple(own)),
                    recalibrated=alignment.recalibrated,
                    unreached=tuple(n for n in solvable_layers(views[0]) if n not in alignment.reached),
                    disagreements=tuple(row for pair in zip(of_mean, of_merged, strict=True) for row in pair),
                    channels=way,
                    head_rows=complete_rows(seen),
                )
            )
    progress(1.0, "done")
    result = min(found, key=lambda merge: merge.relative_disagreement)
    for view in result.views:
        view.eval()
    layers = clock.seconds.get(ALIGNED, 0.0) - clock.seconds.get(EVALUATED, 0.0)
    return replace(result, seconds={"total": time.process_time() - start, "layers": layers})


@torch.no_grad()
def module_disagreement(
    problem: ModuleProblem, views: Sequence[nn.Module], kind: str, k: int, *, seen: HeadRows | None = None
) -> ModuleDisagreement:
    """How one of the views differs from its model on the model's examples.

    Parameters
    ----------
    problem, k
        With models and examples, and the index of the model.
    views, kind
        Of the merged module, and what it is called.
    seen
        Takes note of what enters the heads.

    Raises
    ------
    FramesError
        When none of the model's outputs counts, or some are not finite.
    """
    difference = size = 0.0
    same, n, n_values = 0, 0, 0
    for item in problem.examples[k]:
        mask = problem.mask(k, item)
        watched = seen.watching(views[k], problem.models[k]) if seen else nullcontext()
        replays = [problem.kept.replayed(module, item) for module in (problem.models[k], views[k])]
        with replays[0], replays[1], watched:
            said = problem.run(problem.models[k], item)
            theirs, merged = outputs_of(said), outputs_of(problem.run(views[k], item))
        if seen:
            seen.keep(mask, said)
        for i, (ours, own) in enumerate(zip(merged, theirs, strict=True)):
            if mask is not None and own.dim() and len(own) == len(mask):
                ours, own = ours[mask.to(ours.device)], own[mask.to(own.device)]
            n_values += own.numel()
            difference += float((ours - own).double().square().sum())
            size += float(own.double().square().sum())
            if not i and own.dim() == 2 and own.shape[1] > 1:
                same, n = same + int((ours.argmax(1) == own.argmax(1)).sum()), n + len(own)
    require_outputs(k, n_values, size)
    return ModuleDisagreement(
        specialist=k,
        model=kind,
        relative=(difference / size) ** 0.5 if size else float(difference > 0),
        agreement=same / n if n else None,
    )
