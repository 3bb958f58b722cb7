r"""Family ``gauss-newton``: one linearised solve of all parameters on the specialists' energies and forces.

With parameters w and directions of the geometry, :math:`F=-\partial E/\partial r`. J v is the force that belongs to
:math:`\partial E/\partial w\cdot v` (forward mode in w, then one reverse pass); Jᵀ u is the gradient with respect to w of
:math:`-\partial E/\partial r\cdot u` (forward mode along the displacement u, then one reverse pass).
"""

import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass

import torch
from ase import Atoms
from torch import Tensor
from torch.func import functional_call, jvp

from ase_gffmerge.graphs import Prediction, batch_graphs, build_graph, predict
from ase_gffmerge.graphs.derivatives import assemble
from ase_gffmerge.graphs.graph import AtomGraph, edge_vectors
from ase_gffmerge.merging.calibration import CalibrationSet
from ase_gffmerge.merging.readout_fit import MAX_ATOMS
from ase_gffmerge.models import Potential
from ase_gffmerge.runtime.devices import chunks
from research.bench import Bench, MergeOutput, Trial, shared
from research.least_squares import Parameters, gauss_newton_step
from research.readout_fit import CHEAP, Setting, fit_potentials, fitted, rattled

FAMILY = "gauss-newton"
ENERGY_WEIGHT = 10.0


@dataclass(frozen=True)
class Labelled:
    """A batch with the specialist's labels and the weights of its rows."""

    graph: AtomGraph
    target: Prediction
    energy_weights: Tensor
    force_weight: float

    def flat(self, energy: Tensor, forces: Tensor) -> Tensor:
        """Weighted energies and forces as one vector."""
        return torch.cat([energy * self.energy_weights, forces.flatten() * self.force_weight])

    def unflat(self, vector: Tensor) -> tuple[Tensor, Tensor]:
        """Transpose of :meth:`flat`."""
        energy, forces = vector.split([len(self.energy_weights), self.graph.positions.numel()])
        return energy * self.energy_weights, forces.view(-1, 3) * self.force_weight


def labelled(calibration_set: CalibrationSet, frames: Sequence[Atoms], dtype: torch.dtype) -> list[Labelled]:
    """Frames labelled by their specialist; all rows together weigh as in the force-matched readout."""
    specialist = calibration_set.specialist
    n_rows = 3 * sum(map(len, frames))
    square = calibration_set.weight / (n_rows * calibration_set.mean_square_force)
    batches = []
    for group in chunks(frames, MAX_ATOMS):
        batch = batch_graphs([build_graph(atoms, specialist.cutoff, dtype=dtype) for atoms in group])
        weights = ENERGY_WEIGHT * (square / torch.bincount(batch.structure_index)).sqrt().to(dtype)
        batches.append(Labelled(batch, predict(specialist.potential, batch), weights, square**0.5))
    return batches


class ForceProblem:
    """Energies and forces of all batches as functions of all parameters of a potential."""

    def __init__(self, potential: Potential, batches: Sequence[Labelled]):
        self.potential, self.batches = potential, batches
        self.parameters = {name: p.detach().clone() for name, p in potential.named_parameters()}

    def residual(self) -> list[Tensor]:
        """Weighted labels minus predictions."""
        found = []
        for batch in self.batches:
            ours = predict(self.potential, batch.graph)
            energy = (batch.target.energy - ours.energy).to(ours.forces)
            found.append(batch.flat(energy, batch.target.forces - ours.forces))
        return found

    def _energies(self, parameters: Parameters, graph: AtomGraph, vectors: Tensor) -> Tensor:
        return functional_call(self.potential, parameters, (vectors, graph))[0]

    def forward(self, direction: Parameters) -> list[Tensor]:
        """J v."""
        names, found = list(self.parameters), []
        for batch in self.batches:
            graph = batch.graph
            vectors = edge_vectors(graph).detach().requires_grad_()

            def energies(*values: Tensor, graph: AtomGraph = graph, vectors: Tensor = vectors) -> Tensor:
                return self._energies(dict(zip(names, values, strict=True)), graph, vectors)

            with torch.enable_grad():
                at, along = tuple(self.parameters.values()), tuple(direction[name] for name in names)
                _, change = jvp(energies, at, along)
                (gradient,) = torch.autograd.grad(change.sum(), vectors)
            moved = assemble(graph, vectors, (gradient, change.detach(), []))
            found.append(batch.flat(moved.energy.to(moved.forces), moved.forces))
        return found

    def transpose(self, vectors: list[Tensor]) -> Parameters:
        """Jᵀ r."""
        total = {name: torch.zeros_like(value) for name, value in self.parameters.items()}
        for batch, vector in zip(self.batches, vectors, strict=True):
            graph = batch.graph
            on_energy, on_forces = batch.unflat(vector)
            sender, receiver = graph.edge_index
            leaves = {name: p.clone().requires_grad_() for name, p in self.parameters.items()}
            with torch.enable_grad():
                energies, slopes = jvp(
                    lambda x, leaves=leaves, graph=graph: self._energies(leaves, graph, x),
                    (edge_vectors(graph).detach(),),
                    (on_forces[sender] - on_forces[receiver],),
                )
                summed = (energies * on_energy[graph.structure_index]).sum() - slopes.sum()
                gradients = torch.autograd.grad(summed, list(leaves.values()), allow_unused=True)
            for name, gradient in zip(leaves, gradients, strict=True):
                if gradient is not None:
                    total[name] += gradient
        return total


def linearised(
    potential: Potential,
    calibration_sets: Sequence[CalibrationSet],
    *,
    iterations: int,
    copies: int,
    damping: float,
) -> Potential:
    """Copy of a potential after one Gauss-Newton step on the calibration frames and their copies."""
    options = CHEAP.model_copy(update={"copies": copies})
    batches = []
    for calibration_set in calibration_sets:
        frames = calibration_set.specialist.calibration
        frames = (*frames, *(rattled(frames, calibration_set, options) if copies else ()))
        batches += labelled(calibration_set, frames, potential.dtype)
    step = gauss_newton_step(ForceProblem(potential, batches), iterations=iterations, damping=damping)
    moved = deepcopy(potential)
    with torch.no_grad():
        for name, parameter in moved.named_parameters():
            parameter.add_(step[name])
    return moved


def after_readout(iterations: int, *, copies: int, damping: float = 1e-3) -> Callable[[Bench], MergeOutput]:
    """The cheap reference, then the step."""

    def run(bench: Bench) -> MergeOutput:
        first = fitted(bench.trunk, Setting())
        start = time.process_time()
        potential = linearised(
            first.potentials[0],
            bench.trunk.calibration_sets,
            iterations=iterations,
            copies=copies,
            damping=damping,
        )
        spent = first.seconds + time.process_time() - start
        return MergeOutput(potentials=shared(potential, bench.specialists), seconds=spent)

    return run


def before_readout(iterations: int, *, copies: int, damping: float = 1e-3) -> Callable[[Bench], MergeOutput]:
    """The step on the trunk with its plain readout, then the widened readout."""

    def run(bench: Bench) -> MergeOutput:
        start, calibration_sets = time.process_time(), bench.trunk.calibration_sets
        moved = linearised(
            bench.trunk.potential, calibration_sets, iterations=iterations, copies=copies, damping=damping
        )
        potentials, _ = fit_potentials(shared(moved, bench.specialists), calibration_sets, Setting())
        seconds = bench.trunk.seconds + time.process_time() - start
        return MergeOutput(potentials=tuple(potentials), seconds=seconds)

    return run


def trials() -> list[Trial]:
    """All trials of this family."""
    rows = (
        ("GN 10 after readout", "10 CG iterations on all parameters", after_readout(10, copies=0), 24),
        ("GN 10 before readout", "the same on the trunk, then the readout", before_readout(10, copies=0), 23),
        ("GN 20 before readout", "20 CG iterations on the trunk", before_readout(20, copies=0), 62),
        ("GN 20 after readout, copies", "20 iterations, 2 copies", after_readout(20, copies=2), 63),
    )
    return [Trial(name=n, family=FAMILY, changes=c, run=run, order=order) for n, c, run, order in rows]
