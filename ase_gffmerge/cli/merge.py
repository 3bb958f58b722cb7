"""``gffmerge merge``: several specialists become one potential."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ase_gffmerge.cli.options import Conditioning, DeviceOption, JsonOption
from ase_gffmerge.cli.output import note, print_json, progress_bar
from ase_gffmerge.cli.structures import require_other
from ase_gffmerge.runtime.progress import Progress

if TYPE_CHECKING:
    from ase_gffmerge.forcefield.force_field import ForceField
    from ase_gffmerge.merging.recipe import Recipe
    from ase_gffmerge.merging.report import MergeReport
    from ase_gffmerge.workflows.active_learning import ClosedLoopResult


def merge(
    specialists: Annotated[list[str], typer.Argument(help="Files or bundled names.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Merged file to write (.safetensors).", show_default=False)],
    recipe: Annotated[str, typer.Option(help="gffmerge, paper, mean, or a YAML file.")] = "gffmerge",
    conditioning: Annotated[
        Conditioning | None, typer.Option(help="One surface, or one per specialist [default: of the recipe].")
    ] = None,
    device: DeviceOption = "auto",
    allow_unrelated: Annotated[
        bool, typer.Option("--allow-unrelated", help="Merge specialists without a common base.")
    ] = False,
    weights: Annotated[
        str | None, typer.Option(help="Say of each specialist, in order: 1,2 [default: equal].")
    ] = None,
    closed_loop: Annotated[
        int,
        typer.Option(help="Rounds of merging again with frames from the merged potential's own dynamics."),
    ] = 0,
    loop_temperature: Annotated[float, typer.Option(help="Of that dynamics, K.")] = 500.0,
    report: Annotated[Path | None, typer.Option(help="Also write the report as a web page (HTML).")] = None,
    as_json: JsonOption = False,
) -> None:
    """Merge specialists by least squares and write one potential with its report."""
    from ase_gffmerge.integrations.load import load_force_field
    from ase_gffmerge.merging.recipe import load_recipe
    from ase_gffmerge.storage.atomic import require_writable

    chosen = load_recipe(
        recipe,
        conditioning=conditioning.value if conditioning else None,
        weights=parse_weights(weights),
        allow_unrelated=allow_unrelated or None,
    )
    loaded = [load_force_field(source) for source in specialists]
    for path in filter(None, (out, report)):
        require_other(path, specialists)
        require_writable(path)
    with progress_bar("merging") as progress:
        merged, result, loop = solve(
            loaded, chosen, rounds=closed_loop, temperature=loop_temperature, device=device, progress=progress
        )
    merged.save(out)
    if report:
        result.save_html(report)
    if as_json:
        print_json({"out": str(out), **result.to_dict()} | ({"closed_loop": loop.to_dict()} if loop else {}))
        return
    typer.echo(result.summary())
    if loop:
        typer.echo(loop.summary())
    note(f"written: {', '.join(str(path) for path in (out, report) if path)}")


def solve(
    specialists: "Sequence[ForceField]",
    recipe: "Recipe",
    *,
    rounds: int,
    temperature: float,
    device: str,
    progress: Progress,
) -> "tuple[ForceField, MergeReport, ClosedLoopResult | None]":
    """Merge as the recipe says, or with a loop of so many rounds; the loop, where nothing follows it."""
    from ase_gffmerge.merging.loop_options import ClosedLoopOptions
    from ase_gffmerge.storage.documents import validated

    if rounds:
        given = {"rounds": rounds, "temperature": temperature}
        options = validated(ClosedLoopOptions, given, source="gffmerge merge --closed-loop")
        recipe = recipe.model_copy(update={"closed_loop": options})
    if recipe.closed_loop is None or recipe.refine is not None:
        from ase_gffmerge.workflows.merge_and_distill import merge_and_refine

        return *merge_and_refine(specialists, recipe, device=device, progress=progress), None
    from ase_gffmerge.workflows.active_learning import closed_loop

    result = closed_loop(specialists, recipe, device=device, progress=progress)
    return result.merged, result.report, result


def parse_weights(text: str | None) -> tuple[float, ...] | None:
    """Numbers separated by commas."""
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"weights {text!r} are not numbers with commas, such as 1,2.") from None
