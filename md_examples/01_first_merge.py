"""First merge: two specialists become one potential, a calculator like any other in ASE.

The merge happens when the calculator is made, and is found in the cache from then on.
"""

import numpy as np
from ase import Atoms

from ase_gffmerge import GFFMergeCalculator
from ase_gffmerge.forcefield.force_field import bundled_test_frames

NAMES = ("rmd17-ethanol", "rmd17-malonaldehyde")
ALLOWED = 2.0
"""Largest force error of the merged potential, in units of the specialist's own."""


def force_mae(calc: GFFMergeCalculator, frames: list[Atoms]) -> float:
    """Mean absolute force error in eV/Å against the labels of ``frames``."""
    errors = []
    for labelled in frames:
        atoms = labelled.copy()
        atoms.calc = calc
        errors.append(np.abs(atoms.get_forces() - labelled.get_forces()).mean())
    return float(np.mean(errors))


def main() -> None:
    """Merge and compare with the specialists on frames that nobody was trained on."""
    merged = GFFMergeCalculator(NAMES)
    print(f"merged {' and '.join(NAMES)} (from the cache: {merged.cache_hit}): {merged.report.verdict}")
    for name in NAMES:
        frames = bundled_test_frames(name)
        own, shared = force_mae(GFFMergeCalculator(name), frames), force_mae(merged, frames)
        print(f"{name}: force MAE {1000 * own:.1f} meV/Å alone, {1000 * shared:.1f} meV/Å merged")
        assert shared < ALLOWED * own


if __name__ == "__main__":
    main()
