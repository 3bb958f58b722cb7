"""``gffmerge convert``: another package's force field becomes a specialist, and back."""

from pathlib import Path
from typing import Annotated

import typer

from ase_gffmerge.cli.options import DeviceOption, JsonOption, OverwriteOption, load_specialists
from ase_gffmerge.cli.output import note, print_json, require_outputs


def convert(
    source: Annotated[
        str,
        typer.Argument(
            help="vendor:file, such as chgnet:fine-tuned.pth.tar, or a .safetensors file.", show_default=False
        ),
    ],
    out: Annotated[
        Path,
        typer.Argument(
            help="A .safetensors file; with any other ending, the package's own format.", show_default=False
        ),
    ],
    calibration: Annotated[
        str | None,
        typer.Option(
            help="Frames that the force field knows, for merging, labels not needed: a file, or sample:FILE to let it make "
            "them by its own dynamics from structures in a file."
        ),
    ] = None,
    frames: Annotated[int, typer.Option(help="How many of them are kept.", min=1)] = 100,
    name: Annotated[
        str | None, typer.Option(help="Name of the specialist.", show_default="of the file")
    ] = None,
    level_of_theory: Annotated[
        str | None, typer.Option(help="Of its labels, for example PBE; different ones are not merged.")
    ] = None,
    trust: Annotated[
        bool, typer.Option("--trust", help="Load a file that executes code: only one of your own.")
    ] = False,
    device: DeviceOption = "auto",
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Make a specialist of another package's force field, or write that package's format."""
    from ase_gffmerge.data.frames import bare, calibration_frames
    from ase_gffmerge.integrations.load import export, format_of, load_force_field
    from ase_gffmerge.sampling.on_request import file_of_frames

    frames_file = None if calibration is None else file_of_frames(calibration)
    require_outputs(model=out, inputs=[source, frames_file], overwrite=overwrite)
    specialist = load_force_field(source, trust=trust, name=name, level_of_theory=level_of_theory)
    if adapter := format_of(out, specialist.potential.architecture):
        adapter.require_exportable(specialist.potential)
    if calibration is not None:
        found = load_specialists([specialist], [calibration], device=device)[0].calibration
        chosen = calibration_frames(found, min(frames, len(found)), seed=0)
        specialist = specialist.with_calibration([bare(atoms) for atoms in chosen])
    export(specialist, out) if adapter else specialist.save(out)
    if as_json:
        facts = {"out": str(out), "name": specialist.name, "architecture": specialist.potential.architecture}
        print_json({**facts, "origin": specialist.provenance.origin, "frames": len(specialist.calibration)})
        return
    note(
        f"written: {out} ({specialist.potential.architecture}, {len(specialist.calibration)} calibration frames)"
    )
