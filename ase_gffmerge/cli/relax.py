"""``gffmerge relax``: geometry optimisation, with or without the cell."""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ase_gffmerge.cli.options import (
    WORKERS,
    DeviceOption,
    DispersionOption,
    DType,
    ExecutorOption,
    FixOption,
    JsonOption,
    ModelArgument,
    OverwriteOption,
    SpecialistOption,
    StructureArgument,
    WorkersOption,
    fix_atoms,
    opened_workers,
    positive,
    prepared_frames,
)
from ase_gffmerge.cli.output import note, print_json, print_values, require_outputs
from ase_gffmerge.runtime.progress import no_progress, progress_bar

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from concurrent.futures import Executor

    from ase import Atoms

    from ase_gffmerge.dynamics.ase_md import CellFreedom
    from ase_gffmerge.engines.ase.calculator import GFFMergeCalculator
    from ase_gffmerge.runtime.progress import Progress
    from ase_gffmerge.storage.results import Record


class Optimizer(StrEnum):
    """Optimisers of ASE."""

    bfgs = "bfgs"
    lbfgs = "lbfgs"
    bfgs_linesearch = "bfgs-linesearch"
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
    pressure: Annotated[float, typer.Option(help="External pressure with --cell, GPa.")] = 0.0,
    constant_volume: Annotated[
        bool, typer.Option("--constant-volume", help="With --cell, change its shape alone.")
    ] = False,
    strains: Annotated[
        str, typer.Option(help="With --cell, which of its strains may change.")
    ] = "xx,yy,zz,yz,xz,xy",
    fix_symmetry: Annotated[
        bool, typer.Option("--fix-symmetry", help="Keep the space group (needs spglib).")
    ] = False,
    fix: FixOption = None,
    optimizer: Annotated[Optimizer, typer.Option(help="One of ASE's.")] = Optimizer.bfgs,
    every_frame: Annotated[
        bool, typer.Option("--all", help="Relax every frame of the file, not the first alone.")
    ] = False,
    trajectory: Annotated[Path | None, typer.Option(help="File (.traj) for the steps on the way.")] = None,
    dtype: Annotated[DType, typer.Option(help="Of the network.")] = DType.float64,
    device: DeviceOption = "auto",
    specialist: SpecialistOption = None,
    dispersion: DispersionOption = None,
    workers: WorkersOption = None,
    executor: ExecutorOption = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            help="Folder that keeps relaxed structures, so that the same command goes on after an interruption.",
            show_default="none",
            rich_help_panel=WORKERS,
        ),
    ] = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Relax a structure; exit code 1 when it did not converge (the structure is written)."""
    from ase_gffmerge.dynamics.ase_md import CellFreedom
    from ase_gffmerge.errors import ArgumentError

    file_format = output_format(out)
    require_outputs(out, trajectory, inputs=[structure, model], overwrite=overwrite)
    freedom = CellFreedom(
        pressure=pressure, constant_volume=constant_volume, strains=tuple(strains.replace(" ", "").split(","))
    )
    if not cell and freedom != CellFreedom():
        raise ArgumentError("--pressure, --constant-volume and --strains need --cell")
    if every_frame and trajectory is not None:
        raise ArgumentError("--trajectory holds the steps of one structure; leave it or --all out")
    structures = prepared_frames(
        model,
        structure,
        device=device,
        dtype=dtype.value,
        specialist=specialist,
        dispersion=dispersion,
        first=not every_frame,
    )
    for atoms in structures:
        if cell:
            freedom.filter(atoms)
        fix_atoms(atoms, fix)
    try_format(structures, file_format)
    calculator: GFFMergeCalculator = structures[0].calc
    options = RelaxOptions(
        fmax=fmax,
        steps=steps,
        optimizer=optimizer.value,
        cell=freedom if cell else None,
        fix_symmetry=fix_symmetry,
        trajectory=trajectory,
    )
    with opened_workers(workers, executor) as opened, progress_bar("relaxing") as progress:
        results = relax_all(
            structures, calculator, options, executor=opened, folder=resume, progress=progress
        )
    _write_structures(structures, out, file_format)
    converged = all(result["converged"] for result in results)
    if every_frame:
        document: dict[str, object] = {
            "converged": converged,
            "structures": results,
            "out": str(out),
        }
        shown: dict[str, object] = {
            "converged": f"{sum(bool(r['converged']) for r in results)} of {len(results)}",
            "out": str(out),
        }
    else:
        document = {**results[0], "out": str(out)}
        shown = {LABELS.get(k, k): v for k, v in document.items() if v is not None}
    print_json(document) if as_json else print_values(shown)
    if not converged:
        note(f"gffmerge: not converged to {fmax:g} eV/Å in {steps} steps; allow more --steps")
        raise typer.Exit(1)


LABELS = {
    "energy": "energy (eV)",
    "energy_gain": "energy gain (eV)",
    "max_force": "largest force (eV/Å)",
    "volume": "volume (Å³)",
}


@dataclass(frozen=True, kw_only=True)
class RelaxOptions:
    """What :func:`~ase_gffmerge.dynamics.ase_md.relax` is asked for."""

    fmax: float
    steps: int
    optimizer: str
    cell: "CellFreedom | None"
    fix_symmetry: bool
    trajectory: Path | None


def relax_all(
    structures: "Sequence[Atoms]",
    calculator: "GFFMergeCalculator",
    options: RelaxOptions,
    *,
    executor: "Executor | None",
    folder: Path | None,
    progress: "Progress",
) -> "list[Record]":
    """Relax structures in place, each with a calculator of its results in the end, and say how it went.

    Parameters
    ----------
    structures
        With their constraints.
    calculator
        What forces come from.
    options
        How.
    executor
        Workers among which structures are shared out; default: this process.
    folder
        Where finished ones are kept, and found again.
    progress
        Called with a fraction (0 to 1) and a description.
    """
    from ase.calculators.singlepoint import SinglePointCalculator

    from ase_gffmerge.engines.ase.many_structures import identity_of, structure_key
    from ase_gffmerge.runtime.executors import OncePerWorker, run_chunks
    from ase_gffmerge.storage.results import ResultStore

    items = [atoms.copy() for atoms in structures]
    asked = [identity_of(calculator, [repr(options), [c.todict() for c in a.constraints]]) for a in items]
    alone = executor is None
    watched = progress if alone and len(items) == 1 else None
    make = (lambda: calculator) if alone else OncePerWorker.of(calculator.spawn())
    found = run_chunks(
        Relaxation(make, options, watched),
        items,
        keys=[structure_key(identity, atoms) for identity, atoms in zip(asked, items, strict=True)],
        executor=executor,
        chunk=1,
        store=ResultStore(folder) if folder else None,
        progress=no_progress if watched else progress,
    )
    for atoms, record in zip(structures, found, strict=True):
        atoms.set_cell(record["cell"])
        atoms.set_positions(record["positions"], apply_constraint=False)
        names = [name for name in record if name.startswith(RESULT)]
        atoms.calc = SinglePointCalculator(
            atoms, **{name.removeprefix(RESULT): record[name] for name in names}
        )
    return [{key: record[key] for key in SAID} for record in found]


RESULT, SAID = "result_", ("converged", "steps", "energy", "energy_gain", "max_force", "volume")
"""Beginning of the names of a calculator's results, and what is said of each structure."""


@dataclass(frozen=True)
class Relaxation:
    """What a worker does with some structures: relax them."""

    calculator: "Callable[[], GFFMergeCalculator]"
    options: RelaxOptions
    progress: "Progress | None"

    def __call__(self, structures: "Sequence[Atoms]") -> "list[Record]":
        """Relaxed positions and cells, the calculator's results, and how it went."""
        return [self._relaxed(atoms.copy()) for atoms in structures]

    def _relaxed(self, atoms: "Atoms") -> "Record":
        from ase_gffmerge.dynamics.ase_md import relax as relax_atoms

        options, told = self.options, self.progress or no_progress
        atoms.calc = self.calculator()
        before = energy(atoms)
        taken, converged = relax_atoms(
            atoms,
            fmax=options.fmax,
            steps=options.steps,
            optimizer=options.optimizer,
            cell=options.cell,
            fix_symmetry=options.fix_symmetry,
            trajectory=options.trajectory,
            on_step=lambda n: told(n / options.steps, f"step {n}  E {energy(atoms):.5f} eV"),
        )
        return {
            "converged": converged,
            "steps": taken,
            "energy": energy(atoms),
            "energy_gain": before - energy(atoms),
            "max_force": float((atoms.get_forces() ** 2).sum(axis=1).max() ** 0.5),
            "volume": float(atoms.cell.volume) if options.cell else None,
            "positions": atoms.positions.copy(),
            "cell": atoms.cell.array.copy(),
            **{f"{RESULT}{name}": value for name, value in atoms.calc.results.items()},
        }


def energy(atoms: "Atoms") -> float:
    """Potential energy in eV."""
    return float(atoms.get_potential_energy())


def output_format(out: Path) -> str:
    """ASE's name of the format of ``out``; refuses what is no file of structures, and folders that cannot be written."""
    from ase.io.formats import UnknownFileTypeError, filetype, get_compression, ioformats

    from ase_gffmerge.errors import FileFormatError
    from ase_gffmerge.storage.tensor_file import require_writable

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


def try_format(structures: "list[Atoms]", file_format: str) -> None:
    """Refuse a format that cannot hold the structures: before they are relaxed, not after."""
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as folder:
        _write_structures(structures, Path(folder, "structure"), file_format)


def _write_structures(structures: "list[Atoms]", out: Path, file_format: str) -> None:
    """Write the structures atomically, under a temporary name without a suffix that would say more than the format."""
    from ase.io import write

    from ase_gffmerge.errors import FileFormatError, first_line
    from ase_gffmerge.storage.tensor_file import atomic_write

    def attempt(temporary: Path) -> None:
        try:
            write(temporary, structures, format=file_format)
        except OSError:
            raise
        except Exception as error:  # whatever the writers of so many formats raise
            raise FileFormatError(
                f"ASE cannot write {structures[0].get_chemical_formula()} in the format {file_format!r} "
                f"({first_line(error)}); {USABLE}"
            ) from error

    atomic_write(out, attempt)
