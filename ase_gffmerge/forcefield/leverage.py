r"""How far the features of an atom are from those of the calibration atoms: their leverage, the extrapolation grade.

The leverage of an atom's features z with respect to the calibration atoms of its element,

.. math::

   g_i = \frac{1}{s_Z}\sqrt{z_i^T (G_Z + \mu_Z)^{-1} z_i},\qquad G_Z = \sum_{j:\,Z_j=Z} z_j z_j^T ,

is the standard deviation of a linear readout's energy of that atom, up to the noise (last-layer prediction rigidity, Bigi,
Chong, Ceriotti & Grasselli, arXiv 2403.02251; D-optimality in Podryabinkin & Shapeev, doi:10.1016/j.commatsci.2017.08.031).

The scale :math:`s_Z` puts the furthest calibration atom at 1, where every frame is measured by the others. With the whitened
features :math:`Y_f` of the atoms of one element in frame f and :math:`H_f = Y_f Y_f^T`, taking the frame out of the Gram
matrix turns their leverages into (Woodbury)

.. math:: \operatorname{diag}\bigl(H_f (1 - H_f)^{-1}\bigr) ,

so one factorization per element serves all frames. The largest of these leverages is the square of the scale.

What was tried, on rMD17 (ranked by md_examples/benchmarks/benchmark_extrapolation.py): the leverage of the features z that
enter the readout, of the 1024 random features of a merged readout and of their leading eigenvectors, with and without
displaced copies of the frames, with relative ridges from 1e-2 to 1e-10. They rank errors equally well (Spearman 0.91 to
0.94 over structures of all specialists), except that displaced copies blur the differences among ordinary frames; z is the
smallest.
"""

from collections.abc import Sequence
from functools import partial

import torch
from ase import Atoms
from torch import Tensor, nn

from ase_gffmerge.graphs import batch_graphs, build_graph
from ase_gffmerge.graphs.graph import edge_vectors
from ase_gffmerge.models import Potential
from ase_gffmerge.runtime.devices import chunks, in_parts

RIDGE = 1e-4
"""μ in units of the mean eigenvalue of the Gram matrix."""

MAX_FEATURES = 256
"""Only so many of the last blocks' scalars enter (at least one block): a matrix of this size is stored per element."""

MAX_ATOMS = 500
"""Atoms per batch."""


class ExtrapolationGrade(nn.Module):
    r"""Extrapolation grade :math:`g_i = \lVert z_i W_{Z_i}\rVert` per atom.

    Parameters
    ----------
    species
        Atomic numbers among the calibration atoms. Atoms of any other element have an infinite grade.
    whitening
        One matrix W per element (n_species, d, d): :math:`W W^T = (G + \mu)^{-1} / s^2`.
    deviations
        :math:`\alpha_E` and :math:`\alpha_F` (2,), which make standard deviations of leverages (:mod:`.uncertainty`);
        ``None`` where nothing calibrated them.
    """

    species: Tensor
    whitening: Tensor
    deviations: Tensor | None
    row: Tensor

    def __init__(self, species: Tensor, whitening: Tensor, deviations: Tensor | None = None):
        super().__init__()
        self.register_buffer("species", species)
        self.register_buffer("whitening", whitening)
        self.register_buffer("deviations", deviations)
        row = torch.full((119,), len(species), device=species.device)
        row[species] = torch.arange(len(species), device=species.device)
        self.register_buffer("row", row, persistent=False)

    def inputs(self, scalars: Sequence[Tensor]) -> Tensor:
        """Features z (n_atoms, d): the last d of all blocks' scalars, each (n_atoms, channels)."""
        return torch.cat(list(scalars), dim=-1)[:, -self.whitening.shape[1] :].to(self.whitening.dtype)

    def whitened(self, scalars: Sequence[Tensor], atomic_numbers: Tensor) -> Tensor:
        """Whitened features :math:`y_i = z_i W_{Z_i}` (n_atoms, d), infinite for elements without a matrix."""
        z, row = self.inputs(scalars), self.row[atomic_numbers]
        last = len(self.species) - 1
        y = torch.matmul(z, self.whitening)[row.clamp(max=last), torch.arange(len(z), device=z.device)]
        return y.masked_fill((row > last)[:, None], torch.inf)

    def forward(self, scalars: Sequence[Tensor], atomic_numbers: Tensor) -> Tensor:
        """Grades (n_atoms,); 1 is the edge of the calibration set."""
        return self.whitened(scalars, atomic_numbers).norm(dim=-1)


def fit_extrapolation_grade(
    potential: Potential, calibration: Sequence[Sequence[Atoms]]
) -> ExtrapolationGrade | None:
    """Extrapolation grade of a potential with respect to calibration frames.

    Parameters
    ----------
    potential
        Its last scalars are the features.
    calibration
        Frames of every specialist; a specialist's position in the sequence is its index for conditioned potentials.

    Returns
    -------
    ExtrapolationGrade or None
        Its matrices are float32; ``None`` when there are no frames.
    """
    if not any(calibration):
        return None
    return grade_of_features(*calibration_features(potential, calibration))


def grade_of_features(z: Tensor, numbers: Tensor, frame: Tensor) -> ExtrapolationGrade:
    """Extrapolation grade with respect to atoms, see :func:`calibration_features`.

    Parameters
    ----------
    z, numbers, frame
        Features (n_atoms, d), atomic numbers and frame indices (n_atoms,), the latter ascending.
    """
    species = torch.unique(numbers)
    whitening = [_whitening(z[numbers == number], frame[numbers == number]) for number in species]
    return ExtrapolationGrade(species, torch.stack(whitening).float()).eval()


@torch.no_grad()
def calibration_features(
    potential: Potential, calibration: Sequence[Sequence[Atoms]]
) -> tuple[Tensor, Tensor, Tensor]:
    """Features z (n_atoms, d) in float64, atomic numbers (n_atoms,) and frame indices (n_atoms,) of all frames."""
    sizes = [len(atoms) for frames in calibration for atoms in frames]
    rows: list[Tensor] = []
    numbers: list[Tensor] = []
    for k, frames in enumerate(calibration):
        for chunk in chunks(frames, MAX_ATOMS):
            parts = in_parts(partial(_features, potential, index=k), chunk, device=potential.device)
            rows += [z for z, _ in parts]
            numbers += [elements for _, elements in parts]
    frame = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes)).to(potential.device)
    return torch.cat(rows), torch.cat(numbers), frame


def _features(potential: Potential, frames: Sequence[Atoms], *, index: int) -> tuple[Tensor, Tensor]:
    """Features z and atomic numbers of one batch of the specialist ``index``."""
    blocks = max(1, MAX_FEATURES // potential.hyper.channels)
    cutoff, dtype = potential.hyper.cutoff, potential.dtype
    graphs = [build_graph(atoms, cutoff, dtype=dtype, specialist=index) for atoms in frames]
    graph = batch_graphs(graphs).to(potential.device)
    return torch.cat(
        potential.features(edge_vectors(graph), graph)[-blocks:], dim=-1
    ).double(), graph.atomic_numbers


def _whitening(z: Tensor, frame: Tensor) -> Tensor:
    """Matrix W (d, d) of one element from its features (n_atoms, d) and the frames they come from."""
    gram = z.T @ z
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    factor = torch.linalg.cholesky(gram)
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    whitening = torch.linalg.solve_triangular(factor, identity, upper=False).T
    return whitening / left_out_leverages(z @ whitening, frame).max().sqrt()


def left_out_leverages(y: Tensor, frame: Tensor) -> Tensor:
    """Leverages (n_atoms,) of whitened features (n_atoms, d), each atom judged by the other frames.

    An element that occurs in one frame only is judged by that frame.
    """
    _, sizes = torch.unique_consecutive(frame, return_counts=True)
    if len(sizes) == 1:
        return y.square().sum(dim=1)
    leverages = []
    for rows in y.split(sizes.tolist()):
        h = rows @ rows.T
        rest = torch.eye(len(h), dtype=h.dtype, device=h.device) - h
        leverages.append(torch.linalg.solve(rest, h).diagonal())
    return torch.cat(leverages)
