"""Graph neural networks of different tasks, merged by every method: scores with and without task identity, and seconds.

Specialists start from initialisations of their own or (:data:`SHARED`) all from one, which gives task arithmetic and TIES
their base. What GNNMerge (arXiv 2503.03384) measures: classes of one graph dealt out to several models, two graphs, node
classification beside link prediction.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn

from ase_gffmerge.errors import BenchmarkError, FileFormatError
from ase_gffmerge.evaluation.benchmark.graph_tasks import (
    CONVOLUTIONS,
    Network,
    Task,
    predict_links,
    score_without_task,
    scores,
    split_classes,
    train,
)
from ase_gffmerge.merging.module_views import shared_views
from ase_gffmerge.merging.recipe import MERGE_VERSION
from ase_gffmerge.methods import Requirement
from ase_gffmerge.methods.modules import MODULE_METHODS, ModuleInputs, merged
from ase_gffmerge.runtime.progress import Progress, no_progress
from ase_gffmerge.storage.results import ResultStore
from ase_gffmerge.storage.tensor_file import atomic_write, content_digest, read_file, write_file

EPOCHS, SEEDS = 80, 3

TABLES: dict[str, Callable[[Path, int], list[Task]]] = {
    "Cora in two halves": lambda data, seed: split_classes(data / "cora.npz", 2, seed=seed),
    "Cora in three parts": lambda data, seed: split_classes(data / "cora.npz", 3, seed=seed),
    "Cora + Citeseer": lambda data, seed: [
        *split_classes(data / "cora.npz", 1, seed=seed),
        *split_classes(data / "citeseer.npz", 1, seed=seed),
    ],
    "classes + links of Cora": lambda data, seed: [
        *split_classes(data / "cora.npz", 1, seed=seed),
        predict_links(data / "cora.npz", seed=seed),
    ],
    "Cora in two halves, raw features": lambda data, seed: split_classes(
        data / "cora.npz", 2, seed=seed, width=None
    ),
    "Cora in two halves, shared initialisation": lambda data, seed: split_classes(
        data / "cora.npz", 2, seed=seed
    ),
}
SHARED = "Cora in two halves, shared initialisation"

ROWS: dict[str, tuple[str, str | None]] = {
    **{name: (name, None) for name, method in MODULE_METHODS.items() if name != "joint"},
    "gnnmerge++": ("gnnmerge++", "train_mask"),
    "gffmerge, labelled nodes": ("gffmerge", "train_mask"),
    "gffmerge, joint, labelled nodes": ("gffmerge, joint", "train_mask"),
}
"""Method and rows of every line of a table; GNNMerge++ takes the training nodes, as published, the others all nodes."""

KINDS_OF = {"git_rebasin": ("GCN", "SAGE", "GIN"), "gnnmerge": ("GCN", "SAGE")}
"""Channels of attention layers are tied to their heads; Adam takes minutes, so only what was published with it is run,"""

ADAM = "Cora in two halves"
"""and only in this table."""

OURS, WITHOUT = "gffmerge", "all classes"

CHANNELS = {OURS: "auto", "gffmerge, joint": "joint"}
"""Channels of the methods whose result tells whose a node is."""

Row = dict[str, Any]
"""Scores of the tasks, score without task identity, processor seconds."""


@dataclass(frozen=True, kw_only=True)
class GraphBenchmark:
    """What is measured, and where its rows are kept.

    Attributes
    ----------
    data
        Folder with cora.npz and citeseer.npz of shchur/gnn-benchmark.
    out
        Folder of the results; finished rows in it are not measured again.
    tables, kinds
        Names in :data:`TABLES` and :data:`~.graph_tasks.CONVOLUTIONS`.
    methods
        Lines of the tables, beside those of joint training and the specialists: names in :data:`ROWS`.
    seeds
        Number of splits and initialisations.
    epochs
        Of every training.
    """

    data: Path
    out: Path
    tables: tuple[str, ...] = tuple(TABLES)
    kinds: tuple[str, ...] = tuple(CONVOLUTIONS)
    methods: tuple[str, ...] = tuple(ROWS)
    seeds: int = SEEDS
    epochs: int = EPOCHS

    def __post_init__(self) -> None:
        for what, names, known in (
            ("table", self.tables, TABLES),
            ("kind", self.kinds, CONVOLUTIONS),
            ("method", self.methods, ROWS),
        ):
            if unknown := [name for name in names if name not in known]:
                raise BenchmarkError(f"there is no {what} {unknown[0]!r}; choose from: {', '.join(known)}")

        found = {name for t in self.tables for k in self.kinds for name in rows_of(t, k, self.methods)}
        if self.methods != tuple(ROWS) and (left := [name for name in self.methods if name not in found]):
            raise BenchmarkError(
                f"{left[0]} is not measured in these tables with these kinds: methods that need a base are only in "
                f"{SHARED!r}, gnnmerge only in {ADAM!r} with {' and '.join(KINDS_OF['gnnmerge'])}, git_rebasin only with "
                f"{', '.join(KINDS_OF['git_rebasin'])}"
            )

    def run(self, progress: Progress = no_progress) -> dict[str, Any]:
        """Measure what is missing; write gnnmerge.json, gnnmerge.md and gnnmerge.png.

        Returns
        -------
        dict
            By table, kind of convolution and method: mean and standard deviation over the seeds of ``score`` and
            ``all classes`` (without task identity), in percent, and mean processor ``seconds``, of ours also those of
            Gram matrices and solves (``layers``).

        Raises
        ------
        FramesError
            When a graph cannot be read.
        """
        store = ResultStore(self.out / "rows")
        wanted = [(t, k, s) for t in self.tables for k in self.kinds for s in range(self.seeds)]
        rows = {}
        for i, (table, kind, seed) in enumerate(wanted):
            progress(i / len(wanted), f"{table}, {kind}, seed {seed}")
            rows[table, kind, seed] = self._rows(store, table, kind, seed)
        document = summarize(rows)
        atomic_write(self.out / "gnnmerge.json", json.dumps(document, indent=1))
        atomic_write(self.out / "gnnmerge.md", markdown(document))
        plot(document, self.out / "gnnmerge.png")
        return document

    def _rows(self, store: ResultStore, table: str, kind: str, seed: int) -> dict[str, Row]:
        """Lines of one column of a table for one seed, those of earlier runs of as many epochs and this version included."""
        keys = {
            name: json.dumps([table, kind, seed, self.epochs, name, MERGE_VERSION])
            for name in rows_of(table, kind, self.methods)
        }
        found = store.find(list(keys.values()))
        if missing := [name for name, key in keys.items() if key not in found]:
            new = measure(
                table, kind, seed, missing, data=self.data, epochs=self.epochs, networks=self.out / "networks"
            )
            store.keep({keys[name]: row for name, row in new.items()}, name=f"{kind}-{seed}")
            found |= {keys[name]: row for name, row in new.items()}
        return {name: dict(found[key]) for name, key in keys.items()}


def rows_of(table: str, kind: str, methods: Sequence[str] = tuple(ROWS)) -> list[str]:
    """Names of the lines of one column of a table.

    Parameters
    ----------
    table, kind, methods
        Names in :data:`TABLES`, :data:`~.graph_tasks.CONVOLUTIONS` and :data:`ROWS`.
    """
    names = ["joint", "specialists"]
    for name in methods:
        method, _ = ROWS[name]
        no_base = Requirement.BASE in MODULE_METHODS[method].needs and table != SHARED
        too_long = method == "gnnmerge" and table != ADAM
        if kind in KINDS_OF.get(method, CONVOLUTIONS) and not no_base and not too_long:
            names.append(name)
    return names


def measure(
    table: str, kind: str, seed: int, names: Sequence[str], *, data: Path, epochs: int, networks: Path
) -> dict[str, Row]:
    """Train specialists and a joint model, and merge the specialists.

    Parameters
    ----------
    table, kind
        Names in :data:`TABLES` and :data:`~.graph_tasks.CONVOLUTIONS`.
    seed
        Of the split and of all initialisations.
    names
        Lines of the table that are wanted beside those of joint training and the specialists.
    data
        Folder of the graphs.
    epochs
        Of every training.
    networks
        Folder of what was trained.
    """
    tasks = TABLES[table](data, seed)
    models, base = _initial_models(tasks, kind, seed, shared=table == SHARED)
    joint = shared_views(models, ("head",))
    for view, model in zip(joint, models, strict=True):
        view.load_state_dict(models[0].state_dict() | dict(model.head.state_dict(prefix="head.")))
    seconds = trained(joint, tasks, epochs=epochs, folder=networks)
    found = {"joint": _row(joint, tasks, seconds)}
    pairs = zip(models, tasks, strict=True)
    seconds = sum(trained([model], [task], epochs=epochs, folder=networks) for model, task in pairs)
    found["specialists"] = _row(models, tasks, seconds)
    links_only = any(task.links is not None for task in tasks)
    for name in (name for name in names if name in ROWS):
        method, rows = ROWS[name]
        inputs = ModuleInputs(
            models=models,
            examples=[task.data for task in tasks],
            rows=None if links_only else rows,
            base=base,
        )
        start = time.process_time()
        result = merged(inputs, channels=CHANNELS[method]) if method in CHANNELS else None
        views = list(result.views) if result else MODULE_METHODS[method].run(inputs)
        found[name] = _row(views, tasks, time.process_time() - start)
        if result:
            found[name]["layers"] = result.seconds["layers"]
        if result and found[name][WITHOUT] is not None:
            found[name][WITHOUT] = score_without_task([result.all_classes()], tasks)
    return found


def trained(views: Sequence[nn.Module], tasks: Sequence[Task], *, epochs: int, folder: Path) -> float:
    """Train modules, or take what was trained from the same start for the same tasks; gives the processor seconds.

    Parameters
    ----------
    views, tasks, epochs
        See :func:`.train`.
    folder
        Where trained modules are kept.
    """
    settings = {"kind": "trained", "epochs": epochs, "network": type(views[0].first).__name__}
    start = {
        f"{k}.{name}": value
        for k, (view, task) in enumerate(zip(views, tasks, strict=True))
        for name, value in (view.state_dict() | task.tensors()).items()
    }
    path = folder / f"{content_digest(settings, start)[:32]}.safetensors"
    try:
        metadata, held = read_file(path)
    except FileFormatError:
        before = time.process_time()
        with torch.random.fork_rng(devices=[]):  # dropout is the same, whatever was trained before
            torch.manual_seed(int(path.stem[:8], 16))
            train(views, tasks, epochs=epochs)
        metadata = settings | {"seconds": time.process_time() - before}
        held = {
            f"{k}.{name}": x.clone() for k, view in enumerate(views) for name, x in view.state_dict().items()
        }
        write_file(path, metadata, held)
    for k, view in enumerate(views):
        view.load_state_dict({name: held[f"{k}.{name}"] for name in view.state_dict()})
        view.eval()
    return float(metadata["seconds"])


def _initial_models(
    tasks: Sequence[Task], kind: str, seed: int, *, shared: bool
) -> tuple[list[Network], Network | None]:
    """One network per task, each with an initialisation of its own or all with that of a base, and the base."""
    width, base = tasks[0].data.num_features, None
    if shared:
        torch.manual_seed(1000 * seed)
        base = Network(kind, width, 1)
    models = []
    for k, task in enumerate(tasks):
        torch.manual_seed(1000 * seed + k + 1)
        model = Network(kind, width, task.n_out)
        if base:
            model.load_state_dict(base.state_dict() | dict(model.head.state_dict(prefix="head.")))
        models.append(model)
    return models, base


def _row(views: Sequence[nn.Module], tasks: Sequence[Task], seconds: float) -> Row:
    return {
        "tasks": scores(views, tasks),
        WITHOUT: score_without_task(deepcopy(list(views)), tasks),
        "seconds": seconds,
    }


def summarize(rows: Mapping[tuple[str, str, int], dict[str, Row]]) -> dict[str, Any]:
    """Means and standard deviations over the seeds, by table, kind and method."""
    document: dict[str, Any] = {}
    for table, kind in dict.fromkeys((table, kind) for table, kind, _ in rows):
        seeds = [found for (t, k, _), found in rows.items() if (t, k) == (table, kind)]
        document.setdefault(table, {})[kind] = {
            name: {
                "score": _spread([float(np.mean(seed[name]["tasks"])) for seed in seeds]),
                WITHOUT: None
                if seeds[0][name][WITHOUT] is None
                else _spread([seed[name][WITHOUT] for seed in seeds]),
                **{
                    what: float(np.mean([seed[name][what] for seed in seeds]))
                    for what in ("seconds", "layers")
                    if what in seeds[0][name]
                },
            }
            for name in seeds[0]
        }
    return document


def _spread(values: Sequence[float]) -> list[float]:
    return [float(np.mean(values)), float(np.std(values))]


def markdown(document: Mapping[str, Any]) -> str:
    """One table per setting: score ± deviation over the seeds, and without task identity in brackets."""
    lines: list[str] = []
    for table, kinds in document.items():
        lines += [f"## {table}", "", "| |" + "|".join(f" {kind} " for kind in kinds) + "|"]
        lines.append("|---|" + "---|" * len(kinds))
        for name in dict.fromkeys(name for own in kinds.values() for name in own):
            cells = [_cell(own.get(name)) for own in kinds.values()]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        lines.append("")
        timings = [f"{kind} {_timing(own)}" for kind, own in kinds.items() if OURS in own]
        if timings:
            lines += ["seconds: " + "; ".join(timings), ""]
    return "\n".join(lines)


def _cell(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "–"
    mean, deviation = found["score"]
    without = " ({:.1f} ± {:.1f})".format(*found[WITHOUT]) if found[WITHOUT] else ""
    return f"{mean:.1f} ± {deviation:.1f}{without}"


def _timing(own: Mapping[str, Any]) -> str:
    joint = own["joint"]["seconds"]
    merge, layers = own[OURS]["seconds"], own[OURS]["layers"]
    return (
        f"{merge:.2f} ({layers:.2f} for Gram matrices and solves) against {joint:.1f} of joint training "
        f"({joint / merge:.0f} and {joint / layers:.0f} times)"
    )


def plot(document: Mapping[str, Any], path: Path) -> None:
    """Draw scores of the main methods, one panel per table.

    Parameters
    ----------
    document
        As :meth:`GraphBenchmark.run` returns it.
    path
        Of the picture.
    """
    shown = ("specialists", "joint", "mean", "mean+heads", "gnnmerge++", "gffmerge, joint", "gffmerge")
    figure = Figure(figsize=(9, 2.6 * len(document)), layout="constrained")
    panels = figure.subplots(len(document), 1, squeeze=False)[:, 0]
    for axes, (table, kinds) in zip(panels, document.items(), strict=True):
        for i, name in enumerate(shown):
            found = [own.get(name, {"score": [np.nan, 0]})["score"] for own in kinds.values()]
            places = np.arange(len(kinds)) + (i - 3) * 0.11
            axes.bar(places, [f[0] for f in found], 0.11, yerr=[f[1] for f in found], label=name)
        axes.set_xticks(range(len(kinds)), list(kinds))
        axes.set_title(table)
        axes.set_ylabel("score in %")
        lowest = min(own[name]["score"][0] for own in kinds.values() for name in shown if name in own)
        axes.set_ylim(bottom=max(0, lowest - 5))
    panels[0].legend(ncols=4, fontsize="small")
    figure.savefig(path, dpi=120)
