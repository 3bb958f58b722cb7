"""``gffmerge export``: a file that another engine reads."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ase_gffmerge.cli.options import DType, JsonOption, ModelArgument, OverwriteOption, SpecialistOption
from ase_gffmerge.cli.output import note, print_json, require_outputs


class Engine(StrEnum):
    """Engines that read a file of their own."""

    lammps = "lammps"


def export(
    model: ModelArgument,
    to: Annotated[Engine, typer.Option(help="Engine that is to read it.", show_default=False)],
    out: Annotated[
        Path, typer.Option(help="lammps: FILE.pt for pair_style mliap unified FILE.pt 0.", show_default=False)
    ],
    dtype: Annotated[DType, typer.Option(help="Of the network.")] = DType.float32,
    specialist: SpecialistOption = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write a force field for another engine: LAMMPS with ML-IAP (without it there is gffmerge lammps).

    The file needs this package, and the one whose network it may hold, where it is read.
    """
    import torch

    from ase_gffmerge.engines.lammps.mliap import MLIAPModel, write_model
    from ase_gffmerge.integrations.load import load_force_field

    require_outputs(out, inputs=[model], overwrite=overwrite)
    force_field = load_force_field(model, dtype=getattr(torch, dtype.value))
    written = MLIAPModel(force_field, specialist=specialist)
    write_model(written, out)
    if as_json:
        facts = {"out": str(out), "engine": to.value, "elements": written.element_types}
        print_json({**facts, "cutoff": force_field.cutoff, "dtype": dtype.value})
        return
    note(
        f"written: {out}; pair_coeff * * takes the elements of your atom types, of {' '.join(written.element_types)}"
    )
