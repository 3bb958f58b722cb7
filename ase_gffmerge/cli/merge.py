"""``gffmerge merge``: several specialists become one potential."""

from pathlib import Path
from typing import Annotated

import typer

from ase_gffmerge.cli.options import (
    CalibrationOption,
    Conditioning,
    CoreRepulsionChoice,
    DeviceOption,
    JsonOption,
    MaxMemoryOption,
    OverwriteOption,
    SpecialistsArgument,
    load_specialists,
)
from ase_gffmerge.cli.output import note, print_json, recipe_for, require_outputs
from ase_gffmerge.runtime.progress import is_first, progress_bar


def merge(
    specialists: SpecialistsArgument,
    out: Annotated[
        Path,
        typer.Option(
            help="Merged file to write (.safetensors); with any other ending, the format of the specialists' package.",
            show_default=False,
        ),
    ],
    calibration: CalibrationOption = None,
    recipe: Annotated[
        str, typer.Option(help="gffmerge, closed-form, fast, paper, mean, or a YAML file.")
    ] = "gffmerge",
    base: Annotated[
        str | None,
        typer.Option(
            help="Common ancestor: file, bundled name, or vendor:name.",
            show_default="found by its fingerprint, if bundled or in an installed package",
        ),
    ] = None,
    conditioning: Annotated[
        Conditioning | None,
        typer.Option(help="One surface, or one per specialist.", show_default="of the recipe"),
    ] = None,
    core_repulsion: Annotated[
        CoreRepulsionChoice | None,
        typer.Option(
            help="Let atoms repel each other that are closer than in any calibration frame.",
            show_default="of the recipe: auto",
        ),
    ] = None,
    keep_base: Annotated[
        bool,
        typer.Option(
            "--keep-base",
            help="Keep what the base knew: it joins with structures of many compounds (keep_base: N in a recipe: how many).",
        ),
    ] = False,
    device: DeviceOption = "auto",
    allow_unrelated: Annotated[
        bool, typer.Option("--allow-unrelated", help="Merge specialists without a common base.")
    ] = False,
    exportable: Annotated[
        bool,
        typer.Option(
            "--exportable",
            help="Keep to what the format of the specialists' package can hold: a plain readout, one surface.",
        ),
    ] = False,
    weights: Annotated[
        str | None, typer.Option(help="Say of each specialist, in order: 1,2.", show_default="equal")
    ] = None,
    closed_loop: Annotated[
        int,
        typer.Option(help="Rounds of merging again with frames from the merged potential's own dynamics."),
    ] = 0,
    max_memory: MaxMemoryOption = None,
    loop_temperature: Annotated[float, typer.Option(help="Of that dynamics, K.")] = 500.0,
    report: Annotated[Path | None, typer.Option(help="Also write the report as a web page (HTML).")] = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Merge specialists by least squares and write one potential with its report.

    A killed merge continues when the same command is run again. Several processes share one merge when torchrun starts them:
    torchrun --nproc-per-node 2 -m ase_gffmerge merge A B --out C.
    """
    from ase_gffmerge.integrations.load import load_force_field, write_force_field
    from ase_gffmerge.merging.recipe import ClosedLoopOptions, load_recipe
    from ase_gffmerge.merging.report_plot import save_html
    from ase_gffmerge.runtime.distributed import sharing
    from ase_gffmerge.runtime.memory import memory_bound
    from ase_gffmerge.sampling.on_request import file_of_frames
    from ase_gffmerge.storage.documents import validated
    from ase_gffmerge.training.checkpoint import checkpoint_path
    from ase_gffmerge.workflows.memory import estimate_memory
    from ase_gffmerge.workflows.merge import merge as merge_specialists
    from ase_gffmerge.workflows.merge import with_base

    if exportable and conditioning == Conditioning.per_specialist:
        raise typer.BadParameter(
            "--exportable keeps to one surface; leave --conditioning per-specialist out."
        )
    loop = {"rounds": closed_loop, "temperature": loop_temperature}
    chosen = load_recipe(
        recipe,
        conditioning=conditioning.value if conditioning else None,
        weights=parse_weights(weights),
        allow_unrelated=allow_unrelated or None,
        core_repulsion=core_repulsion.value if core_repulsion else None,
        closed_loop=validated(ClosedLoopOptions, loop, source="--closed-loop") if closed_loop else None,
    )
    frames = map(file_of_frames, calibration or ())
    require_outputs(report, model=out, inputs=[*specialists, *frames, base], overwrite=overwrite)
    given = [load_force_field(source) for source in specialists]
    chosen = recipe_for(out, given, chosen, exportable=exportable)
    if keep_base:
        chosen = load_recipe(chosen, keep_base=chosen.keep_base or True)
    with sharing(), progress_bar("merging") as progress:
        loaded = load_specialists(given, calibration, device=device)
        ancestor, joined, inner = load_force_field(base) if base else None, loaded, chosen
        if chosen.keep_base:
            joined, inner, ancestor = with_base(loaded, chosen, ancestor)
        kept, bound = bool(chosen.keep_base), memory_bound(max_memory)
        note(str(estimate_memory(joined, inner, device=device, bound=bound, base_joined=kept)))
        merged, result = merge_specialists(
            loaded,
            chosen,
            base=ancestor,
            checkpoint=checkpoint_path(out),
            device=device,
            max_memory=max_memory,
            progress=progress,
        )
    if not is_first():
        return
    write_force_field(merged, out)
    if report:
        save_html(merged, report)
    if as_json:
        print_json({"out": str(out), **result.to_dict()})
        return
    typer.echo(result.summary())
    note(f"written: {', '.join(str(path) for path in (out, report) if path)}")


def parse_weights(text: str | None) -> tuple[float, ...] | None:
    """Numbers separated by commas."""
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"weights {text!r} are not numbers with commas, such as 1,2.") from None
