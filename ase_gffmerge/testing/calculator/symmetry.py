"""Point 15: what the energy does not depend on, and that it is continuous where neighbours leave."""

from typing import Any

import numpy as np
from ase import Atoms
from ase.stress import full_3x3_to_voigt_6_stress, voigt_6_to_full_3x3_stress

from ase_gffmerge.testing.calculator.harness import NotApplicable, Subject, check, require

SHORT, LONG, SCAN = 0.5, 20.0, 0.1  # Å
FLOOR = 1e-10  # eV, eV/Å: round-off


def _transformed(subject: Subject, atoms: Atoms, expected: dict[str, Any], what: str) -> str:
    return subject.compare(subject.evaluate(atoms), expected, what=what)


@check(15)
def translation(subject: Subject) -> str:
    """Moving everything changes nothing."""
    atoms = subject.structure.copy()
    atoms.positions += [0.31, -1.27, 4.56]
    return _transformed(subject, atoms, subject.evaluate(subject.structure), "a translation")


@check(15)
def rotation(subject: Subject) -> str:
    """Turning everything, cell included, turns forces and stress."""
    expected = subject.evaluate(subject.structure)
    turn = np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))[0]
    turn *= np.sign(np.linalg.det(turn))
    atoms = subject.structure.copy()
    atoms.positions = atoms.positions @ turn
    atoms.set_cell(atoms.cell.array @ turn)
    if "forces" in expected:
        expected["forces"] = expected["forces"] @ turn
    if "stress" in expected:
        full = voigt_6_to_full_3x3_stress(expected["stress"])
        expected["stress"] = full_3x3_to_voigt_6_stress(turn.T @ full @ turn)
    return _transformed(subject, atoms, expected, "a rotation")


@check(15)
def permutation(subject: Subject) -> str:
    """The order of atoms does not matter."""
    expected = subject.evaluate(subject.structure)
    order = np.random.default_rng(0).permutation(len(subject.structure))
    for name in {"forces", "energies"} & expected.keys():
        expected[name] = expected[name][order]
    return _transformed(subject, subject.structure[order], expected, "another order of the atoms")


@check(15)
def supercell(subject: Subject) -> str:
    """Twice the cell has twice the energy, and the same forces and stress."""
    periodic = subject.structure.pbc
    atoms = subject.structure.copy()
    if not periodic.any():  # two molecules that do not see each other
        atoms.center(vacuum=100.0)
    repeats = [2, 1, 1] if periodic[0] or not periodic.any() else np.where(periodic, 2, 1)
    n = int(np.prod(repeats))
    expected = subject.evaluate(subject.structure)
    expected.pop("free_energy", None)
    expected["energy"] *= n
    for name in {"forces", "energies"} & expected.keys():
        expected[name] = np.concatenate([expected[name]] * n)
    got = subject.evaluate(atoms * repeats)
    if not periodic.any():
        got.pop("stress", None)
    return subject.compare(got, expected, what=f"{n} cells instead of one, relative to the sum,")


@check(15)
def continuous_at_the_cutoff(subject: Subject) -> str:
    """Where two atoms cease to interact, neither energy nor force has a step."""
    subject.needs("energy", "forces")
    numbers = sorted(set(subject.structure.numbers.tolist()))
    found = [_edge_of(subject, pair) for pair in {(numbers[0], numbers[0]), (numbers[0], numbers[-1])}]
    energy, force, distance = (max(column) for column in zip(*found, strict=True))
    require(
        energy <= max(subject.tolerances.energy, FLOOR),
        f"the energy of a pair jumps by {energy:.3g} eV where its interaction ends, at {distance:.2f} Å",
    )
    require(
        force <= max(subject.tolerances.forces, FLOOR),
        f"the force in a pair jumps by {force:.3g} eV/Å where its interaction ends, at {distance:.2f} Å",
    )
    return f"steps of {energy:.1e} eV and {force:.1e} eV/Å where pairs cease to interact, at {distance:.2f} Å"


def _edge_of(subject: Subject, numbers: tuple[int, int]) -> tuple[float, float, float]:
    """Steps of energy and force where a pair ceases to interact, and that distance."""

    def at(r: float) -> tuple[float, float]:
        results = subject.evaluate(subject.of(numbers, [[0, 0, 0], [r, 0, 0]]))
        return abs(results["energy"] - apart), float(np.abs(results["forces"]).max())

    apart = subject.evaluate(subject.of(numbers, [[0, 0, 0], [10 * LONG, 0, 0]]))["energy"]
    if max(at(LONG)) > 0:
        raise NotApplicable(f"a pair still interacts at {LONG} Å")
    inside = next((r for r in np.arange(LONG, SHORT, -SCAN) if max(at(r)) > 0), None)
    if inside is None:
        raise NotApplicable(f"a pair does not interact beyond {SHORT} Å")
    outside = inside + SCAN
    while outside - inside > 1e-10:
        middle = 0.5 * (inside + outside)
        inside, outside = (middle, outside) if max(at(middle)) > 0 else (inside, middle)
    return *at(inside), float(inside)


CHECKS = (translation, rotation, permutation, supercell, continuous_at_the_cutoff)
