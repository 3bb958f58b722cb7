"""Frames labelled by GFN2-xTB: molecules at a temperature, and pairs of molecules that touch.

Labels cost milliseconds (tblite), so that systems no data set covers can be put to the test. The method: C. Bannwarth,
S. Ehlert and S. Grimme, J. Chem. Theory Comput. 15, 1652 (2019), doi:10.1021/acs.jctc.8b01176.
"""

import numpy as np
from ase import Atoms
from ase.calculators.calculator import Calculator
from ase.calculators.singlepoint import SinglePointCalculator
from ase.optimize import BFGS
from scipy.spatial.distance import cdist
from scipy.spatial.transform import Rotation

from ase_gffmerge.dynamics.ase_md import run_md
from ase_gffmerge.dynamics.integrators import Conditions
from ase_gffmerge.dynamics.stopping import bonds_intact, find_bonds

LEVEL_OF_THEORY = "GFN2-xTB"
TIMESTEP = 0.5
"""fs."""
HYDROGEN_BOND = 2.8
"""Å between the oxygens of a new hydrogen bond."""
CONTACT = 2.8
"""Å; molecules whose closest atoms are further apart have parted."""
SMALLEST_GAP = 1.6
"""Å; docked molecules whose closest atoms are nearer overlap."""


def xtb() -> Calculator:
    """A fresh GFN2-xTB calculator."""
    from tblite.ase import TBLite

    return TBLite(method=LEVEL_OF_THEORY, verbosity=0)


def labelled(atoms: Atoms) -> Atoms:
    """Copy of ``atoms`` with its energy (eV) and forces (eV/Å) by GFN2-xTB."""
    return snapshot(Atoms(atoms.numbers, atoms.positions, calculator=xtb()))


def snapshot(atoms: Atoms) -> Atoms:
    """Copy of ``atoms`` that keeps what its calculator says; a constraint that dynamics set is not part of the label."""
    copy = Atoms(atoms.numbers, atoms.positions)
    forces = atoms.get_forces(apply_constraint=False)
    copy.calc = SinglePointCalculator(copy, energy=atoms.get_potential_energy(), forces=forces)
    return copy


def relaxed(start: Atoms, *, steps: int) -> Atoms:
    """Copy with a GFN2-xTB calculator after at most ``steps`` steps of relaxation."""
    atoms = Atoms(start.numbers, start.positions, calculator=xtb())
    with BFGS(atoms, logfile=None) as optimiser:
        optimiser.run(fmax=0.1, steps=steps)
    return atoms


def sampled(
    atoms: Atoms, n: int, *, interval: int, temperature: float, seed: int, equilibration: int
) -> list[Atoms]:
    """Run Langevin dynamics on ``atoms`` in place, and return labelled frames.

    Parameters
    ----------
    atoms
        With a calculator.
    n, interval
        How many frames, and the steps between two of them.
    temperature
        K.
    seed
        Of the velocities and of the thermostat.
    equilibration
        Steps before the first frame.
    """
    frames: list[Atoms] = []
    conditions = Conditions(ensemble="nvt", temperature=temperature, timestep=TIMESTEP)
    run_md(atoms, conditions, steps=equilibration, seed=2 * seed)
    run_md(
        atoms,
        conditions,
        steps=max(1, (n - 1) * interval),
        interval=interval,
        seed=2 * seed + 1,
        thermalize=False,
        on_sample=lambda _: frames.append(snapshot(atoms)),
    )
    return frames[:n]


def docked(first: Atoms, second: Atoms, rng: np.random.Generator) -> Atoms:
    """Both molecules in random orientations, an oxygen of each at hydrogen-bond distance, without overlap."""
    while True:
        a, b = (_turned(atoms, rng) for atoms in (first, second))
        direction = rng.standard_normal(3)
        direction *= HYDROGEN_BOND / np.linalg.norm(direction)
        b.positions += _oxygen(a, rng) + direction - _oxygen(b, rng)
        if cdist(a.positions, b.positions).min() > SMALLEST_GAP:
            return a + b


def _turned(atoms: Atoms, rng: np.random.Generator) -> Atoms:
    rotation = Rotation.random(random_state=np.random.RandomState(rng.integers(2**31)))
    return Atoms(atoms.numbers, rotation.apply(atoms.positions - atoms.positions.mean(axis=0)))


def _oxygen(atoms: Atoms, rng: np.random.Generator) -> np.ndarray:
    """Position (3,) of one of the oxygens."""
    return atoms.positions[rng.choice(np.flatnonzero(atoms.numbers == 8))]


def in_contact(dimer: Atoms, n_first: int) -> bool:
    """Whether the first ``n_first`` atoms touch the others."""
    return cdist(dimer.positions[:n_first], dimer.positions[n_first:]).min() < CONTACT


def dimer_frames(
    first: Atoms,
    second: Atoms,
    *,
    orientations: int,
    frames_each: int,
    interval: int,
    temperature: float,
    equilibration: int,
) -> list[Atoms]:
    """Labelled frames of two molecules that touch, from dynamics started in several orientations.

    Frames whose molecules have parted, or whose bonds are not those of the start any more, are left out.

    Parameters
    ----------
    first, second
        The molecules; their atoms come in this order.
    orientations
        How many starts.
    frames_each, interval, equilibration
        Frames per start, the steps between two of them, and the steps before the first.
    temperature
        K.
    """
    frames: list[Atoms] = []
    rng = np.random.default_rng(0)
    for seed in range(orientations):
        start = docked(first, second, rng)
        bonds = find_bonds(start)
        run = sampled(
            relaxed(start, steps=30),
            frames_each,
            interval=interval,
            temperature=temperature,
            seed=seed,
            equilibration=equilibration,
        )
        frames += [atoms for atoms in run if in_contact(atoms, len(first)) and bonds_intact(atoms, bonds)]
    return frames
