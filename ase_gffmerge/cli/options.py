"""Options that several verbs share."""

import math
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class DType(StrEnum):
    """Floating-point types of a network."""

    float32 = "float32"
    float64 = "float64"


class Conditioning(StrEnum):
    """How a merged potential tells specialists apart."""

    shared = "shared"
    per_specialist = "per-specialist"


def positive(value: float) -> float:
    """Callback of options that must be positive and finite."""
    if not 0 < value < math.inf:
        raise typer.BadParameter(f"{value:g} is not positive and finite.")
    return value


ModelArgument = Annotated[
    str, typer.Argument(help="Force-field file, or a bundled name.", show_default=False)
]
StructureArgument = Annotated[
    Path, typer.Argument(help="Structure: any file ASE reads, or frames (the first one).", show_default=False)
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
SpecialistOption = Annotated[
    str | None, typer.Option(help="Which specialist the structure belongs to (per-specialist conditioning).")
]
EnergyKey = Annotated[
    str | None,
    typer.Option(
        "--energy-key", help="Name of the energies in the frames, e.g. REF_energy; auto: look for one."
    ),
]
ForcesKey = Annotated[str | None, typer.Option("--forces-key", help="The same for forces.")]
StressKey = Annotated[
    str | None, typer.Option("--stress-key", help="The same for stresses (eV/Å³), or virials (eV).")
]
