"""A LAMMPS script with a force field in the place of its pair style, on the processes of an ``mpirun``.

As soon as the script's box exists, ``pair_style zero``, which makes LAMMPS keep ghosts, and ``fix external`` are set
(:mod:`.external`)::

    mpirun -n 2 gffmerge lammps in.script --model merged.safetensors
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from ase_gffmerge.engines.lammps.external import LOG, ExternalForceField, Lammps
from ase_gffmerge.engines.lammps.external import MPI as MPI
from ase_gffmerge.engines.lammps.mliap import MLIAPModel
from ase_gffmerge.engines.lammps.snapshot import Costs
from ase_gffmerge.errors import ArgumentError, DynamicsError
from ase_gffmerge.forcefield.force_field import ForceField

NOT_OURS = {
    "pair_style": "the force field takes its place",
    "pair_coeff": "the force field takes its place",
    "clear": "the force field would be lost; write two scripts",
}
"""Commands that a script must not have, and why."""


@dataclass(frozen=True, kw_only=True)
class LammpsRun:
    """What came of a script.

    Attributes
    ----------
    stopped
        Why its runs ended early; empty if they did not.
    largest_grade
        Largest extrapolation grade of all steps; ``None`` where the force field has none.
    costs
        Of this process.
    """

    stopped: str
    largest_grade: float | None
    costs: Costs


def run_script(
    script: str | Path,
    force_field: ForceField,
    *,
    elements: Sequence[str] | None = None,
    specialist: str | int | None = None,
    stop_at_grade: float | None = None,
    variables: Mapping[str, str] | None = None,
    arguments: Sequence[str] = (),
    comm: MPI.Intracomm = MPI.COMM_WORLD,
) -> LammpsRun:
    """Run a LAMMPS script with a force field; all processes of an ``mpirun`` call it together.

    Parameters
    ----------
    script
        An ordinary input script in metal units, without ``pair_style``. Up to its ``create_box``, ``read_data`` or
        ``read_restart`` it is executed line by line, without ``jump`` and ``label``.
    force_field
        Frozen, on a CPU, in the floating-point type in which it is to compute.
    elements
        Symbols of the atom types in their order; default: by their masses.
    specialist
        With per-specialist conditioning, the one that all atoms belong to.
    stop_at_grade
        Extrapolation grade beyond which this and all later runs of the script end.
    variables
        Variables of LAMMPS that the script reads.
    arguments
        Further arguments of LAMMPS's command line.
    comm
        The processes.

    Raises
    ------
    ArgumentError
        For a script with units other than metal or a pair style of its own, types whose elements are not known, a force
        field that cannot be evaluated domain by domain.
    EvaluationFailed, DynamicsError
        When energies are not finite; when LAMMPS stops with an error.
    """
    if stop_at_grade is not None and force_field.extrapolation_grade is None:
        raise ArgumentError(
            f"{force_field.name!r} has no extrapolation grade, by which --stop-at-grade could stop; leave it out, or use a "
            "merged force field"
        )
    model = MLIAPModel(force_field, specialist=specialist)
    text = comm.bcast(_read(Path(script)) if comm.rank == 0 else "")
    if isinstance(text, ArgumentError):
        raise text
    lines = commands(text)
    check(lines, script)
    given = [part for name, value in (variables or {}).items() for part in ("-var", name, value)]
    lmp = Lammps(cmdargs=[*given, *arguments], comm=comm)
    try:
        done = _until_box(lmp, lines, script)
        external = ExternalForceField(lmp, model, comm, elements=elements, stop_at_grade=stop_at_grade)
        with TemporaryDirectory() as folder:
            rest = Path(comm.bcast(folder)) / Path(script).name
            if comm.rank == 0:
                rest.write_text("\n".join([*lines[done:], ""]))
            _guarded(lmp.file, str(rest), comm)
    finally:
        lmp.close()
    if external.error is not None:
        raise external.error
    return LammpsRun(stopped=external.stopped, largest_grade=external.largest_grade, costs=external.costs)


def _read(script: Path) -> str | ArgumentError:
    """Text of a script, or what to raise on all processes."""
    try:
        return script.read_text()
    except (OSError, UnicodeDecodeError) as error:
        return ArgumentError(f"cannot read the script {script}: {error}; give a LAMMPS input script")


def commands(text: str) -> list[str]:
    """Commands of a script: lines, joined where ``&`` or an open triple quote continues them."""
    found, whole = list[str](), ""
    for line in text.splitlines():
        whole = f"{whole}{line}"
        if whole.count('"""') % 2:
            whole += "\n"
        elif whole.rstrip().endswith("&"):
            whole = whole.rstrip().removesuffix("&")
        else:
            found.append(whole)
            whole = ""
    return [*found, whole] if whole else found


def check(lines: Sequence[str], script: str | Path) -> None:
    """Raise :class:`ArgumentError` for commands in :data:`NOT_OURS`."""
    for line in lines:
        name = (re.sub(r"#.*", "", line).split() or [""])[0]
        if name in NOT_OURS:
            raise ArgumentError(f"{script} has the command {name!r}, and {NOT_OURS[name]}; leave it out")


def _until_box(lmp: Lammps, lines: Sequence[str], script: str | Path) -> int:
    """Execute commands until there is a box of metal units; gives how many."""
    done = 0
    while not lmp.extract_setting("box_exist"):
        if done == len(lines):
            raise ArgumentError(f"{script} makes no box; it needs create_box, read_data or read_restart")
        _guarded(lmp.command, lines[done], lmp.comm)
        done += 1
    if (units := lmp.extract_global("units")) != "metal":
        raise ArgumentError(
            f"{script} has units {units}; force fields are in eV and Å: begin it with 'units metal' (times in ps, pressures "
            "in bar)"
        )
    return done


def _guarded(execute: Callable[[str], object], argument: str, comm: MPI.Intracomm) -> None:
    """Let LAMMPS do something; its errors become ours."""
    try:
        execute(argument)
    except Exception as error:  # all that LAMMPS raises is of this class
        if type(error).__name__ == "MPIAbortException" and comm.size > 1:  # other processes do not know
            LOG.error("gffmerge: error: LAMMPS, rank %d: %s", comm.rank, error)
            comm.Abort(1)
        text = " ".join(str(error).split())
        raise DynamicsError(f"LAMMPS stopped: {text}; correct the script") from None
