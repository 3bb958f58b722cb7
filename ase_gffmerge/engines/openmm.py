"""A force field for some molecules of a classical OpenMM system (ML/MM, mechanical embedding).

Energy of the mixed system: that of the calculator for the chosen atoms, plus the classical energy of all others and between
both. What acts among the chosen atoms classically, bonded and nonbonded, is taken out::

    from ase_gffmerge.engines.openmm import create_mixed_system

    mixed = create_mixed_system(topology, system, atoms, GFFMergeCalculator("merged.safetensors"))
    simulation = openmm.app.Simulation(topology, mixed, integrator)

Needs OpenMM 8.5 or newer (``pip install "ase-gffmerge[openmm]"``), whose ``PythonForce`` calls any function of Python.
"""

import copy
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
from ase import Atoms, units
from ase.calculators.calculator import BaseCalculator

from ase_gffmerge.errors import ArgumentError

try:
    import openmm
    from openmm import PythonForce, unit
except ImportError as error:
    raise ImportError(
        "OpenMM 8.5 or newer is not installed, and ase_gffmerge.engines.openmm is a force for it; pip install 'openmm>=8.5'"
    ) from error

EV = units.mol / units.kJ
"""One eV in kJ/mol."""

BONDED = {"HarmonicBondForce": "Bond", "HarmonicAngleForce": "Angle"}
BONDED |= dict.fromkeys(("PeriodicTorsionForce", "RBTorsionForce"), "Torsion")
"""Forces whose terms can be switched off, and what these are called."""

LEFT = (
    *("AndersenThermostat", "CMMotionRemover", "CustomExternalForce", "PythonForce", "MonteCarloBarostat"),
    *("MonteCarloAnisotropicBarostat", "MonteCarloFlexibleBarostat", "MonteCarloMembraneBarostat"),
)
"""Forces that hold nothing classical among the atoms of a molecule."""


def create_mixed_system(
    topology: "openmm.app.Topology",
    system: "openmm.System",
    atoms: Sequence[int],
    calculator: BaseCalculator,
) -> "openmm.System":
    """Copy of a system in which a calculator gives the forces among some atoms.

    Terms of bonds, angles and torsions among these atoms get a strength of zero, their pairs no Coulomb and Lennard-Jones
    interaction, their constraints are removed. Biases and restraints belong into the new system, afterwards.

    Parameters
    ----------
    topology
        It has the elements.
    system
        All atoms with their classical force field; it is not changed.
    atoms
        Indices of the atoms that the calculator treats, all together: whole molecules. Call this again for a molecule
        that should interact with them classically.
    calculator
        A :class:`~ase_gffmerge.GFFMergeCalculator` or any other of ASE. It is used itself, so that after each step its
        ``extras`` hold the extrapolation grades of the atoms. In a periodic system its cell is the box, whose vectors must
        be longer than the molecule and its cutoff together.

    Raises
    ------
    ArgumentError
        For atoms that are not there or have no element, classical terms that hold them together with other atoms, as a
        bond does, and forces in which what acts among them cannot be switched off.
    """
    chosen = [int(index) for index in atoms]
    elements = [atom.element for atom in topology.atoms()]
    wrong = [k for k in chosen if not 0 <= k < len(elements) or elements[k] is None]
    if not chosen or wrong or len(set(chosen)) < len(chosen):
        raise ArgumentError(
            f"atoms={chosen!r:.80} of {len(elements)}: atoms {wrong[:5]} are not there or have no element, or some are "
            "named twice; give every atom of a molecule once"
        )
    mixed = copy.deepcopy(system)
    for force in mixed.getForces():
        _switch_off(force, set(chosen))
    for k in reversed(range(mixed.getNumConstraints())):
        first, second, _ = mixed.getConstraintParameters(k)
        if _inside((first, second), set(chosen), "a constraint"):
            mixed.removeConstraint(k)
    periodic = mixed.usesPeriodicBoundaryConditions()
    structure = Atoms([elements[k].atomic_number for k in chosen], pbc=periodic, calculator=calculator)
    force = PythonForce(_Evaluation(structure, np.array(chosen)))
    force.setUsesPeriodicBoundaryConditions(periodic)
    mixed.addForce(force)
    return mixed


class _Evaluation:
    """Energy (kJ/mol) and forces (kJ/mol/nm) of some atoms of a state.

    Parameters
    ----------
    structure
        They, with a calculator.
    chosen
        Their indices.
    """

    def __init__(self, structure: Atoms, chosen: np.ndarray):
        self.structure, self.chosen = structure, chosen

    def __call__(self, state: "openmm.State") -> tuple[float, np.ndarray]:
        positions = state.getPositions(asNumpy=True).value_in_unit(unit.angstrom)
        self.structure.positions = positions[self.chosen]
        if self.structure.pbc.any():
            self.structure.cell = state.getPeriodicBoxVectors(asNumpy=True).value_in_unit(unit.angstrom)
        forces = np.zeros((len(positions), 3))
        forces[self.chosen] = self.structure.get_forces() * (EV * units.nm)
        return float(self.structure.get_potential_energy()) * EV, forces


def _switch_off(force: Any, chosen: set[int]) -> None:
    """Take out of a classical force what acts among the chosen atoms."""
    name = type(force).__name__
    if name in BONDED:
        _switch_off_terms(force, BONDED[name], chosen)
    elif name == "NonbondedForce":
        if force.getNumExceptionParameterOffsets():
            raise ArgumentError(
                "exceptions with parameter offsets are not supported; build the system without"
            )
        for pair in combinations(sorted(chosen), 2):
            force.addException(*pair, 0, 1, 0, replace=True)
        if force.usesPeriodicBoundaryConditions():  # a pair may be one across the boundary
            force.setExceptionsUsePeriodicBoundaryConditions(True)
    elif name == "CustomNonbondedForce":
        there = {frozenset(force.getExclusionParticles(k)) for k in range(force.getNumExclusions())}
        for pair in combinations(sorted(chosen), 2):
            if frozenset(pair) not in there:
                force.addExclusion(*pair)
    elif name not in LEFT:
        raise ArgumentError(
            f"the system has a {name}, in which what acts among the atoms of the calculator cannot be switched off; build "
            "the system without it, and add a bias or a restraint to the mixed system"
        )


def _switch_off_terms(force: Any, what: str, chosen: set[int]) -> None:
    """Give bonds, angles or torsions among the chosen atoms a strength of zero; OpenMM goes on to know who is bonded."""
    size = {"Bond": 2, "Angle": 3, "Torsion": 4}[what]
    for k in range(getattr(force, f"getNum{what}s")()):
        parameters = getattr(force, f"get{what}Parameters")(k)
        members, values = parameters[:size], parameters[size:]
        if _inside(members, chosen, f"a {what.lower()}"):
            kept = 0 if type(force).__name__ == "RBTorsionForce" else len(values) - 1
            silent = [*values[:kept], *(0 * value for value in values[kept:])]
            getattr(force, f"set{what}Parameters")(k, *members, *silent)


def _inside(members: Sequence[int], chosen: set[int], what: str) -> bool:
    """Whether all members are chosen; refuse what is partly so."""
    inside = chosen.intersection(members)
    if inside and len(inside) < len(members):
        raise ArgumentError(
            f"{what} holds together atoms {list(members)}, of which only {sorted(inside)} are the calculator's; choose "
            "whole molecules"
        )
    return bool(inside)
