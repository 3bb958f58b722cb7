"""Errors of a potential against labelled frames."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from ase import Atoms
from ase.data import chemical_symbols

from ase_gffmerge.data.labels import energy_label, force_labels
from ase_gffmerge.errors import FramesError
from ase_gffmerge.forcefield.conditioning import with_indices
from ase_gffmerge.graphs import build_graph, predict
from ase_gffmerge.graphs.graph import AtomGraph
from ase_gffmerge.inference.batches import predict_batches
from ase_gffmerge.models import Potential


@dataclass(frozen=True)
class Errors:
    """Errors over all frames.

    Attributes
    ----------
    force_mae, force_rmse
        Over all force components, eV/Å.
    energy_mae
        Mean over frames of the absolute energy error per atom, eV/atom.
    n_frames
        Number of frames.
    """

    force_mae: float
    force_rmse: float
    energy_mae: float
    n_frames: int

    def to_dict(self) -> dict[str, float]:
        """Plain dictionary."""
        return asdict(self)


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


def labels(frames: Sequence[Atoms]) -> FramePredictions:
    """Energies and forces attached to labelled frames; constraints that a frame carries are no part of its label."""
    return FramePredictions(
        np.array([energy_label(atoms) for atoms in frames]),
        [force_labels(atoms) for atoms in frames],
    )


def compare(predicted: FramePredictions, reference: FramePredictions) -> Errors:
    """Errors of one set of predictions against another."""
    counts = np.array([len(force) for force in reference.forces])
    difference = np.concatenate(predicted.forces) - np.concatenate(reference.forces)
    return Errors(
        force_mae=float(np.abs(difference).mean()),
        force_rmse=float(np.sqrt(np.square(difference).mean())),
        energy_mae=float((np.abs(predicted.energies - reference.energies) / counts).mean()),
        n_frames=len(counts),
    )


def evaluate(
    potential: Potential,
    frames: Sequence[Atoms],
    *,
    specialist: str | int | None = None,
    names: Sequence[str] | None = None,
) -> Errors:
    """Errors of a potential on labelled frames.

    Parameters
    ----------
    potential
        What is evaluated.
    frames
        With energies and forces, and stress or not.
    specialist, names
        As of :func:`predict_frames`.
    """
    return compare(predict_frames(potential, frames, specialist=specialist, names=names), labels(frames))
