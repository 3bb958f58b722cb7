r"""Standard deviations of energies and forces, from the leverages of last-layer features (last-layer prediction rigidity).

Weights of a readout that is linear in the features of atoms, one set per element, are known as well as their least-squares
problem determines them. Their covariance, propagated to energy and forces, is that of the leverages: with the whitened
features :math:`y_i` of :mod:`.leverage`,

.. math::

   \sigma_E^2 = \alpha_E^2 \sum_Z \Bigl\lVert \sum_{i:\,Z_i=Z} y_i \Bigr\rVert^2 ,\qquad
   \sigma_{F_{ia}}^2 = \alpha_F^2 \sum_Z \Bigl\lVert \frac{\partial}{\partial r_{ia}} \sum_{j:\,Z_j=Z} y_j \Bigr\rVert^2

(Bigi, Chong, Ceriotti & Grasselli, arXiv 2403.02251; Chong et al., doi:10.1021/acs.jctc.3c00704). The energy costs nothing.
For forces there would be a reverse pass for each of some hundred features; as these are white, few random combinations of
them have the same expected square. With independent signs :math:`\epsilon_{kZ}` there are m reverse passes,

.. math::

   \sigma_{F_{ia}}^2 \approx \frac{\alpha_F^2}{m} \sum_{k=1}^m
   \Bigl( \frac{\partial}{\partial r_{ia}} \sum_j \epsilon_{kZ_j} \cdot y_j \Bigr)^2 ,

the spread of the forces of m sampled last layers (shallow ensembles: Kellner & Ceriotti, arXiv 2402.16621). The signs are
fixed, so deviations are smooth functions of the positions that turn and permute with the atoms.

The factors :math:`\alpha` are what makes errors :math:`\Delta` on frames that no fit has seen most likely, under normal
distributions with these deviations: :math:`\alpha^2 = \langle \Delta^2 / \sigma^2(\alpha=1) \rangle`, every specialist
counting the same. No labels are needed: the errors are those against the specialist that owns the frame. So deviations are
those of a merge from its specialists; what specialists themselves are wrong by comes on top, unless labels calibrate them
(:meth:`.ForceField.with_uncertainty`).

What was tried, on test frames of the bundled pair and the default merge, by Spearman's rank correlation of deviations and
force errors per atom: these matrices 0.59; matrices of force rows (derivatives of summed features) per element 0.61, for all
elements together 0.63, one without elements 0.61. The gain is not worth second matrices. The spectrum of the whitened
derivatives is flat (32 of 576 directions hold 45 % of the trace), so leading directions foretell worse than as many random
ones.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from ase import Atoms
from torch import Tensor

from ase_gffmerge.data.frames import hold_out_tenth, spread
from ase_gffmerge.data.labels import energy_label, force_labels
from ase_gffmerge.forcefield.leverage import (
    MAX_ATOMS,
    ExtrapolationGrade,
    calibration_features,
    grade_of_features,
)
from ase_gffmerge.graphs import batch_graphs, build_graph, predict
from ase_gffmerge.graphs.derivatives import EdgeFunction
from ase_gffmerge.graphs.graph import AtomGraph, edge_vectors
from ase_gffmerge.least_squares.gauss_newton import random_signs
from ase_gffmerge.models import Potential
from ase_gffmerge.runtime.devices import chunks, in_parts

PROBES = 16
"""Reverse passes m for the forces: they scatter by 18 % about what all features together give."""

MAX_FRAMES, MAX_FORCE_ATOMS = 20, 200
"""Held-out frames per specialist that calibrate the energies, and atoms that calibrate the forces."""

SILENT = 0.01
"""Root mean square force component in eV/Å below which forces say nothing, and the factor of the energy is theirs."""

Labels = Callable[[Sequence[Atoms], AtomGraph], tuple[Tensor, Tensor]]
"""Right energies (n_frames,) in eV and forces (n_atoms, 3) in eV/Å of frames and of the batch that they make."""


def energy_deviations(grade: ExtrapolationGrade, y: Tensor, graph: AtomGraph) -> Tensor:
    """Standard deviations of energies (n_structures,) in eV, in units of α without calibration.

    Parameters
    ----------
    grade
        Whose features.
    y
        Whitened features (n_atoms, d), see :meth:`.ExtrapolationGrade.whitened`.
    graph
        One graph or a batch; a structure with an element that the calibration frames lack has infinity.
    """
    n_rows = len(grade.species) + 1
    cell = graph.structure_index * n_rows + grade.row[graph.atomic_numbers]
    sums = y.new_zeros(graph.n_structures * n_rows, y.shape[1]).index_add(0, cell, y)
    deviations = sums.view(graph.n_structures, -1).norm(dim=1)
    return deviations if grade.deviations is None else grade.deviations[0] * deviations


def force_deviations(grade: ExtrapolationGrade, function: EdgeFunction, graph: AtomGraph) -> Tensor:
    """Standard deviations of force components (n_atoms, 3) in eV/Å, in units of α without calibration.

    Takes a forward and :data:`PROBES` reverse passes, one after the other.

    Parameters
    ----------
    grade
        Whose features.
    function
        The potential that it belongs to.
    graph
        One graph or a batch; a structure with an element that the calibration frames lack has infinity.
    """
    vectors = edge_vectors(graph).detach().requires_grad_()
    with torch.enable_grad():
        _, scalars = function(vectors, graph)
        z = grade.inputs(scalars)
    squares = torch.zeros_like(graph.positions)
    row, (sender, receiver) = grade.row[graph.atomic_numbers], graph.edge_index
    if graph.n_edges and z.requires_grad:
        for probe in _probes(grade):
            (gradient,) = torch.autograd.grad(
                z, vectors, probe[row], retain_graph=True, materialize_grads=True
            )
            forces = torch.zeros_like(squares).index_add(0, receiver, gradient)
            squares += forces.index_add(0, sender, -gradient).square()
    known = graph.structure_index.new_ones(graph.n_structures)
    known = known.index_fill(0, graph.structure_index[row == len(grade.species)], 0).bool()
    deviations = torch.where(known[graph.structure_index, None], squares.sqrt(), torch.inf)
    return deviations if grade.deviations is None else grade.deviations[1] * deviations


def _probes(grade: ExtrapolationGrade) -> Tensor:
    """Weights (m, n_species + 1, d) of sampled last layers; those of unknown elements are zero."""
    n_species, _, d = grade.whitening.shape
    signs = random_signs(
        (n_species, d, PROBES), like=grade.whitening, generator=torch.Generator().manual_seed(0)
    )
    probes = torch.matmul(grade.whitening, signs / PROBES**0.5).permute(2, 0, 1)
    return torch.cat([probes, probes.new_zeros(PROBES, 1, d)], dim=1)


def fit_uncertainty(
    potential: Potential, calibration: Sequence[Sequence[Atoms]], references: Sequence[Potential]
) -> ExtrapolationGrade | None:
    """Extrapolation grade whose deviations are calibrated on how far a potential is from its specialists.

    Every tenth frame calibrates; what it is compared with is fitted to the others. The grade is then that of all frames.

    Parameters
    ----------
    potential
        Merged, distilled or compressed.
    calibration
        Frames of every specialist; its position in the sequence is its index for conditioned potentials.
    references
        The specialists' potentials, which predict what is right for these frames, with the potential's zero of energy.

    Returns
    -------
    ExtrapolationGrade or None
        ``None`` when there are no frames; without deviations where there are too few.
    """
    if not any(calibration):
        return None
    z, numbers, frame = calibration_features(potential, calibration)
    held_out, start = [], 0
    for frames in calibration:
        held_out += hold_out_tenth(range(start, start + len(frames)))[1] if frames else []
        start += len(frames)
    fitted = ~torch.isin(frame, torch.tensor(held_out).to(frame))
    grade = grade_of_features(z, numbers, frame)
    if fitted.any():
        rest = grade_of_features(z[fitted], numbers[fitted], frame[fitted])
        parts = [spread(hold_out_tenth(frames)[1], MAX_FRAMES) if frames else [] for frames in calibration]
        rights = [partial(predicted, reference) for reference in references]
        grade.deviations = calibrated_deviations(rest, potential, parts, rights)
    return grade


def calibrated_deviations(
    grade: ExtrapolationGrade,
    potential: Potential,
    parts: Sequence[Sequence[Atoms]],
    rights: Sequence[Labels],
) -> Tensor | None:
    """Factors (2,) for energies and forces; ``None`` where frames do not determine them.

    Parameters
    ----------
    grade
        Without deviations.
    potential
        What it belongs to.
    parts
        Frames, one sequence per specialist.
    rights
        What is right for each sequence.
    """
    rows = [
        _mean_ratios(grade, potential, frames, right, index=index)
        for index, (frames, right) in enumerate(zip(parts, rights, strict=True))
        if frames
    ]
    if not rows:
        return None
    energy, force, square = torch.stack(rows).nanmean(dim=0)
    if square.sqrt() < SILENT:
        force = energy
    factors = torch.stack([energy, force]).sqrt().to(grade.whitening)
    return factors if factors.isfinite().all() else None


def _mean_ratios(
    grade: ExtrapolationGrade, potential: Potential, frames: Sequence[Atoms], right: Labels, *, index: int
) -> Tensor:
    """Mean squares of one specialist: of energy errors and force errors over deviations, and of its force components."""
    n_atoms = sum(map(len, frames)) / len(frames)
    some = spread(frames, max(1, int(MAX_FORCE_ATOMS / n_atoms)))
    means = []
    for chosen, of_forces in ((frames, False), (some, True)):
        ratios = partial(_ratios, grade, potential, right=right, index=index, of_forces=of_forces)
        parts = [in_parts(ratios, chunk, device=potential.device) for chunk in chunks(chosen, MAX_ATOMS)]
        means.append(torch.cat([values for part in parts for values in part]).nanmean(dim=0))
    return torch.stack([means[0][0], *means[1]])


def _ratios(
    grade: ExtrapolationGrade,
    potential: Potential,
    frames: Sequence[Atoms],
    *,
    right: Labels,
    index: int,
    of_forces: bool,
) -> Tensor:
    """Squared errors over squared deviations, and squares, of energies or force components (n, 2); NaN where unknown."""
    function = potential.for_inference()
    graphs = [build_graph(a, potential.hyper.cutoff, dtype=potential.dtype, specialist=index) for a in frames]
    graph = batch_graphs(graphs).to(potential.device)
    found, target = predict(function, graph), right(frames, graph)[of_forces].double()
    if of_forces:
        values, deviations = found.forces, force_deviations(grade, function, graph)
    else:
        values = found.energy
        y = grade.whitened(found.readout_inputs, graph.atomic_numbers)
        deviations = energy_deviations(grade, y, graph)
    squares = deviations.double().square()
    ratios = (values.double() - target).square() / torch.where(
        squares.isfinite() & (squares > 0), squares, torch.nan
    )
    return torch.stack([ratios, target.square()], dim=-1).view(-1, 2)


def predicted(potential: Potential, frames: Sequence[Atoms], graph: AtomGraph) -> tuple[Tensor, Tensor]:
    """What a specialist predicts, see :data:`Labels`.

    Parameters
    ----------
    potential
        The specialist's.
    frames
        Their specialist indices do not count.
    graph
        Whose device and type the results have.
    """
    own = [build_graph(atoms, potential.hyper.cutoff, dtype=potential.dtype) for atoms in frames]
    found = predict(potential.for_inference(), batch_graphs(own).to(potential.device))
    return found.energy.to(graph.positions.device), found.forces.to(graph.positions.device)


def labelled(frames: Sequence[Atoms], graph: AtomGraph) -> tuple[Tensor, Tensor]:
    """Labels of frames, see :data:`Labels`.

    Parameters
    ----------
    frames
        Labelled.
    graph
        Whose device the results have.
    """
    energies = torch.tensor([energy_label(atoms) for atoms in frames], dtype=torch.float64)
    forces = torch.cat([torch.as_tensor(force_labels(atoms)) for atoms in frames])
    return energies.to(graph.positions.device), forces.to(graph.positions.device)
