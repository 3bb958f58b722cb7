r"""Whether labels of frames agree with each other and with their units.

Between two frames of the same atoms that are close, the energy must change by the work of forces and stresses,

.. math::

   \Delta E \approx -\sum_i \bar{\mathbf F}_i\cdot\Delta\mathbf r_i + \bar V\,\bar\sigma : \Delta\varepsilon ,

with means over the two frames. Factors of the two terms are fitted to pairs of consecutive frames: labels in one system of
units have factors of 1.

Frames that are far apart are held against a bound instead. Near a minimum, with a Hessian of largest eigenvalue λ,

.. math::

   \sum_i |\mathbf F_i|^2 \le 2\lambda\,(E - E_0) ,

where λ is about 290 eV/Å² for the stiffest bonds (N≡N). Energies that rise with the squared forces more slowly than any bond
allows are in a larger unit than the forces. E₀ is fitted: a number for every composition, or, where most occur once or
twice, for every element.
"""

from collections.abc import Sequence

import numpy as np
from ase import Atoms, units
from ase.stress import voigt_6_to_full_3x3_stress

MAX_PAIRS, MIN_PAIRS = 500, 5
MAX_STEP, MAX_STRAIN = 1.0, 0.1  # Å and 1: frames further apart are not compared
AGREEMENT = (0.6, 1.6)  # what anharmonicity between the frames may do
LARGEST_STRESS_WORK = 30.0  # eV per atom, volume times stress: about 500 GPa
LARGEST_CURVATURE = 1000.0  # eV/Å², more than three times that of the stiffest bonds
HARMONIC_FORCE = 30.0  # eV/Å: beyond, atoms are too close for the bound on curvatures
MAX_FRAMES, MIN_SPARE = 500, 8  # frames for that bound, and how many more than fitted numbers
ALL_ELECTRONS = (
    0.99,
    1.05,
)  # of atoms' energies; pseudopotentials in eV come near by chance (0.976 for Li3PS4)
SURE = 3.0  # standard errors

FORCE_FACTORS = {
    1 / units.Hartree: "energies in Hartree",
    1 / units.Rydberg: "energies in Rydberg",
    units.mol / units.kcal: "energies in kcal/mol",
    units.mol / units.kJ: "energies in kJ/mol",
    1 / units.Bohr: "energies and forces in atomic units (Hartree or Rydberg, and the same per Bohr)",
    units.Hartree / units.Bohr: "forces in Hartree/Bohr",
    units.Rydberg / units.Bohr: "forces in Rydberg/Bohr",
    units.kcal / units.mol: "forces in kcal/mol/Å",
    -1.0: "gradients instead of forces",
}
STRESS_FACTORS = {
    0.1 * units.GPa: "stresses in kbar",
    -0.1 * units.GPa: "stresses in kbar, positive under compression (VASP)",
    units.GPa: "stresses in GPa",
    -units.GPa: "stresses in GPa, positive under compression",
    -1.0: "stresses that are positive under compression",
}
ATOMS = dict(
    enumerate(
        (0.5, 2.862, 7.433, 14.573, 24.529, 37.689, 54.401, 74.809, 99.409, 128.547, 161.859, 199.615, 241.877,
         288.854, 340.719, 397.505, 459.482, 526.817),
        start=1,
    )
)  # fmt: skip
"""Hartree-Fock energies of atoms with the sign reversed, Hartree (Clementi & Roetti, doi:10.1016/S0092-640X(74)80016-1)."""


def implausible_units(frames: Sequence[Atoms]) -> list[str]:
    """What about the labels of frames looks like another unit or sign, each in a sentence with the factor."""
    found = []
    force_factor, stress_factor = work_factors(frames)
    if force_factor is not None and not AGREEMENT[0] < force_factor < AGREEMENT[1]:
        found.append(
            f"energies change by {force_factor:.3g} times the work of the forces{_name(force_factor, FORCE_FACTORS)}; "
            "convert the labels to eV and eV/Å"
        )
    if stress_factor is not None and not AGREEMENT[0] < stress_factor < AGREEMENT[1]:
        found.append(
            f"energies change by {stress_factor:.3g} times the work of the stresses{_name(stress_factor, STRESS_FACTORS)}; "
            "convert them to eV/Å³, positive under tension"
        )
    stresses = [(a, abs(s).max()) for a in frames if a.cell.rank == 3 and (s := _stress(a)) is not None]
    works = [stress * a.get_volume() / len(a) for a, stress in stresses]
    if stress_factor is None and works and np.median(works) > LARGEST_STRESS_WORK:
        typical = float(np.median([stress for _, stress in stresses]))
        found.append(
            f"stresses of {typical:.3g} eV/Å³ ({typical / units.GPa:.3g} GPa) are implausible; if they are in kbar, "
            f"multiply them by {0.1 * units.GPa:.4g}, if in GPa by {units.GPa:.4g}"
        )
    if not found and _in_hartree(frames):
        found.append(f"energies look like total energies in Hartree; multiply them by {units.Hartree:.4f}")
    curvature = None if found or force_factor is not None else least_curvature(frames)
    if curvature is not None and curvature > LARGEST_CURVATURE:
        found.append(
            f"energies rise so little with the forces that bonds would have curvatures of {curvature:.0f} eV/Å² (the "
            f"stiffest have about 300); if energies are in Hartree, multiply them by {units.Hartree:.4f}, if in Rydberg by "
            f"{units.Rydberg:.4f}"
        )
    return found


def least_curvature(frames: Sequence[Atoms]) -> float | None:
    """Lower bound (eV/Å²) of the curvature that squared forces and energies of frames need; ``None`` if they say nothing."""
    kept = [
        atoms
        for atoms in frames
        if len(atoms) > 1
        and _energy(atoms) is not None
        and (forces := _forces(atoms)) is not None
        and np.abs(forces).max() < HARMONIC_FORCE
    ]
    kept = kept[:: max(1, -(-len(kept) // MAX_FRAMES))]
    if len(kept) <= MIN_SPARE:
        return None
    weights = np.array([len(atoms) ** -0.5 for atoms in kept])
    elements = np.array([np.bincount(atoms.numbers, minlength=119) for atoms in kept], dtype=float)
    _, kind = np.unique(elements, axis=0, return_inverse=True)
    kind = kind.reshape(-1)
    columns = np.eye(kind.max() + 1)[kind] if 3 * (kind.max() + 1) <= len(kept) else elements
    columns = columns * weights[:, None]
    labels = [[_energy(atoms), np.square(_forces(atoms)).sum()] for atoms in kept]  # type: ignore[arg-type]
    fitted, _, rank, _ = np.linalg.lstsq(columns, np.array(labels) * weights[:, None], rcond=None)
    energy, squares = (np.array(labels) * weights[:, None] - columns @ fitted).T
    spare = len(kept) - int(rank) - 1
    if spare < MIN_SPARE or squares @ squares < 1e-9:
        return None
    slope = energy @ squares / (squares @ squares)
    error = np.sqrt(np.square(energy - slope * squares).sum() / spare / (squares @ squares))
    return float(0.5 / (slope + SURE * error)) if slope > SURE * error else None


def work_factors(frames: Sequence[Atoms]) -> tuple[float | None, float | None]:
    """Factors of the work of forces and of stresses in the changes of the energy; ``None`` where frames say nothing."""
    last: dict[tuple[bytes, bytes], Atoms] = {}
    pairs: list[tuple[float, float, float]] = []
    for atoms in frames:
        if _energy(atoms) is None or _forces(atoms) is None:
            continue
        key = (atoms.numbers.tobytes(), atoms.pbc.tobytes())
        if key in last and (pair := _work(last[key], atoms)) is not None:
            pairs.append(pair)
        last[key] = atoms
        if len(pairs) == MAX_PAIRS:
            break
    if len(pairs) < MIN_PAIRS:
        return None, None
    change, *works = np.array(pairs).T
    matters = [k for k, work in enumerate(works) if np.abs(work).max() > 1e-9]
    if not matters or np.abs(change).max() < 1e-9:
        return None, None
    matrix = np.stack([works[k] for k in matters], axis=1)
    factors = np.linalg.lstsq(matrix / np.abs(matrix).max(0), change, rcond=None)[0] / np.abs(matrix).max(0)
    parts, total = matrix * factors, float(np.square(change).sum())
    rest = float(np.square(change - parts.sum(axis=1)).sum())
    if rest > 0.1 * total:
        return None, None
    known = {
        k: float(factor)
        for k, factor, part in zip(matters, factors, parts.T, strict=True)
        if np.square(part).sum() > max(0.05 * total, 10 * rest)
    }
    return known.get(0), known.get(1)


def _work(first: Atoms, second: Atoms) -> tuple[float, float, float] | None:
    """Change of the energy between frames, work of the forces, work of the stresses; ``None`` if they are far apart."""
    strain, stress_work = np.zeros((3, 3)), 0.0
    forces = 0.5 * (_forces(first) + _forces(second))  # type: ignore[operator]
    if first.pbc.all() and first.cell.rank == second.cell.rank == 3:
        moved = second.get_scaled_positions(wrap=False) - first.get_scaled_positions(wrap=False)
        step = (moved - np.round(moved)) @ (0.5 * (first.cell.array + second.cell.array))
        gradient = np.linalg.solve(first.cell.array, second.cell.array) - np.eye(3)
        strain = 0.5 * (gradient + gradient.T)
        if np.abs(strain).max() > 1e-8:
            stresses = [_stress(first), _stress(second)]
            if stresses[0] is None or stresses[1] is None:
                return None
            volume = 0.5 * (first.get_volume() + second.get_volume())
            stress_work = float(volume * (0.5 * (stresses[0] + stresses[1]) * strain).sum())
    elif np.allclose(first.cell.array, second.cell.array):
        step = second.positions - first.positions
    else:
        return None
    if np.abs(step).max() > MAX_STEP or np.abs(strain).max() > MAX_STRAIN:
        return None
    change = float(_energy(second) - _energy(first))  # type: ignore[operator]
    return change, -float((forces * step).sum()), stress_work


def _in_hartree(frames: Sequence[Atoms]) -> bool:
    """Whether energies are those of all electrons of light elements in Hartree."""
    ratios = [
        -energy / sum(ATOMS[z] for z in atoms.numbers.tolist())
        for atoms in frames
        if (energy := _energy(atoms)) is not None and set(atoms.numbers.tolist()) <= ATOMS.keys()
    ]
    return bool(ratios) and ALL_ELECTRONS[0] < float(np.median(ratios)) < ALL_ELECTRONS[1]


def _name(factor: float, names: dict[float, str]) -> str:
    """The unit that a factor stands for, to 20 %."""
    known = min(names, key=lambda known: abs(factor / known - 1))
    return f", as for {names[known]}" if abs(factor / known - 1) < 0.2 else ""


def _results(atoms: Atoms) -> dict[str, np.ndarray]:
    return atoms.calc.results if atoms.calc is not None else {}


def _energy(atoms: Atoms) -> float | None:
    energy = _results(atoms).get("energy")
    return None if energy is None else float(energy)


def _forces(atoms: Atoms) -> np.ndarray | None:
    return _results(atoms).get("forces")


def _stress(atoms: Atoms) -> np.ndarray | None:
    stress = _results(atoms).get("stress")
    return None if stress is None else voigt_6_to_full_3x3_stress(np.asarray(stress, dtype=float))
