"""``gffmerge evaluate --md``: dynamics of several force fields side by side."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from ase_gffmerge.cli.options import DType
from ase_gffmerge.cli.output import note, plain, print_json, progress_bar

if TYPE_CHECKING:
    from ase import Atoms

    from ase_gffmerge.evaluation.md.evaluate import MDEvaluation
    from ase_gffmerge.evaluation.md.protocol import Protocol
    from ase_gffmerge.evaluation.md.runs import Contestant
    from ase_gffmerge.inference.metrics import Errors


def evaluate_md(
    models: "Sequence[Contestant]",
    frames: Path,
    protocol: "Protocol",
    *,
    reference: Path | None,
    dtype: DType,
    out: Path,
    as_json: bool,
) -> None:
    """Run, compare, write ``md.json`` and ``md.png`` into ``out``, and print."""
    import torch

    from ase_gffmerge.data.readers import read_frames
    from ase_gffmerge.evaluation.md.evaluate import evaluate_dynamics, matching_frames, starting_structures
    from ase_gffmerge.evaluation.md.runs import estimated_seconds
    from ase_gffmerge.storage.atomic import require_writable

    starts = read_frames(frames)
    truth = matching_frames(read_frames(reference) if reference else starts, starts[0])
    for model in models:
        model.force_field.to(dtype=getattr(torch, dtype.value))
        model.force_field.prepared(starts[0], specialist=model.specialist)
    require_writable(out / "md.json")
    errors = labelled_errors(models, starts)
    seconds = estimated_seconds(models, starting_structures(starts, protocol.seeds), protocol)
    note(f"{describe(protocol, len(models))}: about {duration(seconds)}; finished runs are kept in {out}")
    try:
        with progress_bar("dynamics") as progress:
            evaluation = evaluate_dynamics(
                models,
                starts,
                protocol=protocol,
                reference=truth,
                errors=errors,
                folder=out / "runs",
                progress=progress,
            )
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"interrupted; {out} holds the finished runs, and the same command goes on from there"
        ) from None
    write_results(evaluation, out)
    if as_json:
        print_json(evaluation.to_dict())
    else:
        print_evaluation(evaluation)
    note(f"written: {out} (md.json, md.png)")


def labelled_errors(models: "Sequence[Contestant]", frames: "Sequence[Atoms]") -> "dict[str, Errors]":
    """Errors by model where the frames have labels; nothing where they have none."""
    from ase_gffmerge.cli.evaluate import errors_by_model
    from ase_gffmerge.data.readers import require_labels
    from ase_gffmerge.errors import FramesError

    try:
        require_labels(frames, "the frames")
    except FramesError:
        return {}
    return errors_by_model(models, frames)


def describe(protocol: "Protocol", n_models: int) -> str:
    """Say in one line what will be run."""
    return (
        f"{n_models} model(s) x {protocol.seeds} seed(s) x ({protocol.length('nvt'):g} ps NVT + "
        f"{protocol.length('nve'):g} ps NVE) at {protocol.temperature:g} K"
    )


def duration(seconds: float) -> str:
    """Seconds or minutes, rounded."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def write_results(evaluation: "MDEvaluation", out: Path) -> None:
    """Write numbers and plot."""
    from ase_gffmerge.evaluation.md.plots import plot_dynamics
    from ase_gffmerge.storage.atomic import atomic_write

    text = json.dumps(plain(evaluation.to_dict()), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    atomic_write(out / "md.json", text)
    plot_dynamics(evaluation, out / "md.png")


def print_evaluation(evaluation: "MDEvaluation") -> None:
    """Print one row per quantity, one column per model."""
    from ase_gffmerge.evaluation.md.table import conditions, header, rows

    table = [header(evaluation), *rows(evaluation)]
    widths = [max(len(row[k]) for row in table) for k in range(len(table[0]))]
    for name, *values in table:
        cells = [f"{value:>{width}}" for value, width in zip(values, widths[1:], strict=True)]
        typer.echo("  ".join([f"{name:<{widths[0]}}", *cells]))
    typer.echo(conditions(evaluation))
