"""A crystal: equation of state, relaxation of the cell, and phonons of copper and of silver, each against EMT.

One merged force field learnt both metals from rattled cells with EMT labels (``emt_crystals.py``). None of the numbers below
was among them, and EMT itself says what they should be.

    python md_examples/08_crystal.py [--plot dispersion.png]
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
from ase import Atoms, units
from ase.build import bulk
from ase.calculators.calculator import Calculator
from ase.calculators.emt import EMT
from ase.eos import EquationOfState
from ase.filters import FrechetCellFilter
from ase.optimize import BFGS
from ase.phonons import Phonons
from emt_crystals import LATTICE, merged_emt
from matplotlib.figure import Figure

SUPERCELL = (5, 5, 5)  # 125 atoms; half of it is further than two neighbour shells of EMT's cutoff
TO_THZ = 1 / (1e12 * units._hplanck / units._e)  # eV to THz


def equation_of_state(calc: Calculator, symbol: str) -> tuple[float, float]:
    """Lattice constant (Å) and bulk modulus (GPa) from a Birch-Murnaghan fit to 9 volumes."""
    volumes, energies = [], []
    for a in LATTICE[symbol] * np.linspace(0.97, 1.03, 9):
        atoms = bulk(symbol, a=a)
        atoms.calc = calc
        volumes.append(atoms.get_volume())
        energies.append(atoms.get_potential_energy())
    volume, _, modulus = EquationOfState(volumes, energies, eos="birchmurnaghan").fit()
    return (4 * volume) ** (1 / 3), modulus / units.GPa


def relaxed_cell(calc: Calculator, symbol: str) -> Atoms:
    """Relax atoms and cell together from a crystal that is stretched, sheared and rattled."""
    atoms = bulk(symbol, a=LATTICE[symbol], cubic=True)
    strain = np.array([[0.03, 0.02, 0.0], [0.0, -0.02, 0.01], [0.0, 0.0, 0.01]])
    atoms.set_cell(atoms.cell.array @ (np.eye(3) + strain), scale_atoms=True)
    atoms.rattle(0.05, rng=np.random.default_rng(0))
    atoms.calc = calc
    with BFGS(FrechetCellFilter(atoms), logfile=None) as optimiser:
        assert optimiser.run(fmax=1e-4, steps=200)
    return atoms


def phonons(calc: Calculator, symbol: str, a: float) -> Phonons:
    """Force constants from displaced atoms of a supercell; the acoustic sum rule is not imposed on them."""
    crystal = bulk(symbol, a=a)
    with tempfile.TemporaryDirectory() as folder:
        waves = Phonons(crystal, calc, supercell=SUPERCELL, delta=0.01, name=Path(folder) / "phonons")
        waves.run()
        waves.read(acoustic=False)
    return waves


def frequencies(waves: Phonons) -> np.ndarray:
    """Frequencies (n_wave_vectors, 3) in THz from Γ through the Brillouin zone; imaginary ones are negative."""
    path = waves.atoms.cell.bandpath("GXWLGK", npoints=100)
    return waves.get_band_structure(path, verbose=False).energies[0] * TO_THZ


def check_lattice(calc: Calculator, symbol: str) -> tuple[float, float]:
    """Compare equations of state; return the lattice constants in Å of ``calc`` and of EMT."""
    (a, modulus), (a_emt, modulus_emt) = equation_of_state(calc, symbol), equation_of_state(EMT(), symbol)
    print(f"{symbol}: a = {a:.4f} Å ({a_emt:.4f} by EMT), bulk modulus {modulus:.1f} GPa ({modulus_emt:.1f})")
    # Zero of a slope and a curvature, of an energy learnt from forces that are off by about one per cent
    assert abs(a / a_emt - 1) < 0.002
    assert abs(modulus / modulus_emt - 1) < 0.05
    return a, a_emt


def check_relaxed(atoms: Atoms, a: float) -> None:
    """The stress vanishes where the equation of state has its minimum, and the cell is cubic again."""
    stress = np.abs(atoms.get_stress()).max() / units.GPa
    lengths, angles = atoms.cell.lengths(), atoms.cell.angles()
    print(f"  relaxed cell: {lengths.round(4)} Å, {angles.round(3)}°, largest stress {stress:.0e} GPa")
    assert stress < 2e-3  # fmax of 1e-4 eV over the volume of 4 atoms is 3e-4 GPa
    assert np.abs(lengths - a).max() < 1e-3  # energies were fitted over 6 %, with third-order strain at most
    assert np.abs(angles - 90).max() < 0.02


def check_phonons(waves: Phonons, expected: np.ndarray) -> np.ndarray:
    """Acoustic sum rule, three modes without frequency at Γ, real ones elsewhere, all close to EMT's."""
    values = frequencies(waves)
    gamma = np.abs(values[:1]).max()
    away = np.abs(expected).min(axis=1) > 0.5
    sum_rule = np.abs(waves.get_force_constant().sum(axis=0)).max()
    difference = np.abs(values - expected).max()
    print(
        f"  phonons: force constants add up to {sum_rule:.0e} eV/Å^2; {gamma:.0e} THz at Γ, up to {values.max():.2f} THz "
        f"({expected.max():.2f} by EMT), nowhere off by more than {difference:.2f} THz"
    )
    assert sum_rule < 1e-10  # moving the whole crystal costs nothing: round-off of forces over 0.01 Å
    assert gamma < 1e-4  # root of that round-off over the mass
    assert values[away].min() > 0
    assert difference < 0.05 * expected.max()  # as curvatures: within some per cent
    return values


def draw(curves: dict[str, tuple[np.ndarray, np.ndarray]], path: Path) -> None:
    """Dispersion of every metal: merged and EMT."""
    figure = Figure(figsize=(8, 3.5), layout="constrained")
    for axes, (symbol, (values, expected)) in zip(
        figure.subplots(1, len(curves)), curves.items(), strict=True
    ):
        reference = axes.plot(expected, color="black", linewidth=1)
        merged = axes.plot(values, color="tab:red", linewidth=1, linestyle="--")
        axes.legend([reference[0], merged[0]], ["EMT", "merged"])
        axes.set(title=symbol, xlabel="Γ, X, W, L, Γ, K", ylabel="frequency (THz)", xticks=[])
    figure.savefig(path)


def main(plot: Path | None) -> None:
    """Compare the merged force field with EMT."""
    calc, curves = merged_emt(), {}
    for symbol in LATTICE:
        a, a_emt = check_lattice(calc, symbol)
        check_relaxed(relaxed_cell(calc, symbol), a)
        expected = frequencies(phonons(EMT(), symbol, a_emt))
        curves[symbol] = check_phonons(phonons(calc, symbol, a), expected), expected
    if plot:
        draw(curves, plot)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--plot", type=Path, help="write the phonon dispersion to this file")
    main(**vars(parser.parse_args()))
