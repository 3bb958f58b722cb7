"""``gffmerge benchmark``: what a force field costs on this machine; ``gffmerge benchmark gnn``: merges of graph networks."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ase_gffmerge.cli.options import CacheDirOption, DeviceOption, DType, JsonOption, OverwriteOption
from ase_gffmerge.cli.output import note, print_json, print_table, require_outputs
from ase_gffmerge.runtime.progress import Progress, no_progress, progress_bar

if TYPE_CHECKING:
    from ase.calculators.calculator import Calculator

    from ase_gffmerge.evaluation.benchmark.harness import Bench
    from ase_gffmerge.forcefield.force_field import ForceField

DEFAULT = ["rmd17-ethanol", "rmd17-malonaldehyde"]
MERGE_SHARE = 0.4
"""Of the progress bar, when the merge is not in the cache."""


def benchmark(
    specialists: Annotated[
        list[str] | None,
        typer.Argument(help="Files or bundled names, merged if several.", show_default="the bundled pair"),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(
            help="Only these rows: merge, gram, cache, step, compile, ensemble, scaling, memory, neb, and those of --with."
        ),
    ] = None,
    with_: Annotated[
        list[Path] | None,
        typer.Option(
            "--with",
            metavar="FILE.py",
            help="Python files that register more rows, such as md_examples/benchmarks/peer_nequip.py.",
        ),
    ] = None,
    atoms: Annotated[
        list[int] | None, typer.Option(min=1, help="Numbers of atoms.", show_default="9 256 1000")
    ] = None,
    scaling: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Numbers of atoms of the scaling row.", show_default="1000 3200 10000"),
    ] = None,
    steps: Annotated[int, typer.Option(min=2, help="MD steps of the memory row.")] = 300,
    repeats: Annotated[int, typer.Option(min=1, help="Of everything that is timed.")] = 7,
    compile: Annotated[bool, typer.Option("--compile", help="Also measure compiled force fields.")] = False,
    plot: Annotated[
        Path | None,
        typer.Option(help="Also draw ms per step against atoms (.png, .svg, .pdf); needs the row scaling."),
    ] = None,
    dtype: Annotated[DType, typer.Option(help="Of the networks.")] = DType.float32,
    device: DeviceOption = "auto",
    cache_dir: CacheDirOption = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measure merging, MD steps, scaling and memory on this machine, as ratios to what they are compared with.

    Everything that is compared is measured in turn within one run. Other packages take part by a file of --with.
    `gffmerge benchmark gnn` measures merges of graph networks for other tasks.
    """
    from ase_gffmerge.errors import BenchmarkError
    from ase_gffmerge.evaluation.benchmark.harness import (
        benchmark_table,
        load_rows,
        plot_scaling,
        run_benchmark,
    )

    for path in with_ or ():
        load_rows(path)
    if plot:
        require_outputs(plot=plot, overwrite=overwrite)
        if only and "scaling" not in only:
            raise BenchmarkError("--plot draws the row scaling, which --only leaves out; add --only scaling")
    sizes = {"sizes": atoms, "scaling": scaling}
    options = {name: tuple(values) for name, values in sizes.items() if values}
    with progress_bar("benchmark") as progress:
        bench = _make_bench(
            specialists or DEFAULT,
            device=device,
            dtype=dtype,
            cache_dir=cache_dir,
            steps=steps,
            repeats=repeats,
            compile=compile,
            progress=lambda fraction, text: progress(MERGE_SHARE * fraction, text),
            **options,
        )
        rows = run_benchmark(
            bench,
            only,
            progress=lambda fraction, text: progress(MERGE_SHARE + (1 - MERGE_SHARE) * fraction, text),
        )
    if plot:
        plot_scaling(rows, plot)
    machine = describe_machine(bench)
    if as_json:
        print_json(
            {"machine": machine, "rows": {name: [r.to_dict() for r in found] for name, found in rows.items()}}
        )
    else:
        print_table(benchmark_table(rows))
        typer.echo(", ".join(f"{key}: {value}" for key, value in machine.items() if value))


def benchmark_gnn(
    data: Annotated[
        Path,
        typer.Argument(
            help="Folder with cora.npz and citeseer.npz of shchur/gnn-benchmark.", show_default=False
        ),
    ],
    out: Annotated[
        Path, typer.Option(help="Folder of rows (a run goes on), table and plot.", show_default=False)
    ],
    tables: Annotated[
        list[str] | None,
        typer.Option(
            help="What is merged, such as 'Cora in two halves'; several values.", show_default="all"
        ),
    ] = None,
    kinds: Annotated[
        list[str] | None,
        typer.Option(
            help="Convolutions: GCN, SAGE, GAT, GIN, Transformer; several values.", show_default="all"
        ),
    ] = None,
    methods: Annotated[
        list[str] | None,
        typer.Option(
            help="Lines of the tables, such as gffmerge and 'gnnmerge++'; several values.", show_default="all"
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Splits and initialisations.")] = 3,
    epochs: Annotated[int, typer.Option(min=1, help="Of every training.")] = 80,
    as_json: JsonOption = False,
) -> None:
    """Train graph networks for different tasks, merge them by every method, and compare; a killed run goes on."""
    from ase_gffmerge.evaluation.benchmark.graph_networks import GraphBenchmark, markdown

    options = {"tables": tables, "kinds": kinds, "methods": methods}
    chosen = {name: tuple(values) for name, values in options.items() if values}
    bench = GraphBenchmark(data=data, out=out, seeds=seeds, epochs=epochs, **chosen)
    with progress_bar("graph networks") as progress:
        document = bench.run(progress)
    if as_json:
        print_json(document)
    else:
        typer.echo(markdown(document))
        note(f"written: {out} (gnnmerge.json, gnnmerge.md, gnnmerge.png)")


def _make_bench(
    sources: Sequence[str],
    *,
    device: str,
    dtype: DType,
    cache_dir: Path | None,
    progress: Progress,
    **options: Any,
) -> "Bench":
    """Load the specialists, merge several through the cache, and say how calculators are made."""
    from ase_gffmerge.engines.ase.calculator import GFFMergeCalculator
    from ase_gffmerge.errors import BenchmarkError
    from ase_gffmerge.evaluation.benchmark.harness import Bench
    from ase_gffmerge.integrations.load import load_force_field

    def from_files(count: int, progress: Progress = no_progress) -> GFFMergeCalculator:
        return GFFMergeCalculator(
            list(sources[:count]),
            device=device,
            dtype=dtype.value,
            compile=False,
            cache_dir=cache_dir,
            progress=progress,
        )

    def calculator(force_field: "ForceField", compiled: bool) -> "Calculator":
        return GFFMergeCalculator(force_field, device=device, dtype=dtype.value, compile=compiled)

    specialists = tuple(load_force_field(source) for source in sources)
    if not specialists[0].calibration:
        raise BenchmarkError(
            f"{specialists[0].name!r} has no calibration frames, so there is no structure to measure; "
            "name a specialist that has some"
        )
    force_field = from_files(len(sources), progress).force_field
    return Bench(
        specialists=specialists,
        force_field=force_field,
        calculator=calculator,
        from_files=from_files,
        **options,
    )


def describe_machine(bench: "Bench") -> dict[str, object]:
    """What the numbers were measured on."""
    import platform

    import torch

    potential = bench.force_field.potential
    gpu = torch.cuda.get_device_name(potential.device) if potential.device.type == "cuda" else None
    return {
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "force field": bench.force_field.name,
        "architecture": potential.architecture,
        "dtype": str(potential.dtype).removeprefix("torch."),
        "parameters": sum(p.numel() for p in potential.parameters()),
    }
