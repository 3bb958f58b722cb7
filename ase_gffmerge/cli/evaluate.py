"""``gffmerge evaluate``: errors of a force field on labelled frames."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ase_gffmerge.cli.options import DeviceOption, JsonOption, ModelArgument, SpecialistOption
from ase_gffmerge.cli.output import print_json, print_table

if TYPE_CHECKING:
    from ase_gffmerge.specialist import Specialist

UNITS = {"force_mae": "eV/Å", "force_rmse": "eV/Å", "energy_mae": "eV/atom"}


def evaluate(
    model: ModelArgument,
    frames: Annotated[Path, typer.Argument(help="Labelled frames: extxyz, npz, ...", show_default=False)],
    specialist: SpecialistOption = None,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Print force MAE and RMSE (eV/Å), energy MAE (eV/atom) and the number of frames."""
    from ase_gffmerge.accuracy import evaluate as errors_of
    from ase_gffmerge.data.readers import read_frames, require_labels
    from ase_gffmerge.device import resolve_device
    from ase_gffmerge.sources import load

    target = resolve_device(device)
    force_field = load(model).to(device=target)
    labelled = read_frames(frames)
    require_labels(labelled, frames)
    index = specialist_index(force_field, specialist)
    errors = errors_of(force_field.potential, labelled, specialist=index).to_dict()
    if as_json:
        print_json(errors)
        return
    print_table({f"{key} ({UNITS[key]})" if key in UNITS else key: value for key, value in errors.items()})


def specialist_index(force_field: "Specialist", name: str | None) -> int:
    """Index of a specialist of a potential with one embedding each; 0 for any other potential."""
    from ase_gffmerge.errors import StructureError

    if force_field.potential.hyper.n_embeddings == 1:
        if name is not None:
            raise StructureError(
                f"--specialist {name} has no effect: {force_field.name!r} has one surface for all"
            )
        return 0
    parents = force_field.merged.parents if force_field.merged else ()
    if name not in parents:
        said = "--specialist is missing" if name is None else f"there is no specialist {name!r}"
        raise StructureError(f"{said}: {force_field.name!r} was merged from {', '.join(parents)}; name one")
    return parents.index(name)
