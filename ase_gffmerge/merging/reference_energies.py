r"""Step 6: one zero of energy for all specialists.

Relatives that carry the same table of reference energies count from the same zero. Tables may differ for two reasons:
each was fitted to its own data while all energies mean the same totals (the networks make up for the difference), or the
data count from different zeros, for example atomisation against total energies. The frames of both tell which: with
:math:`\delta_z = e_{k,z} - e_{1,z}`, the smaller of

.. math::

   \sum_f \bigl(E_k(f) - E_1(f)\bigr)^2 \qquad\text{and}\qquad
   \sum_f \bigl(E_k(f) - E_1(f) - \sum_z n_{fz}\,\delta_z\bigr)^2

decides, and in the second case δ is taken out of specialist k's references. The shift is that of the tables, not a fit to
the energies: a specialist's energies far from what it knows are not worth fitting.
"""

from collections.abc import Sequence

import numpy as np
from ase import Atoms
from ase.data import chemical_symbols

from ase_gffmerge.forcefield.force_field import ForceField
from ase_gffmerge.inference.batches import predict_frames


def align_references(specialists: Sequence[ForceField]) -> dict[str, dict[str, float]]:
    """Put all specialists on the first one's zero of energy, in place.

    Returns
    -------
    dict
        Per specialist the shift per element in eV that was subtracted; empty when none was needed.
    """
    first, shifts = specialists[0], {}
    frames = [atoms for specialist in specialists for atoms in specialist.calibration]
    for specialist in specialists[1:]:
        delta = _table_difference(first, specialist)
        shared = [atoms for atoms in frames if set(atoms.numbers.tolist()) <= set(delta)]
        if shared and any(delta.values()) and _counts_from_another_zero(first, specialist, shared, delta):
            for z, shift in delta.items():
                specialist.potential.references[specialist.species.index(z)] -= shift
            shifts[specialist.name] = {chemical_symbols[z]: shift for z, shift in delta.items()}
    return shifts


def _table_difference(first: ForceField, other: ForceField) -> dict[int, float]:
    """Difference of the reference energies (eV) of the elements that both know."""
    ours, theirs = (dict(zip(s.species, s.potential.references.tolist())) for s in (first, other))
    return {z: theirs[z] - ours[z] for z in ours if z in theirs}


def _counts_from_another_zero(
    first: ForceField, other: ForceField, frames: Sequence[Atoms], delta: dict[int, float]
) -> bool:
    energies = [predict_frames(specialist.potential, frames).energies for specialist in (first, other)]
    difference = energies[1] - energies[0]
    shift = np.array([sum(delta[z] for z in atoms.numbers.tolist()) for atoms in frames])
    return bool(np.square(difference - shift).sum() < np.square(difference).sum())
