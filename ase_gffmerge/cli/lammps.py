"""``gffmerge lammps``: an ordinary LAMMPS script with a force field in the place of its pair style."""

import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from ase_gffmerge.cli.options import DType, JsonOption, SpecialistOption
from ase_gffmerge.cli.output import note, print_json


def lammps(
    script: Annotated[
        Path,
        typer.Argument(help="LAMMPS input in metal units, without pair_style.", show_default=False),
    ],
    model: Annotated[
        str, typer.Option(help="Force-field file, vendor:checkpoint, or a bundled name.", show_default=False)
    ],
    dtype: Annotated[DType, typer.Option(help="Of the network.")] = DType.float32,
    elements: Annotated[
        list[str] | None,
        typer.Option(
            help="Elements of the atom types in their order, as H C O.", show_default="by their masses"
        ),
    ] = None,
    specialist: SpecialistOption = None,
    stop_at_grade: Annotated[
        float | None,
        typer.Option(help="End all runs of the script once an atom's extrapolation grade is beyond it."),
    ] = None,
    var: Annotated[
        list[str] | None, typer.Option(help="Variables of the script, as T=300. Several values.")
    ] = None,
    log: Annotated[Path, typer.Option(help="LAMMPS's log file; none: do not write one.")] = Path(
        "log.lammps"
    ),
    as_json: JsonOption = False,
) -> None:
    """Run a LAMMPS script on one process, or on several: mpirun -n 4 gffmerge lammps in.script --model merged.safetensors.

    fix nvt, npt, minimize and the like are LAMMPS's own. Grades of atoms are the property d_grade, the largest of a step is
    f_gffmerge[1]. A run that is stopped by --stop-at-grade ends with exit code 1, after the rest of the script.
    """
    import torch

    from ase_gffmerge.errors import ArgumentError, GFFMergeError
    from ase_gffmerge.integrations.load import load_force_field

    try:
        from ase_gffmerge.engines.lammps.run import MPI, run_script
    except ImportError as error:
        raise ArgumentError(str(error)) from None
    everyone = MPI.COMM_WORLD
    if "OMP_NUM_THREADS" not in os.environ:
        neighbors = everyone.Split_type(MPI.COMM_TYPE_SHARED).size
        torch.set_num_threads(max((os.cpu_count() or 1) // neighbors, 1))
    try:
        if wrong := [entry for entry in var or () if "=" not in entry]:
            raise ArgumentError(f"--var {wrong[0]}: write NAME=VALUE, as T=300")
        run = run_script(
            script,
            load_force_field(model, dtype=getattr(torch, dtype.value)),
            elements=elements,
            specialist=specialist,
            stop_at_grade=stop_at_grade,
            variables=dict(entry.split("=", 1) for entry in var or ()),
            arguments=("-log", str(log), *(("-screen", "none") if as_json else ())),
        )
    except GFFMergeError:
        if everyone.rank == 0:
            raise
        raise typer.Exit(2) from None  # one process tells; the others wait for it where MPI ends
    costs = everyone.gather(asdict(run.costs))
    if everyone.rank == 0:
        if as_json:
            print_json({"stopped": run.stopped, "largest_grade": run.largest_grade, "costs": costs})
        if run.stopped:
            note(f"gffmerge: stopped: {run.stopped}; this and later runs of {script} ended there")
    if run.stopped:
        raise typer.Exit(1)
