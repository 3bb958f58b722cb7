r"""How far specialists differ about the forces on an atom.

.. math:: \sigma_i = \sqrt{\frac1K \sum_k \lVert\mathbf F_{k,i} - \bar{\mathbf F}_i\rVert^2}

Specialists that know different systems are no ensemble: where only one of them is at home, they disagree although the
merged potential is good, and far from all of them they may err together. Their disagreement says whose territory an atom
is in rather than how good the merged potential is; for that there is the extrapolation grade.
"""

from collections.abc import Sequence

import numpy as np
import torch
from ase import Atoms

from ase_gffmerge.errors import StructureError
from ase_gffmerge.forcefield.force_field import ForceField
from ase_gffmerge.graphs import build_graph
from ase_gffmerge.inference.predict import predict_graded


def force_disagreement(specialists: Sequence[ForceField], atoms: Atoms) -> np.ndarray:
    """Standard deviation of the specialists' forces, (n_atoms,) in eV/Å, over those that know all elements.

    Raises
    ------
    StructureError
        When fewer than two of them know all elements.
    """
    able = [s for s in specialists if set(atoms.numbers.tolist()) <= set(s.species)]
    if len(able) < 2:
        known = ", ".join(s.name for s in able) or "none"
        raise StructureError(
            f"disagreement needs two specialists that know every element of {atoms.get_chemical_formula()}, but only "
            f"{known} does; use the extrapolation grade instead"
        )
    forces = torch.stack([_forces(specialist, atoms) for specialist in able])
    return (forces - forces.mean(dim=0)).square().sum(dim=2).mean(dim=0).sqrt().numpy()


def _forces(specialist: ForceField, atoms: Atoms) -> torch.Tensor:
    """Forces (n_atoms, 3) of one specialist, which reads no specialist index."""
    bare = Atoms(atoms.numbers, positions=atoms.positions, cell=atoms.cell, pbc=atoms.pbc)
    graph = build_graph(bare, specialist.cutoff).to(specialist.potential.device)
    return predict_graded(specialist, graph)[0].forces.double().cpu()
