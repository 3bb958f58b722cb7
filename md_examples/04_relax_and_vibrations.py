"""Relaxation, vibrations, free energy: the merged potential has minima, and thermochemistry from frequencies there."""

import tempfile
from pathlib import Path

import numpy as np
from ase import Atoms, units
from ase.optimize import BFGS
from ase.thermochemistry import HarmonicThermo, IdealGasThermo
from ase.vibrations import Vibrations

from ase_gffmerge import GFFMergeCalculator
from ase_gffmerge.forcefield.force_field import bundled_test_frames

SYMMETRY = {"rmd17-ethanol": 1, "rmd17-malonaldehyde": 2}
"""Rotational symmetry numbers; malonaldehyde is the dialdehyde, with an axis of order two."""
TOLERANCE = 20.0
"""Rotations and translations may have frequencies up to this, cm^-1, by finite differences."""
ETHANOL_ENTROPY = 282.0
"""Measured, of the gas at 298 K and 1 bar, J/mol/K."""


def frequencies(atoms: Atoms, folder: Path) -> np.ndarray:
    """Frequencies in cm^-1, ascending; imaginary ones as negative numbers."""
    vibrations = Vibrations(atoms, name=str(folder), delta=0.002)
    vibrations.run()
    values = vibrations.get_frequencies()
    return np.sort(values.real - values.imag)


def zero_point_energy(atoms: Atoms, quanta: np.ndarray) -> float:
    """Zero-point energy in eV; above it, vibrations tend to kT each at high temperature."""
    thermo = HarmonicThermo(quanta, potentialenergy=atoms.get_potential_energy(), ignore_imag_modes=False)
    hot = 1e5  # K
    thermal = thermo.get_internal_energy(hot, verbose=False) - atoms.get_potential_energy()
    assert abs(thermal / (len(quanta) * units.kB * hot) - 1) < 1e-3  # (h nu / kT)^2 / 12 is below 2e-4
    return thermo.get_ZPE_correction()


def ideal_gas(atoms: Atoms, quanta: np.ndarray, symmetry: int) -> tuple[float, float]:
    """Entropy in J/mol/K, and what the Gibbs energy adds to the potential energy in eV, at 298.15 K and 1 bar."""
    thermo = IdealGasThermo(quanta, "nonlinear", atoms=atoms, symmetrynumber=symmetry, spin=0)
    conditions = {"temperature": 298.15, "pressure": 1e5, "verbose": False}
    return thermo.get_entropy(**conditions) * units.mol / units.J, thermo.get_gibbs_energy(**conditions)


def main() -> None:
    """Relax both molecules with one calculator and analyse their vibrations."""
    calc = GFFMergeCalculator(list(SYMMETRY), dtype="float64")
    for name, symmetry in SYMMETRY.items():
        atoms = bundled_test_frames(name)[0]
        atoms.calc = calc
        with BFGS(atoms, logfile=None) as optimiser:
            converged = optimiser.run(fmax=1e-4, steps=500)
        with tempfile.TemporaryDirectory() as folder:
            waves = frequencies(atoms, Path(folder) / "vibrations")
        print(
            f"{name}: relaxed in {optimiser.nsteps} steps; rigid motions within {np.abs(waves[:6]).max():.1f} "
            f"cm^-1, vibrations from {waves[6]:.0f} to {waves[-1]:.0f} cm^-1"
        )
        assert converged
        assert np.abs(waves[:6]).max() < TOLERANCE < waves[6]
        assert 2500 < waves[-1] < 4200  # a stretch of C-H or O-H

        quanta = waves[6:] * units.invcm
        zero_point, (entropy, gibbs) = zero_point_energy(atoms, quanta), ideal_gas(atoms, quanta, symmetry)
        print(
            f"  zero-point energy {zero_point:.3f} eV; at 298 K and 1 bar: entropy {entropy:.0f} J/mol/K, "
            f"Gibbs energy {gibbs:+.3f} eV above the minimum"
        )
        if name == "rmd17-ethanol":
            # One conformer; the gas has three, which add up to R ln 3 = 9 J/mol/K, and softer torsions
            assert ETHANOL_ENTROPY - 20 < entropy < ETHANOL_ENTROPY + 5


if __name__ == "__main__":
    main()
