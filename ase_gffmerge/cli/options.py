"""Options that several verbs share, how they are parsed, and the structures they stand for."""

import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from ase import Atoms

    from ase_gffmerge.forcefield.force_field import ForceField


class DType(StrEnum):
    """Floating-point types of a network."""

    float32 = "float32"
    float64 = "float64"


class Conditioning(StrEnum):
    """How a merged potential tells specialists apart."""

    shared = "shared"
    per_specialist = "per-specialist"


class CoreRepulsionChoice(StrEnum):
    """Whether a force field gets a core repulsion."""

    auto = "auto"
    none = "none"


class ExecutorKind(StrEnum):
    """Where workers run."""

    local = "local"
    dask = "dask"
    slurm = "slurm"


def positive(value: float) -> float:
    """Callback of options that must be positive and finite."""
    if not 0 < value < math.inf:
        raise typer.BadParameter(f"{value:g} is not positive and finite.")
    return value


ModelArgument = Annotated[
    str,
    typer.Argument(help="Force-field file, vendor:checkpoint, or a bundled name.", show_default=False),
]
SpecialistsArgument = Annotated[
    list[str],
    typer.Argument(
        help="Files, vendor:checkpoint (as chgnet:a.pth.tar), or bundled names.", show_default=False
    ),
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
FixOption = Annotated[
    str | None, typer.Option(help="Atoms that do not move, counted from 0, for example 0-35,40.")
]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
MaxMemoryOption = Annotated[
    str | None,
    typer.Option(
        help="Most memory to take, such as 4GB.", show_default="$GFFMERGE_MAX_MEMORY, else no bound"
    ),
]
SpecialistOption = Annotated[
    str | None, typer.Option(help="Which specialist the structure belongs to (per-specialist conditioning).")
]
DispersionOption = Annotated[
    str | None,
    typer.Option(help="Add a D3 correction, damping:functional, for example d3bj:pbe.", show_default="none"),
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


WORKERS = "Workers"
WorkersOption = Annotated[
    int | None,
    typer.Option(
        help="Share the work out among so many processes.",
        min=1,
        show_default="this process alone",
        rich_help_panel=WORKERS,
    ),
]
ExecutorOption = Annotated[
    ExecutorKind | None,
    typer.Option(
        help="Where they run: on this machine, under Dask (on the cluster that $DASK_SCHEDULER_ADDRESS names, else on this "
        "machine), or one in each Slurm job (options of a job: dask-jobqueue's configuration file).",
        show_default="local",
        rich_help_panel=WORKERS,
    ),
]


@contextmanager
def opened_workers(workers: int | None, executor: ExecutorKind | None) -> "Iterator[Executor | None]":
    """Executor that the options ask for; ``None`` for this process alone."""
    if workers is None and executor is None:
        yield None
        return
    from ase_gffmerge.runtime.executors import n_cores, open_executor

    with open_executor((executor or ExecutorKind.local).value, workers or n_cores()) as opened:
        yield opened


CalibrationOption = Annotated[
    list[str] | None,
    typer.Option(
        help="Frames that a specialist knows, labels not needed: for each, in order, a file; sample:FILE, to let it make "
        "them by its own dynamics from structures in a file; sample, from those it holds; own, for those it holds. Several "
        "values.",
        show_default="own",
    ),
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


def load_specialists(
    sources: "Sequence[str | ForceField]", calibration: Sequence[str] | None, *, device: str
) -> "list[ForceField]":
    """Load specialists with the frames that ``--calibration`` names; what is to be sampled runs here.

    Parameters
    ----------
    sources
        What is loaded, or was.
    calibration
        As in :data:`CalibrationOption`.
    device
        Where dynamics run.
    """
    from ase_gffmerge.cli.output import note
    from ase_gffmerge.integrations.load import as_force_field
    from ase_gffmerge.runtime.devices import resolve_device
    from ase_gffmerge.runtime.progress import progress_bar
    from ase_gffmerge.sampling.on_request import SampledLater, sampled, with_frames

    if not calibration:
        return [as_force_field(source) for source in sources]
    entries = [None if entry == "own" else entry for entry in calibration]
    given = with_frames(sources, "sample" if entries == ["sample"] else entries)
    with progress_bar("sampling") as progress:
        loaded = sampled(given, resolve_device(device), progress)
    for before, after in zip(given, loaded, strict=True):
        if isinstance(before, SampledLater):
            note(f"{after.name}: {len(after.calibration)} calibration frames sampled")
    return loaded


def read_structures(path: Path, *, first: bool = True) -> "list[Atoms]":
    """First frame, or all frames, of any file ASE reads, or of an npz archive, without labels."""
    from ase_gffmerge.data.readers import read_frames
    from ase_gffmerge.errors import FramesError

    frames = [atoms.copy() for atoms in (read_frames(path, index=0)[:1] if first else read_frames(path))]
    if not all(len(atoms) for atoms in frames):
        raise FramesError(f"{path} holds a structure without atoms; give one with at least one")
    return frames


def prepared_frames(
    model: str,
    structure: Path,
    *,
    device: str,
    dtype: str,
    specialist: str | None,
    dispersion: str | None,
    first: bool,
) -> "list[Atoms]":
    """Read structures and attach the model as their calculators; elements that it does not know are refused.

    Parameters
    ----------
    model
        What is loaded.
    structure
        File of the structures.
    device, dtype
        Of the network.
    specialist
        Which specialist the structures belong to, if that must be said.
    dispersion
        As in :class:`.GFFMergeCalculator`.
    first
        Whether only the first one is wanted.
    """
    from ase_gffmerge.engines.ase.calculator import GFFMergeCalculator

    frames = read_structures(structure, first=first)
    calculator = GFFMergeCalculator(
        [model],
        device=device,
        dtype=dtype,  # type: ignore[arg-type]
        specialist=specialist,
        dispersion=dispersion,
    )
    for k, atoms in enumerate(frames):
        atoms.calc = calculator if k == 0 else calculator.spawn()
    return frames


def fix_atoms(atoms: "Atoms", which: str | None) -> None:
    """Hold atoms where they are: ``which`` lists indices and ranges, such as ``0-35,40``."""
    if which is None:
        return
    from ase.constraints import FixAtoms

    from ase_gffmerge.errors import ArgumentError

    indices: set[int] = set()
    for part in which.split(","):
        first, _, last = part.strip().partition("-")
        if not (first.isdecimal() and (last or first).isdecimal() and int(last or first) < len(atoms)):
            raise ArgumentError(
                f"--fix {which}: {part.strip()!r} is no atom or range of the {len(atoms)} atoms; count from 0, as in 0-35,40"
            )
        indices.update(range(int(first), int(last or first) + 1))
    atoms.set_constraint([*atoms.constraints, FixAtoms(sorted(indices))])
