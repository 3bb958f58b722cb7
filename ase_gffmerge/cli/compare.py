"""``gffmerge compare``: all methods side by side."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ase_gffmerge.cli.options import (
    CalibrationOption,
    DeviceOption,
    ExecutorOption,
    JsonOption,
    OverwriteOption,
    SpecialistsArgument,
    WorkersOption,
    load_specialists,
    opened_workers,
)
from ase_gffmerge.cli.output import note, print_json, print_table, require_outputs
from ase_gffmerge.runtime.progress import Progress, is_first, progress_bar

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from ase_gffmerge.evaluation.comparison.compare import Comparison
    from ase_gffmerge.evaluation.comparison.inputs import LabelledSet
    from ase_gffmerge.evaluation.comparison.measurement import RowStore
    from ase_gffmerge.methods import MergeInputs

FRAMES_HELP = "one file per specialist, in order; several values, or repeat the option"


def compare(
    specialists: SpecialistsArgument,
    test: Annotated[
        list[Path] | None,
        typer.Option(help=f"Labelled frames to test on: {FRAMES_HELP}.", show_default="the bundled ones"),
    ] = None,
    calibration: CalibrationOption = None,
    methods: Annotated[
        list[str] | None,
        typer.Option(help="Only these, also with commas.", show_default="all without training"),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(help="Common ancestor, file or bundled name.", show_default="found if bundled"),
    ] = None,
    labels: Annotated[
        list[Path] | None,
        typer.Option(help=f"Labelled frames for methods that train on labels: {FRAMES_HELP}."),
    ] = None,
    markdown: Annotated[Path | None, typer.Option(help="Also write the tables as Markdown.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Also draw the force errors (.png, .svg, .pdf).")] = None,
    resume: Annotated[
        Path | None,
        typer.Option(help="Folder that keeps finished methods.", show_default="in the cache folder"),
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure again what is already finished.")] = False,
    device: DeviceOption = "auto",
    workers: WorkersOption = None,
    executor: ExecutorOption = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Compare all ways to use specialists together on frames that none of them has seen.

    Several processes share merges and trainings when torchrun starts them, as for merge; other methods they repeat.
    """
    from ase_gffmerge.evaluation.comparison.inputs import make_merge_inputs, read_labelled, read_tests
    from ase_gffmerge.evaluation.comparison.measurement import RowStore, default_folder
    from ase_gffmerge.integrations.load import load_force_field
    from ase_gffmerge.runtime.distributed import sharing
    from ase_gffmerge.sampling.on_request import file_of_frames

    frames = map(file_of_frames, calibration or ())
    require_outputs(markdown, plot=plot, inputs=[*specialists, *frames, *(test or ())], overwrite=overwrite)
    tests = read_tests(specialists, test or ())
    labelled = read_labelled(labels, specialists, option="--labels") if labels else ()
    with sharing():
        merge_inputs = make_merge_inputs(
            load_specialists(specialists, calibration, device=device),
            base=load_force_field(base) if base else None,
            labelled=labelled,
            device=device,
        )
        store = RowStore(resume or default_folder(), merge_inputs, tests, fresh=fresh)
        with opened_workers(workers, executor) as opened, progress_bar("comparing") as progress:
            comparison = _watched(
                merge_inputs, tests, split_names(methods), labelled, store, opened, progress
            )
    if not is_first():
        return
    _write_files(comparison, markdown, plot)
    if as_json:
        print_json(comparison.to_dict())
    else:
        print_comparison(comparison)
    written = [str(path) for path in (markdown, plot) if path]
    if written:
        note(f"written: {', '.join(written)}")


def split_names(methods: list[str] | None) -> list[str] | None:
    """Names given one by one or with commas."""
    return [name for entry in methods or () for name in entry.split(",") if name] or None


def _watched(
    merge_inputs: "MergeInputs",
    tests: "tuple[LabelledSet, ...]",
    methods: list[str] | None,
    labelled: "tuple[LabelledSet, ...]",
    store: "RowStore",
    executor: "Executor | None",
    progress: Progress,
) -> "Comparison":
    """Compare; after Ctrl-C say how to go on."""
    from ase_gffmerge.evaluation.comparison.compare import compare_methods

    try:
        return compare_methods(
            merge_inputs,
            tests,
            methods,
            labelled=labelled,
            store=store,
            executor=executor,
            progress=progress,
        )
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            "interrupted; finished methods are kept, and the same command (without --fresh) goes on with the next"
        ) from None


def _write_files(comparison: "Comparison", markdown: Path | None, plot: Path | None) -> None:
    """Write the Markdown file and the plot, where asked for."""
    from ase_gffmerge.evaluation.comparison.report import markdown as tables
    from ase_gffmerge.evaluation.comparison.report import plot_comparison
    from ase_gffmerge.storage.tensor_file import atomic_write

    if markdown:
        text = tables(comparison).encode()
        atomic_write(markdown, text)
    if plot:
        plot_comparison(comparison, plot)


def print_comparison(comparison: "Comparison") -> None:
    """Print all tables for people."""
    from ase_gffmerge.evaluation.comparison.report import footnotes, method_tables

    for table in method_tables(comparison):
        print_table(table)
        typer.echo()
    typer.echo("\n".join(["* best of its column", *footnotes(comparison)]))
