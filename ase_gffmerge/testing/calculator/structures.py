"""Points 9, 10 and 15: structures of every kind, what the past leaves behind, symmetry and continuity."""

import gc
import time
from collections.abc import Callable

import numpy as np
from ase import Atoms
from ase.stress import full_3x3_to_voigt_6_stress, voigt_6_to_full_3x3_stress

from ase_gffmerge.testing.calculator.harness import (
    CheckFailed,
    NotApplicable,
    Results,
    Subject,
    check,
    deviation,
    raised_by,
    require,
)

SLOWER = 5.0  # a structure elsewhere may cost at most this many times ...
SECONDS = 0.05  # ... and this much more: timings are noisy


@check(9)
def never_changes_the_callers_atoms(subject: Subject) -> None:
    """Positions outside the cell stay there, and nothing is added to or taken from the structure."""
    atoms = subject.structure.copy()
    atoms.positions += atoms.cell.array.sum(axis=0) + 50.0
    atoms.info["a note"] = [1, 2]
    atoms.set_array("an array", np.arange(len(atoms)))
    before = atoms.copy()
    atoms.calc = subject.calc
    for name in subject.properties:
        atoms.calc.get_property(name, atoms)
    moved = deviation(atoms.positions, before.positions)
    require(not moved, f"positions change by up to {moved:.3g} Å, as if they were wrapped")
    require(np.array_equal(atoms.cell.array, before.cell.array), "the cell changes")
    require(np.array_equal(atoms.pbc, before.pbc), "the boundary conditions change")
    for what in ("info", "arrays"):
        changed = getattr(atoms, what).keys() ^ getattr(before, what).keys()
        require(not changed, f"atoms.{what} gains or loses {sorted(changed)}")
    for name, values in before.arrays.items():
        require(np.array_equal(atoms.arrays[name], values), f"atoms.arrays[{name!r}] changes")
    require(atoms.info == before.info, "atoms.info changes")


@check(9)
def unwrapped_positions(subject: Subject) -> str:
    """Atoms in other cells than the first are the same structure."""
    shifts = np.random.default_rng(0).integers(-3, 4, (len(subject.structure), 3)) * subject.structure.pbc
    atoms = subject.structure.copy()
    atoms.positions += shifts @ atoms.cell.array
    expected = subject.evaluate(subject.structure)
    return subject.compare(subject.evaluate(atoms), expected, what="moving atoms by lattice vectors")


@check(9)
def left_handed_cells(subject: Subject) -> str:
    """Exchanging two cell vectors changes nothing."""
    atoms = subject.structure.copy()
    atoms.set_cell(atoms.cell.array[[1, 0, 2]])
    atoms.set_pbc(atoms.pbc[[1, 0, 2]])
    expected = subject.evaluate(subject.structure)
    return subject.compare(subject.evaluate(atoms), expected, what="exchanging two cell vectors")


@check(9)
def one_atom_and_no_neighbours(subject: Subject) -> str:
    """A single atom feels no force, and two far apart have the energies of each."""
    singles = []
    for number in sorted(set(subject.structure.numbers.tolist())):
        results = subject.evaluate(subject.of([number]))
        require(np.isfinite(results["energy"]), f"a single atom has the energy {results['energy']}")
        if "forces" in results:
            force = deviation(results["forces"], np.zeros((1, 3)))
            require(force <= subject.tolerances.forces, f"a single atom feels a force of {force:.3g} eV/Å")
        singles.append((number, results["energy"]))
    number, energy = singles[0]
    pair = subject.evaluate(subject.of([number] * 2, [[0, 0, 0], [0, 0, 200.0]]))["energy"]
    gap = abs(pair - 2 * energy)
    require(gap <= 2 * subject.tolerances.energy, f"two atoms 200 Å apart interact by {gap:.3g} eV")
    return f"two atoms 200 Å apart: {gap:.1e} eV"


@check(9)
def any_boundary_conditions(subject: Subject) -> str:
    """Every mixture of open and periodic directions works."""
    if subject.structure.cell.rank < 3:
        atoms = subject.structure.copy()
        atoms.center(vacuum=3.0)
    else:
        atoms = subject.structure
    for pbc in np.ndindex(2, 2, 2):
        mixed = atoms.copy()
        mixed.pbc = pbc
        error = raised_by(lambda mixed=mixed: subject.evaluate(mixed))  # type: ignore[misc]
        require(error is None, f"pbc={tuple(map(bool, pbc))} raises {type(error).__name__}: {error}")
    return "all eight"


@check(9)
def far_from_the_origin(subject: Subject) -> str:
    """A translation by 1024 Å changes neither results nor time."""
    far = subject.structure.copy()
    far.positions += 1024.0
    return _same_elsewhere(subject, subject.structure, far, "a place 1024 Å from the origin")


@check(9)
def huge_vacuum(subject: Subject) -> str:
    """A molecule in a box of 1000 Å costs what it costs without a box."""
    bare = subject.bare()
    boxed = bare.copy()
    boxed.cell, boxed.pbc = [1000.0] * 3, True
    return _same_elsewhere(subject, bare, boxed, "a box of 1000 Å")


def _same_elsewhere(subject: Subject, near: Atoms, far: Atoms, where: str) -> str:
    """Compare energies and forces, and the time of an evaluation."""
    expected, got = subject.evaluate(near), subject.evaluate(far)
    got.pop("stress", None)
    detail = subject.compare(got, expected, what=where)
    times = [_seconds(subject, atoms) for atoms in (near, far)]
    if times[1] > SLOWER * times[0] + SECONDS:
        raise CheckFailed(f"{where} costs {times[1] * 1e3:.0f} ms instead of {times[0] * 1e3:.0f} ms")
    return f"{detail}; {times[1] / times[0]:.1f} times the time"


def _seconds(subject: Subject, atoms: Atoms) -> float:
    """Processor time of one evaluation, the best of three, without the garbage of others being collected."""
    best, collecting = float("inf"), gc.isenabled()
    gc.disable()
    try:
        for _ in range(3):
            subject.reset()
            started = time.process_time()
            subject.evaluate(atoms)
            best = min(best, time.process_time() - started)
    finally:
        if collecting:
            gc.enable()
    return best


@check(10)
def the_past_leaves_no_trace(subject: Subject) -> str:
    """Along a walk of atoms and cell, results equal those after something entirely different was evaluated."""
    walk = _walk(subject.structure, 12)
    followed = [subject.evaluate(atoms) for atoms in walk]
    return _all_fresh(subject, walk, followed, "following a walk instead of starting afresh")


@check(10)
def edits_in_place_are_noticed(subject: Subject) -> str:
    """Atoms appended, removed, exchanged, and boundary conditions changed, all in one object."""
    atoms = subject.atoms()
    another = subject.structure[:1]
    another.positions += [0.9, 1.4, 1.2]
    edits: list[Callable[[Atoms], object]] = [
        lambda atoms: atoms.extend(another),
        lambda atoms: atoms.set_positions(atoms.positions[::-1]),
        lambda atoms: atoms.set_positions(atoms.positions * 1.02),
        lambda atoms: atoms.set_pbc(False),
        lambda atoms: atoms.pop(0),
    ]
    stages, got = [], []
    for edit in edits:
        edit(atoms)
        stages.append(atoms.copy())
        got.append({name: atoms.calc.get_property(name, atoms) for name in ("energy", "forces")})
    return _all_fresh(subject, stages, got, "editing the structure in place")


def _walk(atoms: Atoms, steps: int) -> list[Atoms]:
    """Structures whose atoms and, if there is one, cell move on by a little."""
    rng, walk = np.random.default_rng(1), []
    for _ in range(steps):
        atoms = atoms.copy()
        atoms.rattle(0.06, rng=rng)
        atoms.set_cell(atoms.cell.array @ (np.eye(3) + 0.004 * rng.standard_normal((3, 3))), scale_atoms=True)
        walk.append(atoms)
    return walk


def _all_fresh(subject: Subject, walk: list[Atoms], got: list[Results], what: str) -> str:
    """Compare results with those of a calculator that saw an unrelated structure before."""
    detail = ""
    for atoms, results in zip(walk, got, strict=True):
        subject.reset()
        subject.evaluate(subject.of(subject.structure.numbers[:1]))
        detail = subject.compare(results, subject.evaluate(atoms), what=what)
    return detail


SHORT, LONG, SCAN = 0.5, 20.0, 0.1  # Å
FLOOR = 1e-10  # eV, eV/Å: round-off


def _transformed(subject: Subject, atoms: Atoms, expected: Results, what: str) -> str:
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


CHECKS = (
    never_changes_the_callers_atoms,
    unwrapped_positions,
    left_handed_cells,
    one_atom_and_no_neighbours,
    any_boundary_conditions,
    far_from_the_origin,
    huge_vacuum,
    the_past_leaves_no_trace,
    edits_in_place_are_noticed,
    translation,
    rotation,
    permutation,
    supercell,
    continuous_at_the_cutoff,
)
