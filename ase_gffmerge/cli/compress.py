"""``gffmerge compress``: a force field with fewer channels and blocks, by least squares."""

from pathlib import Path
from typing import Annotated

import typer

from ase_gffmerge.cli.options import DeviceOption, JsonOption, OverwriteOption
from ase_gffmerge.cli.output import note, print_json, require_outputs
from ase_gffmerge.runtime.progress import progress_bar


def compress(
    source: Annotated[str, typer.Argument(help="A file or a bundled name.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Smaller file to write (.safetensors).", show_default=False)],
    channels: Annotated[
        int, typer.Option(help="Scalar features per atom that are kept.", show_default=False)
    ],
    blocks: Annotated[
        int | None, typer.Option(help="Interaction blocks that are kept.", show_default="all")
    ] = None,
    calibration: Annotated[
        list[str] | None,
        typer.Option(help="More typical structures, labels not needed: files; several values."),
    ] = None,
    recipe: Annotated[
        str,
        typer.Option(
            help="A YAML file of a merge recipe: readout, derivatives, ridge.",
            show_default="of a compression",
        ),
    ] = "",
    device: DeviceOption = "auto",
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Leave out channels and blocks of a force field and solve what remains; nothing is trained, no labels are read."""
    from ase_gffmerge.data.readers import read_frames
    from ase_gffmerge.integrations.load import format_of, load_force_field, write_force_field
    from ase_gffmerge.merging.compress import RECIPE
    from ase_gffmerge.merging.compress import compress as compress_force_field
    from ase_gffmerge.merging.recipe import load_recipe

    chosen = load_recipe(recipe) if recipe else RECIPE
    require_outputs(model=out, inputs=[source, *(calibration or ())], overwrite=overwrite)
    loaded = load_force_field(source)
    if adapter := format_of(out, loaded.potential.architecture):
        adapter.require_exportable(loaded.potential)
    frames = [atoms for path in calibration or () for atoms in read_frames(Path(path))]
    with progress_bar("compressing") as progress:
        compressed, report = compress_force_field(
            loaded,
            channels=channels,
            blocks=blocks,
            frames=frames,
            recipe=chosen,
            device=device,
            progress=progress,
        )
    write_force_field(compressed.to(device="cpu"), out)
    if as_json:
        print_json({"out": str(out), **report.to_dict()})
        return
    typer.echo(report.summary())
    note(f"written: {out}")
