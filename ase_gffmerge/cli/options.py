"""Options that several verbs share, how they are parsed, and the structures they stand for."""

import math
from collections.abc import Collection, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

if TYPE_CHECKING:
    from ase import Atoms


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
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace files that exist.")]
CacheDirOption = Annotated[
    Path | None,
    typer.Option(
        help="Folder of merged force fields.", show_default="$GFFMERGE_CACHE, else the user's cache"
    ),
]
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


class VariadicCommand(TyperCommand):
    """A verb whose repeatable options may be followed by several values, once its arguments have come first."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Repeat the options, then parse as usual."""
        repeatable = {
            text for option in self.params if getattr(option, "multiple", False) for text in option.opts
        }
        return super().parse_args(ctx, spread(args, repeatable))


def spread(arguments: Sequence[str], repeatable: Collection[str]) -> list[str]:
    """Write an option of ``repeatable`` before each of its values; leaves a line that begins with an option alone."""
    if not arguments or arguments[0].startswith("-"):
        return list(arguments)
    result: list[str] = []
    option = None
    for argument in arguments:
        if argument.startswith("-"):
            option = argument if argument in repeatable else None
        elif option and result[-1] != option:
            result.append(option)
        result.append(argument)
    return result


def read_structure(path: Path) -> "Atoms":
    """First frame of any file ASE reads, or of an npz archive, without its labels."""
    from ase_gffmerge.data.readers import read_frames
    from ase_gffmerge.errors import FramesError

    atoms = read_frames(path, index=0)[0].copy()
    if len(atoms) == 0:
        raise FramesError(f"{path} holds a structure without atoms; give one with at least one")
    return atoms


def prepared(model: str, structure: Path, *, device: str, dtype: str, specialist: str | None) -> "Atoms":
    """Read the structure and attach the model as its calculator; elements that it does not know are refused.

    Parameters
    ----------
    model
        What is loaded.
    structure
        File of the structure.
    device, dtype
        Of the network.
    specialist
        Which specialist the structure belongs to, if that must be said.
    """
    from ase_gffmerge.engines.ase.calculator import GFFMergeCalculator

    atoms = read_structure(structure)
    atoms.calc = GFFMergeCalculator([model], device=device, dtype=dtype, specialist=specialist)  # type: ignore[arg-type]
    return atoms
