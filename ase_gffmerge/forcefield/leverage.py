r"""How far the features of an atom are from those a merge was calibrated on.

The leverage of an atom's features z with respect to the calibration atoms of its element,

.. math::

   g_i = \frac{1}{s_Z}\sqrt{z_i^T (G_Z + \mu_Z)^{-1} z_i},\qquad G_Z = \sum_{j:\,Z_j=Z} z_j z_j^T ,

is the standard deviation of a linear readout's energy of that atom, up to the noise (last-layer prediction rigidity, Bigi,
Chong, Ceriotti & Grasselli, arXiv 2403.02251; D-optimality in Podryabinkin & Shapeev, doi:10.1016/j.commatsci.2017.08.031).
The scale :math:`s_Z` puts the furthest calibration atom at 1 (:mod:`ase_gffmerge.forcefield.leverage_fit`).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class ExtrapolationGrade(nn.Module):
    r"""Extrapolation grade :math:`g_i = \lVert z_i W_{Z_i}\rVert` per atom.

    Parameters
    ----------
    species
        Atomic numbers among the calibration atoms. Atoms of any other element have an infinite grade.
    whitening
        One matrix W per element (n_species, d, d): :math:`W W^T = (G + \mu)^{-1} / s^2`.
    """

    species: Tensor
    whitening: Tensor
    row: Tensor

    def __init__(self, species: Tensor, whitening: Tensor):
        super().__init__()
        self.register_buffer("species", species)
        self.register_buffer("whitening", whitening)
        row = torch.full((119,), len(species), device=species.device)
        row[species] = torch.arange(len(species), device=species.device)
        self.register_buffer("row", row, persistent=False)

    def inputs(self, scalars: Sequence[Tensor]) -> Tensor:
        """Features z (n_atoms, d): the last d of all blocks' scalars, each (n_atoms, channels)."""
        return torch.cat(list(scalars), dim=-1)[:, -self.whitening.shape[1] :].to(self.whitening.dtype)

    def forward(self, scalars: Sequence[Tensor], atomic_numbers: Tensor) -> Tensor:
        """Grades (n_atoms,); 1 is the edge of the calibration set."""
        z = self.inputs(scalars)
        lengths = torch.matmul(z, self.whitening).norm(dim=-1)
        lengths = torch.cat([lengths, lengths.new_full((1, len(z)), torch.inf)])
        return lengths.gather(0, self.row[atomic_numbers][None]).squeeze(0)
