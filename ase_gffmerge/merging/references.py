r"""Step 6: one zero of energy for all specialists.

Specialists of one theory may carry different tables of reference energies and still mean the same total energies; then
nothing needs to be done. If their energies differ by whole electronvolts per atom, they count from different zeros (for
example atomisation against total energies): the difference is fitted per element on all calibration frames,

.. math:: \delta_k = \arg\min_\delta \sum_f \bigl(E_k(f) - E_1(f) - \sum_z n_{fz}\,\delta_z\bigr)^2 ,

and taken out of specialist k's references.
"""

from collections.abc import Sequence

import numpy as np
from ase.data import chemical_symbols

from ase_gffmerge.evaluation.errors import predict_frames
from ase_gffmerge.specialist import Specialist

ZERO_TOLERANCE = 1.0
"""Mean energy difference in eV per atom above which two specialists count from different zeros."""


def align_references(specialists: Sequence[Specialist]) -> dict[str, dict[str, float]]:
    """Put all specialists on the first one's zero of energy, in place.

    Returns
    -------
    dict
        Per specialist the shift per element in eV that was subtracted; empty when none was needed.
    """
    first, shifts = specialists[0], {}
    frames = [atoms for specialist in specialists for atoms in specialist.calibration]
    for specialist in specialists[1:]:
        shared = [a for a in frames if set(a.numbers) <= set(first.species) & set(specialist.species)]
        if not shared:
            continue
        sizes = np.array([len(atoms) for atoms in shared])
        difference = (
            predict_frames(specialist.potential, shared).energies
            - predict_frames(first.potential, shared).energies
        )
        if abs(np.mean(difference / sizes)) < ZERO_TOLERANCE:
            continue
        elements = sorted({int(z) for atoms in shared for z in atoms.numbers})
        counts = np.array(
            [[np.count_nonzero(atoms.numbers == z) for z in elements] for atoms in shared], dtype=float
        )
        delta = np.linalg.lstsq(counts, difference, rcond=1e-10)[0]
        for z, shift in zip(elements, delta, strict=True):
            specialist.potential.references[specialist.species.index(z)] -= float(shift)
        shifts[specialist.name] = {
            chemical_symbols[z]: float(d) for z, d in zip(elements, delta, strict=True)
        }
    return shifts
