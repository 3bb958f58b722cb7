"""Relaxation and vibrations: the merged potential has minima, and real frequencies there."""

import tempfile
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.optimize import BFGS
from ase.vibrations import Vibrations

from ase_gffmerge import GFFMergeCalculator
from ase_gffmerge.evaluation.bundled import bundled_test_frames

NAMES = ("rmd17-ethanol", "rmd17-malonaldehyde")
TOLERANCE = 20.0
"""Rotations and translations may have frequencies up to this, cm^-1, by finite differences."""


def frequencies(atoms: Atoms, folder: Path) -> np.ndarray:
    """Frequencies in cm^-1, ascending; imaginary ones as negative numbers."""
    vibrations = Vibrations(atoms, name=str(folder), delta=0.005)
    vibrations.run()
    values = vibrations.get_frequencies()
    return np.sort(values.real - values.imag)


def main() -> None:
    """Relax both molecules with one calculator and analyse their vibrations."""
    calc = GFFMergeCalculator(NAMES, dtype="float64")
    for name in NAMES:
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


if __name__ == "__main__":
    main()
