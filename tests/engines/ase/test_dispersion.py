"""D3 dispersion against finite differences, against dftd3's own calculator, and its refusals."""

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule

from ase_gffmerge.engines.ase.dispersion import Dispersion, contains_dispersion
from ase_gffmerge.errors import ArgumentError


def argon() -> Atoms:
    atoms = bulk("Ar", "fcc", a=5.3, cubic=True)
    atoms.set_cell(atoms.cell.array + np.triu(np.full((3, 3), 0.11), 1), scale_atoms=True)
    atoms.rattle(0.05, seed=1)
    return atoms


@pytest.mark.parametrize(
    ("text", "message"),
    [("pbe", "damping:functional"), ("d3bj:", "damping:functional"), ("d4:pbe", "d3bj, d3zero")],
)
def test_what_is_not_understood_is_refused(text: str, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        Dispersion.parse(text)


@pytest.mark.parametrize(
    ("theory", "contained"),
    [
        ("PBE-D3(BJ)/def2-TZVP", True),
        ("PBE+D3", True),
        ("wB97M-D3BJ/def2-TZVPPD", True),
        ("B3LYP-D4", True),
        ("rVV10", True),
        ("PBE+MBD", True),
        ("optB88-vdW", True),
        ("PBE/def2-SVP", False),
        ("PBE/cc-pVD3Z", False),
        ("unknown", False),
    ],
)
def test_levels_of_theory_that_contain_dispersion(theory: str, contained: bool) -> None:
    assert contains_dispersion(theory) is contained


def test_unknown_functionals_are_named() -> None:
    pytest.importorskip("dftd3")
    with pytest.raises(ArgumentError, match="nonsense"):
        Dispersion.parse("d3bj:nonsense")


def test_energy_is_that_of_dftd3s_own_calculator() -> None:
    ase_calculator = pytest.importorskip("dftd3.ase")
    for atoms in (molecule("C6H6"), argon()):
        atoms.calc = ase_calculator.DFTD3(method="pbe", damping="d3bj")
        found = Dispersion.parse("d3bj:pbe").results(atoms)
        assert found["energy"] == pytest.approx(atoms.get_potential_energy(), abs=1e-10)
        assert found["forces"] == pytest.approx(atoms.get_forces(), abs=1e-9)
        assert found["energy"] < 0


@pytest.mark.parametrize("damping", ["d3bj", "d3zero"])
def test_forces_and_stress_are_derivatives(damping: str) -> None:
    pytest.importorskip("dftd3")
    dispersion, atoms, step = Dispersion.parse(f"{damping}:pbe"), argon(), 1e-3

    def energy(moved: Atoms) -> float:
        return float(dispersion.results(moved)["energy"])

    def displaced(sign: float) -> Atoms:
        moved = atoms.copy()
        moved.positions[1, 2] += sign * step
        return moved

    def strained(sign: float, a: int, b: int) -> Atoms:
        moved, strain = atoms.copy(), np.eye(3)
        strain[a, b] += 0.5 * sign * step
        strain[b, a] += 0.5 * sign * step
        moved.set_cell(atoms.cell.array @ strain, scale_atoms=True)
        return moved

    results = dispersion.results(atoms)
    force = -(energy(displaced(1)) - energy(displaced(-1))) / (2 * step)
    assert results["forces"][1, 2] == pytest.approx(force, abs=1e-6)
    for entry, (a, b) in {0: (0, 0), 2: (2, 2), 4: (0, 2)}.items():
        slope = (energy(strained(1, a, b)) - energy(strained(-1, a, b))) / (2 * step)
        # pairs cross dftd3's cutoff of 32 Å, where the energy jumps a little
        assert results["stress"][entry] == pytest.approx(slope / atoms.get_volume(), abs=3e-6)


def test_slabs_and_molecules_in_a_box() -> None:
    pytest.importorskip("dftd3")
    dispersion = Dispersion.parse("d3bj:pbe")
    slab = argon()
    slab.pbc = (True, True, False)
    assert dispersion.results(slab)["energy"] > dispersion.results(argon())["energy"]
    wire = Atoms("Ar", cell=[4.0, 0, 0], pbc=(True, False, False))
    assert "stress" not in dispersion.results(wire)
    box = molecule("C6H6", vacuum=6.0)
    assert dispersion.results(box)["stress"] == pytest.approx(np.zeros(6))
