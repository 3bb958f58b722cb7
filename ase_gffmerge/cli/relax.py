"""``gffmerge relax``: geometry optimisation, with or without the cell."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ase_gffmerge.cli.options import (
    DeviceOption,
    DType,
    JsonOption,
    ModelArgument,
    OverwriteOption,
    SpecialistOption,
    StructureArgument,
    positive,
    prepared,
)
from ase_gffmerge.cli.output import note, print_json, print_values, progress_bar, require_outputs

if TYPE_CHECKING:
    from ase import Atoms


class Optimizer(StrEnum):
    """Optimisers of ASE."""

    bfgs = "bfgs"
    fire = "fire"


def relax(
    model: ModelArgument,
    structure: StructureArgument,
    out: Annotated[
        Path, typer.Option(help="Structure to write, in a format that ASE reads.", show_default=False)
    ],
    fmax: Annotated[float, typer.Option(help="Largest force at the end, eV/Å.", callback=positive)] = 0.01,
    steps: Annotated[int, typer.Option(help="Largest number of steps.", min=1)] = 1000,
    cell: Annotated[bool, typer.Option("--cell", help="Relax the cell as well.")] = False,
    optimizer: Annotated[Optimizer, typer.Option(help="bfgs or fire.")] = Optimizer.bfgs,
    dtype: Annotated[DType, typer.Option(help="Of the network.")] = DType.float64,
    device: DeviceOption = "auto",
    specialist: SpecialistOption = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Relax a structure; exit code 1 when it did not converge (the structure is written)."""
    file_format = output_format(out)
    require_outputs(out, inputs=[structure, model], overwrite=overwrite)
    atoms = prepared(model, structure, device=device, dtype=dtype.value, specialist=specialist)
    check_cell(atoms, cell)
    before = energy(atoms)
    try_format(atoms, file_format)
    taken, converged = _optimise(atoms, cell=cell, optimizer=optimizer, fmax=fmax, steps=steps)
    _write_structure(atoms, out, file_format)
    document: dict[str, object] = {
        "converged": converged,
        "steps": taken,
        "energy": energy(atoms),
        "energy_gain": before - energy(atoms),
        "max_force": float((atoms.get_forces() ** 2).sum(axis=1).max() ** 0.5),
        "volume": float(atoms.cell.volume) if cell else None,
        "out": str(out),
    }
    print_json(document) if as_json else print_values({k: v for k, v in document.items() if v is not None})
    if not converged:
        note(f"gffmerge: not converged to {fmax:g} eV/Å in {taken} steps; allow more --steps")
        raise typer.Exit(1)


def _optimise(
    atoms: "Atoms", *, cell: bool, optimizer: Optimizer, fmax: float, steps: int
) -> tuple[int, bool]:
    """Relax ``atoms`` in place; returns the number of steps and whether it converged."""
    from ase.filters import FrechetCellFilter
    from ase.optimize import BFGS, FIRE

    target = FrechetCellFilter(atoms) if cell else atoms
    algorithm = {Optimizer.bfgs: BFGS, Optimizer.fire: FIRE}[optimizer]
    with progress_bar("relaxing") as progress, algorithm(target, logfile=None) as run:
        run.attach(lambda: progress(run.nsteps / steps, f"step {run.nsteps}  E {energy(atoms):.5f} eV"))
        converged = run.run(fmax=fmax, steps=steps)
        return run.nsteps, bool(converged)


def energy(atoms: "Atoms") -> float:
    """Potential energy in eV."""
    return float(atoms.get_potential_energy())


def check_cell(atoms: "Atoms", cell: bool) -> None:
    """Refuse ``--cell`` for structures that are not periodic in three directions."""
    from ase_gffmerge.errors import StructureError

    if cell and not (atoms.pbc.all() and atoms.cell.rank == 3):
        raise StructureError(
            f"--cell needs a structure periodic in three directions; {atoms.get_chemical_formula()} has "
            f"pbc {atoms.pbc.tolist()} and {atoms.cell.rank} cell vectors; leave --cell out"
        )


def output_format(out: Path) -> str:
    """ASE's name of the format of ``out``; refuses what is no file of structures, and folders that cannot be written."""
    from ase.io.formats import UnknownFileTypeError, filetype, get_compression, ioformats

    from ase_gffmerge.errors import FileFormatError
    from ase_gffmerge.storage.atomic import require_writable

    try:
        name = filetype(str(out), read=False)
    except UnknownFileTypeError:
        name = ""
    both_ways = name in ioformats and ioformats[name].can_write and ioformats[name].can_read
    if not both_ways or name in DATABASES or get_compression(str(out))[1]:
        raise FileFormatError(
            f"cannot write the structure to {out}: that is no file of structures that ASE writes and reads again, but of an "
            f"unknown kind, or a picture, a database or compressed; {USABLE}"
        )
    require_writable(out)
    return "extxyz" if name == "xyz" else name


DATABASES = ("db", "mysql", "postgresql")
USABLE = "use .xyz, .extxyz, .cif or .traj"


def try_format(atoms: "Atoms", file_format: str) -> None:
    """Refuse a format that cannot hold the structure: before it is relaxed, not after."""
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as folder:
        _write_structure(atoms, Path(folder, "structure"), file_format)


def _write_structure(atoms: "Atoms", out: Path, file_format: str) -> None:
    """Write the structure atomically, under a temporary name without a suffix that would say more than the format."""
    from ase.io import write

    from ase_gffmerge.errors import FileFormatError, first_line
    from ase_gffmerge.storage.atomic import atomic_write

    def attempt(temporary: Path) -> None:
        try:
            write(temporary, atoms, format=file_format)
        except OSError:
            raise
        except Exception as error:  # whatever the writers of so many formats raise
            raise FileFormatError(
                f"ASE cannot write {atoms.get_chemical_formula()} in the format {file_format!r} ({first_line(error)}); "
                f"{USABLE}"
            ) from error

    atomic_write(out, attempt)
