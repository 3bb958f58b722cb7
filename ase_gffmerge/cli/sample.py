"""``gffmerge sample``: calibration frames from a specialist and a few structures."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ase_gffmerge.cli.options import (
    DeviceOption,
    ExecutorOption,
    JsonOption,
    OverwriteOption,
    WorkersOption,
    opened_workers,
)
from ase_gffmerge.cli.output import note, print_json, print_values, require_outputs
from ase_gffmerge.runtime.progress import progress_bar

if TYPE_CHECKING:
    from ase_gffmerge.sampling.calibration_frames import SampleResult


def sample(
    specialist: Annotated[str, typer.Argument(help="File or bundled name.", show_default=False)],
    structures: Annotated[
        list[Path], typer.Argument(help="Files ASE reads; all their frames are starts.", show_default=False)
    ],
    out: Annotated[Path | None, typer.Option(help="Frames to write (.extxyz).", show_default=False)] = None,
    attach: Annotated[
        Path | None, typer.Option(help="Force field to write with these calibration frames (.safetensors).")
    ] = None,
    frames: Annotated[int, typer.Option(help="Frames wanted.", min=1)] = 100,
    temperatures: Annotated[
        list[float] | None, typer.Option(help="Ladder in K; several values.", show_default="300 500 700")
    ] = None,
    time: Annotated[
        float, typer.Option(help="Longest time that a replica gives frames, after equilibration, ps.")
    ] = 5.0,
    copies: Annotated[int, typer.Option(help="Replicas per structure and temperature.", min=1)] = 2,
    relax: Annotated[
        bool, typer.Option("--relax/--no-relax", help="Cool the structures to rest first.")
    ] = True,
    seed: Annotated[int, typer.Option(help="Of velocities, thermostat and displacements.")] = 0,
    device: DeviceOption = "auto",
    workers: WorkersOption = None,
    executor: ExecutorOption = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Sample calibration frames by molecular dynamics with the specialist itself; no data set is needed.

    Broken, overlapping or overheated structures are refused and counted; a fifth of the frames are displaced copies.
    """
    from ase_gffmerge.data.readers import read_frames
    from ase_gffmerge.integrations.load import load_force_field
    from ase_gffmerge.runtime.devices import resolve_device
    from ase_gffmerge.sampling.calibration_frames import SampleOptions, sample_frames
    from ase_gffmerge.storage.documents import validated

    given: dict[str, Any] = {"n": frames, "time": time, "copies": copies, "relax": relax, "seed": seed}
    if temperatures:
        given["temperatures"] = temperatures
    options = validated(SampleOptions, given, source="gffmerge sample")
    check_names(out, attach)
    require_outputs(out, attach, inputs=[*structures, specialist], overwrite=overwrite)
    force_field = load_force_field(specialist).to(device=resolve_device(device))
    starts = [atoms for path in structures for atoms in read_frames(path)]
    with opened_workers(workers, executor) as opened, progress_bar("sampling") as progress:
        try:
            result = sample_frames(force_field, starts, options, executor=opened, progress=progress)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                "interrupted; nothing was written; the same command begins again"
            ) from None
    if out:
        write_extxyz(out, result)
    if attach:
        force_field.with_calibration(result.frames).save(attach)
    _report(result, {"out": out, "attached": attach}, as_json=as_json)


def check_names(out: Path | None, attach: Path | None) -> None:
    """Refuse a run whose result has nowhere to go, or would get a name of another format."""
    from ase_gffmerge.errors import FileFormatError

    if out is None and attach is None:
        raise FileFormatError(
            "the frames have nowhere to go: give --out frames.extxyz or --attach file.safetensors"
        )
    for path, suffixes in ((out, (".xyz", ".extxyz")), (attach, (".safetensors",))):
        if path and path.suffix not in suffixes:
            raise FileFormatError(f"cannot write {path}: its name must end in {' or '.join(suffixes)}")


def write_extxyz(out: Path, result: "SampleResult") -> None:
    """Write all frames atomically."""
    from ase.io import write

    from ase_gffmerge.storage.tensor_file import atomic_write

    atomic_write(out, lambda temporary: write(temporary, list(result.frames), format="extxyz"))


def _report(result: "SampleResult", written: dict[str, Path | None], *, as_json: bool) -> None:
    """Print what was found."""
    document = {**result.to_dict(), **{key: str(path) for key, path in written.items() if path}}
    if as_json:
        print_json(document)
        return
    for key, counts in (("sources", result.sources), ("rejected", result.rejected)):
        document[key] = ", ".join(f"{count} {name}" for name, count in counts.items()) or "none"
    print_values({LABELS.get(key, key): value for key, value in document.items()})
    if len(result.frames) < result.wanted:
        note(f"only {len(result.frames)} of {result.wanted} frames: allow a longer --time, or more --copies")


LABELS = {
    "decorrelation_fs": "decorrelation time (fs)",
    "simulated_ps": "simulated (ps)",
    "n_frames": "frames",
}
