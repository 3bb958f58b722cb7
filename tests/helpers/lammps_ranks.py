"""LAMMPS on 4, 2 and 1 of the processes of an ``mpirun -n 4``: what came of several scripts, as one JSON file.

``mpirun -n 4 python -m helpers.lammps_ranks FOLDER`` in ``tests``, with models NAME.safetensors and structures NAME.data.
"""

import json
import os
import sys
from pathlib import Path

import torch

from ase_gffmerge.engines.lammps.run import MPI, run_script
from ase_gffmerge.errors import GFFMergeError
from ase_gffmerge.forcefield.force_field import ForceField

HEAD = "units metal\nboundary p p p\nread_data ../{structure}.data\n"
KEYS = "step pe etotal press pxx pyy pzz pxy pxz pyz vol"
THERMO = f"thermo_style custom {KEYS} f_gffmerge f_gffmerge[1] c_whole\nthermo_modify format float %.17g\n"
ATOMS = (
    "compute each all pe/atom\ncompute whole all reduce sum c_each\n"
    + THERMO
    + "dump 1 all custom 1000000 {name}.dump id type xu yu zu fx fy fz c_each d_grade proc\n"
    + "dump_modify 1 sort id format float %.17g first yes\n"
)
TELL = 'print "$(step) $(pe:%.17g) $(etotal:%.17g) $(vol:%.17g)" append told.txt screen no\n'
FORCES = HEAD + ATOMS + "run 0\nwrite_dump all custom {name}.end id proc modify sort id\n"
HOT = "velocity all create 20000 7 loop all\ntimestep 0.0002\n"
MOVE = (
    HEAD
    + HOT
    + ATOMS
    + "fix 1 all nve\nrun 0\n"
    + TELL
    + "run 15\nwrite_restart {name}.restart\nrun 15\n"
    + TELL
    + "write_dump all custom {name}.end id xu yu zu proc modify sort id format float %.17g\n"
)
GO_ON = (
    "units metal\nread_restart move.restart\nfix 1 all nve\n"
    + "compute each all pe/atom\ncompute whole all reduce sum c_each\n"
    + THERMO
    + "run 15\n"
    + TELL
)
NPT = HEAD + HOT + "fix 1 all npt temp 300 300 0.05 aniso 1000 1000 0.01\nrun 0\n" + TELL + "run 5\n" + TELL
LOOP = (
    HEAD
    + "variable n loop 2\nlabel again\nmin_modify line quadratic\nminimize 0 1e-3 1 2\n"
    + 'print "$n" append told.txt screen no\nnext n\njump SELF again\n'
)
WRONG = {
    "units": "region b block 0 9 0 9 0 9\ncreate_box 1 b\n",
    "pair_style": HEAD.format(structure="crowd") + "pair_style lj/cut 5.0\n",
    "no box": "units metal\n",
    "unknown command": "units metal\nbogus\n",
    "element": "units metal\nregion b block 0 9 0 9 0 9\ncreate_box 1 b\ncreate_atoms 1 single 1 1 1\nmass 1 63.5\nrun 0\n",
    "mass": "units metal\nregion b block 0 9 0 9 0 9\ncreate_box 1 b\ncreate_atoms 1 single 1 1 1\nmass 1 30.0\nrun 0\n",
}
QUIET = ("-screen", "none", "-log")


def table(path: str) -> list[list[float]]:
    """Rows of the last frame of a dump."""
    lines = Path(path).read_text().splitlines()
    start = max(i for i, line in enumerate(lines) if line.startswith("ITEM: ATOMS"))
    return [[float(word) for word in line.split()] for line in lines[start + 1 :]]


def last_line(log: str) -> list[float]:
    """Numbers of the last line of thermodynamic output."""
    rows = [line.split() for line in Path(log).read_text().splitlines()]
    rows = [row for row in rows if len(row) == 14 and row[0].isdigit()]
    return [float(word) for word in rows[-1]]


def results(comm: MPI.Intracomm, folder: Path) -> dict:
    """Run everything on the processes of ``comm``, in a folder of its own."""
    own = folder / f"ranks-{comm.size}"
    if comm.rank == 0:
        own.mkdir()
    comm.barrier()
    os.chdir(own)
    models = {path.stem: ForceField.load(path) for path in sorted(folder.glob("*.safetensors"))}
    found: dict = {}

    def run(name: str, text: str, model: str = "painn", **options) -> object:
        script = Path(f"in.{name}")
        if comm.rank == 0:
            script.write_text(
                text.format(name=name, structure=options.get("variables", {}).get("structure", "crowd"))
            )
        comm.barrier()
        done = run_script(script, models[model], comm=comm, arguments=(*QUIET, f"log.{name}"), **options)
        comm.barrier()
        return done

    for model, structure in (
        ("painn", "crowd"),
        ("painn", "small"),
        ("nequip", "crowd"),
        ("chgnet", "crowd"),
        ("tensornet", "small"),
        ("single", "crowd"),
    ):
        name = f"{model}-{structure}"
        run(name, FORCES, model, variables={"structure": structure})
        found[name] = {"atoms": table(f"{name}.dump"), "thermo": last_line(f"log.{name}")}
    done = run("move", MOVE)
    found["move"] = {"start": table("move.dump"), "end": table("move.end"), "searches": done.costs.searches}
    run("go_on", GO_ON, elements=["H", "C", "O"])
    run("npt", NPT)
    found["told"] = [
        [float(word) for word in line.split()] for line in Path("told.txt").read_text().splitlines()
    ]
    run("loop", LOOP)
    found["loops"] = len(Path("told.txt").read_text().splitlines()) - len(found["told"])
    done = run("stop", MOVE, stop_at_grade=0.5 * done.largest_grade)
    found["stopped"] = done.stopped
    found["errors"] = {}
    for name, text in WRONG.items():
        try:
            run(name.replace(" ", "-"), text)
        except GFFMergeError as error:
            found["errors"][name] = str(error)
        comm.barrier()
    return found


def main() -> None:
    torch.set_num_threads(1)
    folder, world, found = Path(sys.argv[1]), MPI.COMM_WORLD, {}
    for size in (4, 2, 1):
        part = world.Split(0 if world.rank < size else MPI.UNDEFINED, world.rank)
        if part != MPI.COMM_NULL:
            found[size] = results(part, folder)
    if world.rank == 0:
        (folder / "results.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
