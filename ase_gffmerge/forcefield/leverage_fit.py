r"""The extrapolation gauge of a merge, from the features of all calibration atoms.

The scale of the grade comes from the calibration frames themselves, each judged by the others. With the whitened features
:math:`Y_f` of the atoms of one element in frame f and :math:`H_f = Y_f Y_f^T`, taking the frame out of the Gram matrix
turns their leverages into (Woodbury)

.. math:: \operatorname{diag}\bigl(H_f (1 - H_f)^{-1}\bigr) ,

so one factorisation per element serves all frames. The largest of these leverages is the square of the scale :math:`s_Z`.

What was tried, on rMD17 (ranked by md_examples/benchmarks/benchmark_extrapolation.py): the leverage of the features z
that enter the readout, of the widened readout's 1024 random features and of their leading eigenvectors, with and without
displaced copies of the frames, with relative ridges from 1e-2 to 1e-10. They rank errors equally well (Spearman 0.91 to
0.94 over the whole mixture), except that displaced copies blur the differences among ordinary frames; z is the smallest.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from ase import Atoms
from torch import Tensor

from ase_gffmerge.forcefield.force_field import ForceField
from ase_gffmerge.forcefield.leverage import ExtrapolationGrade
from ase_gffmerge.graphs import batch_graphs, build_graph
from ase_gffmerge.graphs.graph import edge_vectors
from ase_gffmerge.models import Potential
from ase_gffmerge.runtime.batching import chunks, in_parts

RIDGE = 1e-4
"""μ in units of the mean eigenvalue of the Gram matrix."""

MAX_FEATURES = 256
"""Only so many of the last blocks' scalars enter (at least one block): a matrix of this size is stored per element."""

MAX_ATOMS = 500
"""Atoms per batch."""


def fit_extrapolation_grade(
    potential: Potential, specialists: Sequence[ForceField]
) -> ExtrapolationGrade | None:
    """Gauge of ``potential`` by the calibration frames of ``specialists``, whose indices are their positions.

    Returns
    -------
    ExtrapolationGrade or None
        Its matrices are float32; ``None`` when there are no calibration frames.
    """
    if not any(specialist.calibration for specialist in specialists):
        return None
    z, numbers, frame = calibration_features(potential, specialists)
    species = torch.unique(numbers)
    whitening = [_whitening(z[numbers == number], frame[numbers == number]) for number in species]
    return ExtrapolationGrade(species, torch.stack(whitening).float()).eval()


def with_extrapolation_grade(specialist: ForceField) -> ForceField:
    """Copy of a force field with a gauge from its own calibration frames.

    Use it for a specialist, and again after anything that changes a potential's weights: the old gauge no longer fits.
    """
    return replace(
        specialist, extrapolation_grade=fit_extrapolation_grade(specialist.potential, [specialist])
    )


@torch.no_grad()
def calibration_features(
    potential: Potential, specialists: Sequence[ForceField]
) -> tuple[Tensor, Tensor, Tensor]:
    """Features z (n_atoms, d) in float64, atomic numbers (n_atoms,) and frame indices (n_atoms,) of all frames."""
    sizes = [len(atoms) for specialist in specialists for atoms in specialist.calibration]
    rows: list[Tensor] = []
    numbers: list[Tensor] = []
    for k, specialist in enumerate(specialists):
        for chunk in chunks(specialist.calibration, MAX_ATOMS):
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
    graph.edge_vectors = edge_vectors(graph)
    return torch.cat(potential.features(graph)[-blocks:], dim=-1).double(), graph.atomic_numbers


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
