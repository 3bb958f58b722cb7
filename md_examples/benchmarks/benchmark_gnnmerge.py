"""Graph neural networks of different tasks, merged by every method: accuracy with and without task identity, and seconds.

    python md_examples/benchmarks/benchmark_gnnmerge.py DATA --out FOLDER [--json] [--seeds N] [--tables T ...]

DATA holds cora.npz and citeseer.npz of shchur/gnn-benchmark. Specialists start from initialisations of their own, or
("shared") all from one, which gives task arithmetic and TIES their base. Rows are kept in FOLDER, so that a killed run goes
on; FOLDER gets gnnmerge.json, gnnmerge.md and gnnmerge.png.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from graph_tasks import (
    CONVOLUTIONS,
    Network,
    Task,
    links,
    score_without_task,
    scores,
    split_classes,
    train,
)
from matplotlib.figure import Figure
from torch import nn

from ase_gffmerge.merging.module_views import shared_views
from ase_gffmerge.methods import Requirement
from ase_gffmerge.methods.modules import MODULE_METHODS, ModuleInputs

EPOCHS = 80

TABLES: dict[str, Callable[[Path, int], list[Task]]] = {
    "Cora in two halves": lambda data, seed: split_classes(data / "cora.npz", 2, seed=seed),
    "Cora in three parts": lambda data, seed: split_classes(data / "cora.npz", 3, seed=seed),
    "Cora + Citeseer": lambda data, seed: [
        *split_classes(data / "cora.npz", 1, seed=seed),
        *split_classes(data / "citeseer.npz", 1, seed=seed),
    ],
    "classes + links of Cora": lambda data, seed: [
        *split_classes(data / "cora.npz", 1, seed=seed),
        links(data / "cora.npz", seed=seed),
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
}
"""Method and rows of every line of a table; GNNMerge++ takes the training nodes, as published, the others all nodes."""

KINDS_OF = {"git_rebasin": ("GCN", "SAGE", "GIN"), "gnnmerge": ("GCN", "SAGE")}
"""Channels of attention layers are tied to their heads; Adam takes minutes, so only what was published with it is run,"""

ADAM = "Cora in two halves"
"""and only in this table."""


def main() -> None:
    """Measure what is missing, write the table and the plot, print."""
    options = arguments()
    (options.out / "rows").mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    wanted = [(t, k, s) for t in options.tables for k in options.kinds for s in range(options.seeds)]
    for i, (table, kind, seed) in enumerate(wanted):
        path = options.out / "rows" / f"{table}, {kind}, {seed}.json".replace(" ", "_")
        found = json.loads(path.read_text()) if path.exists() else {}
        if missing := [name for name in rows_of(table, kind) if name not in found]:
            print(f"{i + 1}/{len(wanted)} {table}, {kind}, seed {seed}", file=sys.stderr, flush=True)
            found |= measure(table, kind, seed, missing, data=options.data, epochs=options.epochs)
            path.write_text(json.dumps({name: found[name] for name in rows_of(table, kind)}))
    document = collect(options.out / "rows", wanted)
    (options.out / "gnnmerge.json").write_text(json.dumps(document, indent=1))
    text = markdown(document)
    (options.out / "gnnmerge.md").write_text(text)
    plot(document, options.out / "gnnmerge.png")
    print(json.dumps(document, indent=1) if options.json else text)


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path, help="folder of the graphs")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES))
    parser.add_argument("--kinds", nargs="+", choices=CONVOLUTIONS, default=list(CONVOLUTIONS))
    return parser.parse_args()


def rows_of(table: str, kind: str) -> list[str]:
    """Names of the lines of one column of a table."""
    names = ["joint", "specialists"]
    for name, (method, _) in ROWS.items():
        no_base = Requirement.BASE in MODULE_METHODS[method].needs and table != SHARED
        too_long = method == "gnnmerge" and table != ADAM
        if kind in KINDS_OF.get(method, CONVOLUTIONS) and not no_base and not too_long:
            names.append(name)
    return names


def measure(
    table: str, kind: str, seed: int, names: Sequence[str], *, data: Path, epochs: int
) -> dict[str, Any]:
    """Lines of a table for one set of specialists: score per task, score without task identity, processor seconds."""
    tasks = TABLES[table](data, seed)
    width = tasks[0].data.num_features
    base = None
    if table == SHARED:
        torch.manual_seed(1000 * seed)
        base = Network(kind, width, 1)
    models = []
    for k, task in enumerate(tasks):
        torch.manual_seed(1000 * seed + k + 1)
        models.append(Network(kind, width, task.n_out))
        if base:
            models[k].load_state_dict(base.state_dict() | dict(models[k].head.state_dict(prefix="head.")))
    joint = shared_views(models, ("head",))
    for view in joint:
        view.load_state_dict(models[0].state_dict() | dict(view.head.state_dict(prefix="head.")))
    start = time.process_time()
    train(joint, tasks, epochs=epochs)
    found = {"joint": row(joint, tasks, time.process_time() - start)}
    start = time.process_time()
    for model, task in zip(models, tasks, strict=True):
        train([model], [task], epochs=epochs)
    found["specialists"] = row(models, tasks, time.process_time() - start)
    links_only = any(task.pairs is not None for task in tasks)
    for name in names:
        if name not in ROWS:
            continue
        method, rows = ROWS[name]
        inputs = ModuleInputs(
            models=models,
            examples=[task.data for task in tasks],
            rows=None if links_only else rows,
            base=base,
        )
        start = time.process_time()
        views = MODULE_METHODS[method].run(inputs)
        found[name] = row(views, tasks, time.process_time() - start)
    return found


def row(views: Sequence[nn.Module], tasks: Sequence[Task], seconds: float) -> dict[str, Any]:
    """One line of a table."""
    return {
        "tasks": scores(views, tasks),
        "all classes": score_without_task(deepcopy(list(views)), tasks),
        "seconds": seconds,
    }


def collect(folder: Path, wanted: Sequence[tuple[str, str, int]]) -> dict[str, Any]:
    """Means and standard deviations over the seeds, by table, kind and method."""
    document: dict[str, Any] = {}
    for table, kind, _ in wanted:
        seeds = [
            json.loads((folder / f"{t}, {k}, {s}.json".replace(" ", "_")).read_text())
            for t, k, s in wanted
            if (t, k) == (table, kind)
        ]
        document.setdefault(table, {})[kind] = {
            name: {
                "score": spread([np.mean(seed[name]["tasks"]) for seed in seeds]),
                "all classes": None
                if seeds[0][name]["all classes"] is None
                else spread([seed[name]["all classes"] for seed in seeds]),
                "seconds": float(np.mean([seed[name]["seconds"] for seed in seeds])),
            }
            for name in seeds[0]
        }
    return document


def spread(values: Sequence[float]) -> list[float]:
    """Mean and standard deviation."""
    return [float(np.mean(values)), float(np.std(values))]


def markdown(document: dict[str, Any]) -> str:
    """One table per setting: score ± deviation over the seeds, and without task identity in brackets."""
    lines: list[str] = []
    for table, kinds in document.items():
        lines += [f"## {table}", "", "| |" + "|".join(f" {kind} " for kind in kinds) + "|"]
        lines.append("|---|" + "---|" * len(kinds))
        for name in dict.fromkeys(name for own in kinds.values() for name in own):
            cells = [cell(own.get(name)) for own in kinds.values()]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        lines.append("")
        lines += ["seconds: " + "; ".join(f"{kind} {timing(own)}" for kind, own in kinds.items()), ""]
    return "\n".join(lines)


def cell(found: dict[str, Any] | None) -> str:
    """Score ± deviation (without task identity)."""
    if found is None:
        return "–"
    mean, deviation = found["score"]
    without = f" ({found['all classes'][0]:.1f})" if found["all classes"] else ""
    return f"{mean:.1f} ± {deviation:.1f}{without}"


def timing(own: dict[str, Any]) -> str:
    """Joint training over the merge."""
    merge, joint = own["gffmerge"]["seconds"], own["joint"]["seconds"]
    return f"{merge:.2f} against {joint:.1f} of joint training ({joint / merge:.0f} times)"


def plot(document: dict[str, Any], path: Path) -> None:
    """Scores of the main methods, one panel per table."""
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
        axes.set_ylim(bottom=max(0, min(own["mean"]["score"][0] for own in kinds.values()) - 5))
    panels[0].legend(ncols=4, fontsize="small")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
