"""Predictions for many structures, in batches of a size that memory allows."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat

import numpy as np
import torch
from ase import Atoms
from ase.data import chemical_symbols
from torch import Tensor

from ase_gffmerge.errors import FramesError
from ase_gffmerge.forcefield.conditioning import with_indices
from ase_gffmerge.graphs import Prediction, batch_graphs, build_graph, predict
from ase_gffmerge.graphs.graph import AtomGraph
from ase_gffmerge.models import Potential
from ase_gffmerge.runtime.batching import chunks, in_parts

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
    budget = max_edges or MAX_EDGES.get(device.type, MAX_EDGES["cuda"])
    for group in chunks(graphs, budget, size=lambda graph: graph.n_edges):
        yield from predict_together(predictor, group, device=device)


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
    single = [Prediction(*fields) for fields in zip(energies, energy, forces, virial, strict=True)]
    return list(zip(single, repeat(None, n) if grades is None else grades.cpu().split(counts), strict=True))


@dataclass(frozen=True)
class FramePredictions:
    """Energies (eV, one per frame) and forces (eV/Å, one (n_atoms, 3) array per frame)."""

    energies: np.ndarray
    forces: list[np.ndarray]


def predict_frames(
    potential: Potential,
    frames: Sequence[Atoms],
    *,
    specialist: str | int | None = None,
    names: Sequence[str] | None = None,
    max_edges: int | None = None,
) -> FramePredictions:
    """Evaluate frames in batches (:func:`.predict_batches`), smaller ones if memory is short.

    Parameters
    ----------
    specialist
        For frames that do not say which specialist they belong to, if the potential has an embedding for each.
    names
        Names of the specialists in the order of their indices, for frames that name theirs.

    Raises
    ------
    FramesError
        When there are no frames, or one holds an element that the potential does not know.
    StructureError
        When the potential has an embedding per specialist and a frame names none, or one that is unknown.
    DeviceMemoryError
        When a single frame does not fit into the device's memory.
    """
    check_frames(potential, frames)
    served, hyper = potential.for_inference(), potential.hyper

    def graph(atoms: Atoms) -> AtomGraph:
        prepared = with_indices(atoms, hyper.n_embeddings, names=names, default=specialist)
        return build_graph(prepared, hyper.cutoff, dtype=potential.dtype)

    predictions = predict_batches(
        lambda batch: (predict(served, batch), None),
        map(graph, frames),
        device=potential.device,
        max_edges=max_edges,
    )
    found = [prediction for prediction, _ in predictions]
    return FramePredictions(
        np.array([prediction.energy.item() for prediction in found]),
        [prediction.forces.double().numpy() for prediction in found],
    )


def check_frames(potential: Potential, frames: Sequence[Atoms]) -> None:
    """Raise :class:`FramesError` for no frames, or elements that the potential does not know."""
    if not frames:
        raise FramesError("there are no frames to evaluate; give a file with at least one")
    for index, atoms in enumerate(frames):
        unknown = sorted(set(atoms.numbers.tolist()) - set(potential.species))
        if unknown:
            raise FramesError(
                f"frame {index} ({atoms.get_chemical_formula()}) contains {_symbols(unknown)}, which the "
                f"model does not know (it knows {_symbols(potential.species)}); use frames of these elements"
            )


def _symbols(numbers: Sequence[int]) -> str:
    return ", ".join(chemical_symbols[number] for number in numbers)
