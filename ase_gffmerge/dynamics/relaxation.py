"""Geometry optimisation by ASE's optimisers: atoms alone or with the cell, under pressure, with symmetry kept."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ase import Atoms, units
from ase.constraints import FixSymmetry
from ase.filters import FrechetCellFilter
from ase.io.trajectory import Trajectory as TrajectoryFile
from ase.optimize import BFGS, FIRE, LBFGS, BFGSLineSearch

from ase_gffmerge.errors import ArgumentError, StructureError, first_line

OPTIMIZERS = {"bfgs": BFGS, "lbfgs": LBFGS, "bfgs-linesearch": BFGSLineSearch, "fire": FIRE}
STRAINS = ("xx", "yy", "zz", "yz", "xz", "xy")


@dataclass(frozen=True, kw_only=True)
class CellFreedom:
    """How the cell may change during a relaxation.

    Attributes
    ----------
    pressure
        External pressure in GPa.
    constant_volume
        Let only the shape change.
    strains
        The strain components that may change, some of :data:`STRAINS`.
    """

    pressure: float = 0.0
    constant_volume: bool = False
    strains: tuple[str, ...] = STRAINS

    def __post_init__(self) -> None:
        """Raise :class:`ArgumentError` for what is no strain component."""
        unknown = [strain for strain in self.strains if strain not in STRAINS]
        if unknown or not self.strains:
            raise ArgumentError(
                f"{', '.join(unknown) or 'nothing'} is no strain of the cell; name some of {', '.join(STRAINS)}"
            )

    def filter(self, atoms: Atoms) -> FrechetCellFilter:
        """Give ASE's view of atoms and cell for an optimiser.

        Raises
        ------
        StructureError
            For structures that are not periodic in three directions.
        """
        if not (atoms.pbc.all() and atoms.cell.rank == 3):
            raise StructureError(
                f"--cell needs a structure periodic in three directions; {atoms.get_chemical_formula()} has "
                f"pbc {atoms.pbc.tolist()} and {atoms.cell.rank} cell vectors; leave --cell out"
            )
        return FrechetCellFilter(
            atoms,
            mask=[strain in self.strains for strain in STRAINS],
            scalar_pressure=self.pressure * units.GPa,
            constant_volume=self.constant_volume,
        )


def relax(
    atoms: Atoms,
    *,
    fmax: float = 0.01,
    steps: int = 1000,
    optimizer: str = "bfgs",
    cell: CellFreedom | None = None,
    fix_symmetry: bool = False,
    trajectory: Path | None = None,
    on_step: Callable[[int], None] | None = None,
) -> tuple[int, bool]:
    """Relax ``atoms`` in place; returns the number of steps and whether it converged.

    Parameters
    ----------
    atoms
        The structure, with a calculator.
    fmax
        Largest force at the end in eV/Å; with a cell also what the stress amounts to.
    steps
        Largest number of steps.
    optimizer
        One of :data:`OPTIMIZERS`.
    cell
        How the cell may change; default: not at all.
    fix_symmetry
        Keep the space group that the structure has at the beginning.
    trajectory
        ``.traj`` file that gets every step.
    on_step
        Called after every step with its number.

    Raises
    ------
    ArgumentError
        For an unknown optimiser, or when the symmetry cannot be found.
    StructureError
        For ``cell`` without three periodic directions.
    """
    if optimizer not in OPTIMIZERS:
        raise ArgumentError(f"unknown optimizer {optimizer!r}; choose one of {', '.join(OPTIMIZERS)}")
    if fix_symmetry:
        try:
            atoms.set_constraint([*atoms.constraints, FixSymmetry(atoms)])
        except Exception as error:  # whatever spglib and its absence may say
            raise ArgumentError(
                f"the symmetry of {atoms.get_chemical_formula()} cannot be kept ({first_line(error)}); it needs a periodic "
                "structure and the package spglib: pip install spglib"
            ) from None
    target = atoms if cell is None else cell.filter(atoms)
    with OPTIMIZERS[optimizer](target, logfile=None) as run:
        if trajectory is not None:
            writer = run.closelater(TrajectoryFile(trajectory, "w", atoms))
            run.attach(writer)
        if on_step is not None:
            run.attach(lambda: on_step(run.nsteps))
        converged = run.run(fmax=fmax, steps=steps)
        return run.nsteps, bool(converged)
