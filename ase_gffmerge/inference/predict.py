r"""Predictions of a force field that does not change: single or many structures, extrapolation grades.

Grade and standard deviation of the energy come from the features of the same forward pass
(:mod:`ase_gffmerge.forcefield.leverage`, :mod:`ase_gffmerge.forcefield.uncertainty`). Disagreement is the standard deviation
of the forces of K specialists on an atom,

.. math:: \sigma_i = \sqrt{\frac1K \sum_k \lVert\mathbf F_{k,i} - \bar{\mathbf F}_i\rVert^2} .

Specialists that know different systems are no ensemble: inside the domain of only one of them they disagree although the
merged potential is good, and far from all of them they may err together. Their disagreement says whose domain an atom is
in rather than how good the merged potential is; for that there is the extrapolation grade.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from itertools import repeat, starmap

import numpy as np
import torch
from ase import Atoms
from ase.data import chemical_symbols
from torch import Tensor

from ase_gffmerge.errors import FramesError, StructureError
from ase_gffmerge.forcefield.conditioning import with_indices
from ase_gffmerge.forcefield.force_field import ForceField
from ase_gffmerge.forcefield.uncertainty import energy_deviations, force_deviations
from ase_gffmerge.graphs import Prediction, batch_graphs, build_graph, predict
from ase_gffmerge.graphs.derivatives import assemble, differentiate
from ase_gffmerge.graphs.graph import AtomGraph, Graph, edge_vectors
from ase_gffmerge.inference.compiled import Compile, CompiledPotential
from ase_gffmerge.models import Potential
from ase_gffmerge.runtime.devices import chunks, in_parts
from ase_gffmerge.runtime.executors import OncePerWorker, run_chunks
from ase_gffmerge.runtime.progress import Progress, no_progress


@torch.no_grad()
def grades(force_field: ForceField, graph: AtomGraph) -> Tensor | None:
    """Extrapolation grade of every atom of a graph or a batch of graphs.

    Parameters
    ----------
    force_field
        A force field with an extrapolation grade.
    graph
        On the device of the force field.

    Returns
    -------
    Tensor or None
        (n_atoms,), where 1 is the edge of the calibration set; ``None`` when the force field has no grade.
    """
    if force_field.extrapolation_grade is None:
        return None
    _, scalars = force_field.potential(edge_vectors(graph), graph)
    return force_field.extrapolation_grade(scalars, graph.atomic_numbers)


def predict_graded(force_field: ForceField, graph: AtomGraph) -> tuple[Prediction, Tensor | None]:
    """Energies, forces and strain derivatives, with the grades (n_atoms,) of the same forward pass if there are any."""
    prediction, grade = predict(force_field.potential, graph), force_field.extrapolation_grade
    return prediction, None if grade is None else grade(prediction.readout_inputs, graph.atomic_numbers)


class Predictor:
    """Energies, forces, strain derivatives and grades of graphs; safe to call from several threads.

    Parameters
    ----------
    force_field
        Frozen, on its device; its weights are shared.
    compile
        Whether to compile, see :class:`~ase_gffmerge.inference.compiled.CompiledPotential`.
    """

    def __init__(self, force_field: ForceField, *, compile: Compile):
        compiled = CompiledPotential(force_field.potential, compile=compile)
        self._compiled = compiled if compiled.worthwhile else None
        self._eager = force_field.potential.for_inference()
        self._grade = force_field.extrapolation_grade

    def __call__(
        self, graph: AtomGraph, *, graded: bool = True, forces_std: bool = False
    ) -> tuple[Prediction, Tensor | None]:
        """Prediction and grades (n_atoms,), with the standard deviation of the energy where grades are calibrated.

        Parameters
        ----------
        graph
            One graph or a batch.
        graded
            Whether grades and the standard deviation of the energy are wanted; the force field may have none.
        forces_std
            Whether those of the forces are wanted, too, which cost :data:`.PROBES` reverse passes.
        """
        vectors = edge_vectors(graph)
        if self._compiled is None:
            derivatives = differentiate(self._eager, vectors, graph)
        else:
            derivatives = self._compiled(vectors, graph)
        prediction = assemble(graph, vectors, derivatives)
        if self._grade is None or not graded:
            return prediction, None
        y = self._grade.whitened(prediction.readout_inputs, graph.atomic_numbers)
        if self._grade.deviations is not None:
            prediction = replace(
                prediction,
                energy_std=energy_deviations(self._grade, y, graph),
                forces_std=force_deviations(self._grade, self._eager, graph) if forces_std else None,
            )
        return prediction, y.norm(dim=-1)


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


BatchPredictor = Callable[[AtomGraph], tuple[Prediction, Tensor | None]]
"""A batch in, its prediction out, with extrapolation grades (n_atoms,) or ``None``."""


MAX_EDGES = {"cpu": 2_000, "cuda": 200_000}
"""Edges of a batch, which take 13 to 42 kB each (PaiNN of 64 to NequIP of 128 channels, float32): on a CPU what stays near
its caches, on a GPU what keeps it busy."""


def predict_batches(
    predictor: BatchPredictor,
    graphs: Iterable[AtomGraph],
    *,
    device: torch.device,
    max_edges: int | None = None,
) -> Iterator[tuple[Prediction, Tensor | None]]:
    """Predictions of one structure after the other; only the graphs of one batch are in memory.

    Parameters
    ----------
    predictor, device
        See :func:`predict_together`.
    graphs
        Taken as they are needed.
    max_edges
        Size of a batch, at least one structure each; default: :data:`MAX_EDGES` of the device.
    """
    for group in edge_batches(graphs, device=device, max_edges=max_edges):
        yield from predict_together(predictor, group, device=device)


def edge_batches(
    graphs: Iterable[Graph], *, device: torch.device, max_edges: int | None = None
) -> Iterator[list[Graph]]:
    """Group graphs into batches of as many edges as are evaluated at once, at least one graph each.

    Parameters
    ----------
    graphs
        Taken as they are needed.
    device
        Where they are evaluated.
    max_edges
        See :func:`predict_batches`.
    """
    budget = max_edges or MAX_EDGES.get(device.type, MAX_EDGES["cuda"])
    return chunks(graphs, budget, size=lambda graph: graph.n_edges)


def predict_together(
    predictor: BatchPredictor, graphs: Sequence[AtomGraph], *, device: torch.device
) -> Iterator[tuple[Prediction, Tensor | None]]:
    """Predict a batch of graphs, or, where memory does not suffice, its halves, down to single structures.

    Parameters
    ----------
    predictor
        What evaluates a batch, for example :func:`~ase_gffmerge.inference.predict.predict_graded` of a force field.
    graphs
        One per structure, anywhere; they are not changed.
    device
        Where ``predictor`` computes.

    Yields
    ------
    prediction, grades
        Of one structure after the other, on the CPU.

    Raises
    ------
    DeviceMemoryError
        When a single structure does not fit.
    """

    def evaluate(part: Sequence[AtomGraph]) -> list[tuple[Prediction, Tensor | None]]:
        prediction, grades = predictor(batch_graphs(part).to(device))
        return _apart(prediction, grades, [len(graph) for graph in part])

    for found in in_parts(evaluate, graphs, device=device):
        yield from found


def _apart(
    prediction: Prediction, grades: Tensor | None, counts: list[int]
) -> list[tuple[Prediction, Tensor | None]]:
    """Split what was predicted for a batch of structures with so many atoms each."""
    n = len(counts)
    energies, forces = (x.cpu().split(counts) for x in (prediction.energies, prediction.forces))
    energy, virial = (x.cpu().split(1) for x in (prediction.energy, prediction.strain_derivative))
    energy_std, forces_std = (
        [None] * n if x is None else x.cpu().split(size)
        for x, size in ((prediction.energy_std, 1), (prediction.forces_std, counts))
    )
    single = [
        Prediction(energies[k], energy[k], forces[k], virial[k], (), energy_std[k], forces_std[k])
        for k in range(n)
    ]
    return list(zip(single, repeat(None, n) if grades is None else grades.cpu().split(counts), strict=True))


@dataclass(frozen=True, kw_only=True)
class FramePredictions:
    """Energies, forces and stresses of frames: predictions, or labels.

    Attributes
    ----------
    numbers
        Atomic numbers, one (n_atoms,) array per frame.
    energies : (n_frames,)
        eV.
    forces
        eV/Å, one (n_atoms, 3) array per frame.
    stresses
        eV/Å^3, positive under tension, one (3, 3) array per frame; ``None`` where a frame has no volume or no label.
    """

    numbers: Sequence[np.ndarray]
    energies: np.ndarray
    forces: Sequence[np.ndarray]
    stresses: Sequence[np.ndarray | None]


def predict_frames(
    potential: Potential,
    frames: Sequence[Atoms],
    *,
    specialist: str | int | None = None,
    names: Sequence[str] | None = None,
    where: Sequence[str] | None = None,
    max_edges: int | None = None,
    executor: Executor | None = None,
    progress: Progress = no_progress,
) -> FramePredictions:
    """Evaluate frames in batches (:func:`.predict_batches`), smaller ones if memory is short.

    Parameters
    ----------
    specialist
        For frames that do not say which specialist they belong to, if the potential has an embedding for each.
    names
        Names of the specialists in the order of their indices, for frames that name theirs.
    where
        What each frame is called in messages, for example ``water.xyz, frame 3``; default: its number.
    max_edges
        Size of a batch.
    executor
        Workers among which frames are shared out; default: this process.
    progress
        Of the workers, called with a fraction (0 to 1) and a description.

    Raises
    ------
    FramesError
        When there are no frames, or one holds an element that the potential does not know.
    StructureError
        When the potential has an embedding per specialist and a frame names none, or one that is unknown.
    DeviceMemoryError
        When a single frame does not fit into the device's memory.
    """
    check_frames(potential, frames, where)
    graphs = _Graphs(potential.hyper.cutoff, potential.dtype, potential.hyper.n_embeddings, specialist, names)
    items = [(_called(where, k), atoms) for k, atoms in enumerate(frames)]
    if executor is None:
        found = list(_predicted(potential, starmap(graphs, items), max_edges))
    else:
        share, keys = (
            _Share(OncePerWorker.of(potential), graphs, max_edges),
            [str(k) for k in range(len(items))],
        )
        found = run_chunks(share, items, keys=keys, executor=executor, what="frames", progress=progress)
    return FramePredictions(
        numbers=[atoms.numbers for atoms in frames],
        energies=np.array([one["energy"] for one in found]),
        forces=[one["forces"] for one in found],
        stresses=[
            one["virial"] / atoms.get_volume() if atoms.cell.rank == 3 else None
            for one, atoms in zip(found, frames, strict=True)
        ],
    )


@dataclass(frozen=True)
class _Graphs:
    """Graphs of frames for one potential."""

    cutoff: float
    dtype: torch.dtype
    n_embeddings: int
    specialist: str | int | None
    names: Sequence[str] | None

    def __call__(self, called: str, atoms: Atoms) -> AtomGraph:
        try:
            prepared = with_indices(atoms, self.n_embeddings, names=self.names, default=self.specialist)
            return build_graph(prepared, self.cutoff, dtype=self.dtype)
        except StructureError as error:
            raise StructureError(f"{called}: {error}") from None


def _predicted(
    potential: Potential, graphs: Iterable[AtomGraph], max_edges: int | None
) -> Iterator[dict[str, np.ndarray]]:
    """Energy (eV), forces and virial (eV) of one frame after the other."""
    served = potential.for_inference()
    predictions = predict_batches(
        lambda batch: (predict(served, batch), None), graphs, device=potential.device, max_edges=max_edges
    )
    for found, _ in predictions:
        virial = found.strain_derivative[0].double().numpy()
        yield {
            "energy": found.energy.double().numpy()[0],
            "forces": found.forces.double().numpy(),
            "virial": virial,
        }


@dataclass(frozen=True)
class _Share:
    """What a worker does with some frames and their names."""

    potential: OncePerWorker[Potential]
    graphs: _Graphs
    max_edges: int | None

    def __call__(self, items: Sequence[tuple[str, Atoms]]) -> list[dict[str, np.ndarray]]:
        return list(_predicted(self.potential(), starmap(self.graphs, items), self.max_edges))


def check_frames(potential: Potential, frames: Sequence[Atoms], where: Sequence[str] | None = None) -> None:
    """Raise :class:`FramesError` for no frames, or elements that the potential does not know.

    Parameters
    ----------
    potential
        Whose elements count.
    frames
        Structures.
    where
        What each frame is called in messages; default: its number.
    """
    if not frames:
        raise FramesError("there are no frames to evaluate; give a file with at least one")
    for index, atoms in enumerate(frames):
        unknown = sorted(set(atoms.numbers.tolist()) - set(potential.species))
        if unknown:
            raise FramesError(
                f"{_called(where, index)} ({atoms.get_chemical_formula()}) contains {_symbols(unknown)}, which the "
                f"model does not know (it knows {_symbols(potential.species)}); use frames of these elements"
            )


def _called(where: Sequence[str] | None, index: int) -> str:
    return where[index] if where else f"frame {index}"


def _symbols(numbers: Sequence[int]) -> str:
    return ", ".join(chemical_symbols[number] for number in numbers)
