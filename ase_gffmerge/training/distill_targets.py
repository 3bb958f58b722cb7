"""What a specialist teaches: frames without labels, and its own energies, forces, stresses and node features on them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from ase import Atoms
from torch_geometric.data import Data

from ase_gffmerge.data.perturb import displaced
from ase_gffmerge.errors import FramesError
from ase_gffmerge.forcefield.force_field import ForceField
from ase_gffmerge.graphs import batch_graphs, build_graph, predict
from ase_gffmerge.graphs.graph import edge_vectors
from ase_gffmerge.inference.metrics import check_frames
from ase_gffmerge.merging.augmentation import copies_per_frame, with_copies
from ase_gffmerge.merging.distill_options import DistillOptions
from ase_gffmerge.merging.recipe import ReadoutOptions
from ase_gffmerge.models import Potential
from ase_gffmerge.runtime.batching import chunks
from ase_gffmerge.sampling.calibration_frames import SampleOptions, sample_frames
from ase_gffmerge.training.frames import bare

HELD_OUT = 10
"""Every tenth frame tells when to stop."""

STARTS = 4
"""Frames from which a specialist samples."""

COPYING = {"copies", "max_copied_edges", "temperature", "interval", "displacement", "seed"}
"""Options of copies, which have the same names in :class:`~ase_gffmerge.merging.recipe.ReadoutOptions`."""

MAX_ATOMS = 500
"""Atoms per batch of labels."""


@dataclass(frozen=True)
class DistillationSet:
    """Frames of one specialist's territory: to learn from, and held out."""

    training: tuple[Atoms, ...]
    held_out: tuple[Atoms, ...]


def prepare_distillation_set(
    specialist: ForceField, options: DistillOptions, *, extra: Sequence[Atoms] = ()
) -> DistillationSet:
    """Split a specialist's calibration frames and ``extra`` ones, then add sampled frames and displaced copies.

    Raises
    ------
    FramesError
        For fewer than two frames, or elements that the specialist does not know.
    """
    given = [bare(atoms) for atoms in (*specialist.calibration, *extra)]
    if len(given) < 2:
        raise FramesError(
            f"{specialist.name!r} has {len(given)} frames to distil from, and at least two are needed (one is held out); "
            "give frames, or make some with `gffmerge sample`"
        )
    check_frames(specialist.potential, given)
    every = min(HELD_OUT, len(given))
    held_out = given[every - 1 :: every]
    training = [atoms for i, atoms in enumerate(given) if i % every != every - 1]
    if options.sampled:
        sampling = SampleOptions(n=options.sampled, seed=options.seed)
        training += [bare(atoms) for atoms in sample_frames(specialist, given[:STARTS], sampling).frames]
    training = copied(specialist, training, options)
    return DistillationSet((*training, *twins(training, options)), tuple(held_out))


def copied(specialist: ForceField, frames: Sequence[Atoms], options: DistillOptions) -> list[Atoms]:
    """Frames with copies that the specialist visits from them, see :mod:`ase_gffmerge.merging.augmentation`."""
    copying = ReadoutOptions(**options.model_dump(include=COPYING))
    return with_copies(specialist, frames, copying, n_copies=copies_per_frame(specialist, frames, copying))


def twins(frames: Sequence[Atoms], options: DistillOptions) -> list[Atoms]:
    """Every frame with displaced atoms and, for crystals, a strained cell."""
    rng = np.random.default_rng(options.seed)
    return [displaced(a, rattle=options.displacement, strain=options.strain, rng=rng) for a in frames]


def taught_graphs(
    teacher: ForceField, student: Potential, frames: Sequence[Atoms], *, index: int, features: bool
) -> list[Data]:
    """Graphs with the teacher's predictions as targets, see :func:`~ase_gffmerge.training.loss.labelled_graph`.

    Parameters
    ----------
    teacher
        A specialist on the device and in the precision of the student.
    student
        Whose reference energies and cutoff are used.
    frames
        Structures; whatever labels they carry is not looked at.
    index
        The specialist index of their atoms.
    features
        Also keep the teacher's scalars after all blocks, ``features`` (n_atoms, n_blocks · channels).
    """
    taught: list[Data] = []
    for group in chunks(frames, MAX_ATOMS):
        graphs = [
            build_graph(atoms, student.hyper.cutoff, dtype=student.dtype, specialist=index) for atoms in group
        ]
        batch = batch_graphs(graphs).to(student.device)
        prediction = predict(teacher.potential, batch)
        rows = student.species_row[batch.atomic_numbers]
        reduced = prediction.energy.index_add(0, batch.batch, -student.references[rows]).to(student.dtype)
        stress = prediction.stress(batch.cell) if any(atoms.pbc.all() for atoms in group) else None
        sizes = [len(atoms) for atoms in group]
        forces = prediction.forces.split(sizes)
        hidden = node_features(teacher.potential, batch).split(sizes) if features else None
        for i, (graph, atoms) in enumerate(zip(graphs, group, strict=True)):
            graph.energy, graph.forces = reduced[i : i + 1].cpu(), forces[i].cpu()
            graph.stress = torch.full((1, 3, 3), torch.nan, dtype=student.dtype)
            if stress is not None and atoms.pbc.all():
                graph.stress = stress[i : i + 1].cpu()
            graph.weight = torch.ones(1, dtype=student.dtype)
            if hidden is not None:
                graph.features = hidden[i].cpu()
        taught += graphs
    return taught


@torch.no_grad()
def node_features(potential: Potential, batch: Data) -> torch.Tensor:
    """Scalars after all blocks (n_atoms, n_blocks · channels)."""
    batch.edge_vectors = edge_vectors(batch)
    features = torch.cat(potential.features(batch), dim=-1)
    del batch.edge_vectors
    return features
