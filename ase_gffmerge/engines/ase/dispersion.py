"""D3 dispersion for force fields whose training labels lack it, computed by the package ``dftd3``.

Grimme, Antony, Ehrlich, Krieg, J. Chem. Phys. 132, 154104 (2010); damping: Grimme, Ehrlich, Goerigk, J. Comput. Chem. 32,
1456 (2011).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import numpy as np
from ase import Atoms
from ase.stress import full_3x3_to_voigt_6_stress, voigt_6_to_full_3x3_stress
from ase.units import Bohr, Hartree

from ase_gffmerge.errors import ArgumentError, StructureError
from ase_gffmerge.inference.predict import FramePredictions

if TYPE_CHECKING:
    from dftd3.interface import DampingParam, DispersionModel

DAMPINGS = {
    "d3bj": "RationalDampingParam",
    "d3zero": "ZeroDampingParam",
    "d3mbj": "ModifiedRationalDampingParam",
    "d3mzero": "ModifiedZeroDampingParam",
    "d3op": "OptimizedPowerDampingParam",
}
"""Damping functions by the name that users write, and their classes in :mod:`dftd3.interface`."""

_CONTAINS = re.compile(
    r"(?i)(?<![a-z0-9])(d[234](\(?m?(bj|zero|0)\)?)?|mbd|r?vv10|vdw[a-z0-9-]*)(?![a-z0-9])"
)

Results = dict[str, float | np.ndarray]
"""What ASE calls ``results``: a value per property."""


@dataclass(frozen=True)
class Dispersion:
    """Energies, forces and stresses of a D3 correction.

    Attributes
    ----------
    damping
        One of :data:`DAMPINGS`.
    functional
        Density functional whose parameters are used, for example ``pbe``: the one that the force field was trained on.
    """

    damping: str
    functional: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``damping:functional``, for example ``d3bj:pbe``, and check that the package knows both.

        Raises
        ------
        ArgumentError
            For anything else, or when the package ``dftd3`` is not installed.
        """
        damping, _, functional = str(text).strip().lower().partition(":")
        if damping not in DAMPINGS or not functional:
            raise ArgumentError(
                f"dispersion={text!r} is not understood; write damping:functional, for example 'd3bj:pbe' "
                f"(dampings: {', '.join(DAMPINGS)})"
            )
        found = cls(damping, functional)
        found._parameters()
        return found

    def __str__(self) -> str:
        """As :meth:`parse` reads it."""
        return f"{self.damping}:{self.functional}"

    def results(self, atoms: Atoms) -> dict[str, float | np.ndarray]:
        """Contributions to ``energy`` (eV), ``forces`` (n_atoms, 3) in eV/Å and ``stress`` (6,) in eV/Å^3.

        The stress is there for structures with three cell vectors.

        Raises
        ------
        StructureError
            When D3 has no parameters for an element, or the structure cannot be evaluated.
        """
        try:
            raw = self._model(atoms).get_dispersion(param=self._parameters(), grad=True)
        except RuntimeError as error:
            raise StructureError(
                f"the dispersion of {atoms.get_chemical_formula()} cannot be computed ({error}); D3 knows the elements "
                "from H to Lr; leave dispersion out for others"
            ) from None
        found: dict[str, float | np.ndarray] = {
            "energy": float(raw["energy"]) * Hartree,
            "forces": -np.asarray(raw["gradient"]) * (Hartree / Bohr),
        }
        if atoms.cell.rank == 3:
            virial = np.asarray(raw["virial"]) if atoms.pbc.any() else np.zeros((3, 3))
            found["stress"] = full_3x3_to_voigt_6_stress(virial * Hartree / atoms.get_volume())
        return found

    def added(self, results: Results, atoms: Atoms) -> Results:
        """ASE's results with the correction in them, and without energies per atom, which D3 does not have."""
        own = self.results(atoms)
        found = {name: value for name, value in results.items() if name != "energies"}
        for name in ("energy", "forces", "stress"):
            if name in found:
                found[name] = found[name] + own[name]
        found["free_energy"] = found["energy"]
        return found

    def of_frames(self, frames: Sequence[Atoms]) -> FramePredictions:
        """Contributions to energies, forces and stresses of many structures, to be added to predictions."""
        found = [self.results(atoms) for atoms in frames]
        return FramePredictions(
            numbers=[atoms.numbers for atoms in frames],
            energies=np.array([one["energy"] for one in found]),
            forces=[np.asarray(one["forces"]) for one in found],
            stresses=[
                voigt_6_to_full_3x3_stress(one["stress"]) if "stress" in one else None for one in found
            ],
        )

    def hessian(self, atoms: Atoms, indices: Sequence[int] | None = None) -> np.ndarray:
        """Second derivatives (3 n_atoms, 3 n_atoms) in eV/Å^2, or the rows of some atoms."""
        found = self._model(atoms).get_hessian(param=self._parameters())
        matrix = np.asarray(found["hessian"] if isinstance(found, dict) else found)
        chosen = slice(None) if indices is None else list(indices)
        rows = matrix.reshape(len(atoms), 3, 3 * len(atoms))[chosen].reshape(-1, 3 * len(atoms))
        return rows * (Hartree / Bohr**2)

    def _model(self, atoms: Atoms) -> "DispersionModel":
        from dftd3.interface import DispersionModel

        if not atoms.pbc.any():
            return DispersionModel(atoms.numbers, atoms.positions / Bohr)
        return DispersionModel(
            atoms.numbers, atoms.positions / Bohr, atoms.cell.complete().array / Bohr, atoms.pbc
        )

    def _parameters(self) -> "DampingParam":
        """The damping function with the functional's parameters."""
        try:
            from dftd3 import interface
        except ImportError:
            raise ArgumentError(
                "dispersion needs the package dftd3, which is not installed; pip install 'ase-gffmerge[dispersion]'"
            ) from None
        try:
            return getattr(interface, DAMPINGS[self.damping])(method=self.functional)
        except RuntimeError as error:
            raise ArgumentError(
                f"dftd3 has no parameters of {self.damping} for the functional {self.functional!r} ({error}); name the "
                "functional that the force field was trained on as dftd3 writes it, for example pbe, blyp, revpbe"
            ) from None


def contains_dispersion(level_of_theory: str) -> bool:
    """Whether a level of theory such as ``PBE-D3(BJ)/def2-TZVP`` says that dispersion is in the labels already."""
    return _CONTAINS.search(level_of_theory) is not None
