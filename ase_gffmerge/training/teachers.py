"""Teachers of a distillation: what specialists predict on unlabelled frames, as targets for one merged potential.

Specialists label any structure for free. Their frames are calibration frames, further ones that the user gives, frames
sampled by their own dynamics, and displaced copies of all these.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import torch
from ase import Atoms
from torch import Tensor

from ase_gffmerge.data.frames import bare, displaced
from ase_gffmerge.errors import FramesError
from ase_gffmerge.forcefield.force_field import ForceField
from ase_gffmerge.graphs import AtomGraph, batch_graphs, build_graph, predict
from ase_gffmerge.graphs.derivatives import EdgeFunction, hessian_products
from ase_gffmerge.inference.errors import FORCE_FLOOR
from ase_gffmerge.inference.predict import check_frames, edge_batches
from ase_gffmerge.merging.augmentation import copies_per_frame, with_copies
from ase_gffmerge.merging.average import align_references, working_copies
from ase_gffmerge.merging.recipe import DistillOptions
from ase_gffmerge.merging.selection import split_frames
from ase_gffmerge.models import Potential
from ase_gffmerge.runtime.distributed import gathered, is_mine
from ase_gffmerge.sampling.calibration_frames import SampleOptions, sample_frames
from ase_gffmerge.training.config import TrainConfig
from ase_gffmerge.training.loss import LabeledGraph, relative_error_on, weigh, with_features

STARTS = 4
"""Frames from which a specialist samples."""

FULL_RATE, FAR = 2e-3, 0.1
"""Peak of the learning rate for a start that misses some teacher's forces by at least this fraction."""


@dataclass(frozen=True)
class DistillationSet:
    """Unlabelled frames of the domain of one specialist: ``training`` ones, and ``held_out`` ones for early stopping."""

    training: tuple[Atoms, ...]
    held_out: tuple[Atoms, ...]


@dataclass(frozen=True)
class Teachers:
    """Specialists as teachers of one student.

    Attributes
    ----------
    teachers
        Specialists on the student's device, in its precision, with one common zero of energy.
    distillation_sets
        Their frames.
    training, held_out
        The same frames as graphs with targets and weights, one list per teacher.
    energy_shifts
        What was added to reference energies, see :class:`~ase_gffmerge.merging.report.MergeReport`.
    """

    teachers: list[ForceField]
    distillation_sets: list[DistillationSet]
    training: list[list[LabeledGraph]]
    held_out: list[list[LabeledGraph]]
    energy_shifts: dict[str, dict[str, float]]

    def suited_rate(self, student: Potential) -> float:
        """Peak of the learning rate: the nearer the start on held-out frames, the lower, by the square root of its error.

        A rate for far starts takes a near one away from its teachers first, and a few epochs do not bring it back.
        """
        worst = max(relative_error_on(student, graphs) for graphs in self.held_out)
        return FULL_RATE * (worst / FAR) ** 0.5 if 0 < worst < FAR else FULL_RATE

    def suited_config(self, student: Potential, options: DistillOptions) -> TrainConfig:
        """Training options; a learning rate and epochs that are not given suit the start and the number of teachers."""
        chosen = options.model_dump(include=set(TrainConfig.model_fields))
        rate = options.learning_rate or self.suited_rate(student)
        return TrainConfig(
            **chosen | {"learning_rate": rate, "epochs": options.suited_epochs(len(self.teachers))}
        )


def prepare_teachers(
    student: Potential,
    specialists: Sequence[ForceField],
    options: DistillOptions,
    *,
    frames: Sequence[Sequence[Atoms]],
    weights: Sequence[float],
) -> Teachers:
    """Let every specialist label its frames, and give all specialists their share of the loss.

    Parameters
    ----------
    student
        The potential to be trained; targets are on its device and relative to its reference energies.
    specialists
        The teachers.
    options
        Which frames are made, and whether node features are targets.
    frames
        Further frames, one sequence per specialist.
    weights
        Relative share of each specialist.
    """
    teachers = [
        replace(copy, potential=copy.potential.to(dtype=student.dtype))
        for copy in working_copies(specialists, student.device)
    ]
    shifts = align_references(teachers)
    distillation_sets = [
        prepare_distillation_set(s, options, extra=extra) for s, extra in zip(teachers, frames, strict=True)
    ]
    training, held_out = (
        [
            _graphs_with_targets(teacher, student, chosen, index=k, options=options)
            for k, (teacher, chosen) in enumerate(zip(teachers, parts, strict=True))
        ]
        for parts in (
            [distillation_set.training for distillation_set in distillation_sets],
            [distillation_set.held_out for distillation_set in distillation_sets],
        )
    )
    scales = [
        max(_mean_force(graphs), FORCE_FLOOR) / weight
        for graphs, weight in zip(training, weights, strict=True)
    ]
    return Teachers(teachers, distillation_sets, weigh(training, scales), weigh(held_out, scales), shifts)


def merge_weights(merged: ForceField, n: int) -> Sequence[float]:
    """How much each of ``n`` specialists counted in the merge."""
    weights = merged.merged.recipe.get("weights") if merged.merged else None
    return weights or (1.0,) * n


def _mean_force(graphs: Sequence[LabeledGraph]) -> float:
    """Mean absolute force component, eV/Å."""
    return float(torch.cat([graph.forces for graph in graphs]).abs().mean())


def prepare_distillation_set(
    specialist: ForceField, options: DistillOptions, *, extra: Sequence[Atoms] = ()
) -> DistillationSet:
    """Split a specialist's frames as a merge does, then add sampled frames and displaced copies to the training part.

    Parameters
    ----------
    specialist
        Whose calibration frames, and who samples.
    options
        How many copies and sampled frames.
    extra
        Further frames, split with the calibration frames.

    Raises
    ------
    FramesError
        For no frame at all, or elements that the specialist does not know.
    """
    given = [bare(atoms) for atoms in (*specialist.calibration, *extra)]
    if not given:
        raise FramesError(
            f"{specialist.name!r} has no frames to distill from; give some, or make some with `gffmerge sample`"
        )
    n = len(specialist.calibration)
    where = [
        f"{'calibration' if i < n else 'further'} frame {i if i < n else i - n}" for i in range(len(given))
    ]
    check_frames(specialist.potential, given, [f"{specialist.name!r}, {one}" for one in where])
    training, held_out = split_frames(specialist.with_calibration(given))
    if options.sampled:
        sampling = SampleOptions(n=options.sampled, seed=options.seed)
        training += [bare(atoms) for atoms in sample_frames(specialist, given[:STARTS], sampling).frames]
    training = _with_visited_copies(specialist, training, options)
    return DistillationSet((*training, *_displaced_copies(training, options)), tuple(held_out))


def _with_visited_copies(
    specialist: ForceField, frames: Sequence[Atoms], options: DistillOptions
) -> list[Atoms]:
    """Frames, and structures that the specialist's dynamics visits from them (:mod:`ase_gffmerge.merging.augmentation`)."""
    return with_copies(specialist, frames, options, n_copies=copies_per_frame(specialist, frames, options))


def _displaced_copies(frames: Sequence[Atoms], options: DistillOptions) -> list[Atoms]:
    """Every frame with displaced atoms and, for crystals, a strained cell."""
    rng = np.random.default_rng(options.seed)
    return [displaced(a, rattle=options.displacement, strain=options.strain, rng=rng) for a in frames]


def _graphs_with_targets(
    teacher: ForceField, student: Potential, frames: Sequence[Atoms], *, index: int, options: DistillOptions
) -> list[LabeledGraph]:
    """Graphs with the teacher's predictions as targets.

    Parameters
    ----------
    teacher
        A specialist on the device and in the precision of the student.
    student
        Whose reference energies are used, and whose neighbors the graphs hold; the teacher sees its own.
    frames
        Structures; whatever labels they carry is not looked at.
    index
        The specialist index of their atoms.
    options
        Whether features and products of Hessians are targets, too.
    """
    served: EdgeFunction = teacher.potential.for_inference()
    if options.feature_weight:
        served = with_features(teacher.potential, options.feature_match, summed=True)
    generator = torch.Generator().manual_seed(options.seed + index)
    prepared = [build_graph(atoms, teacher.cutoff, dtype=student.dtype, specialist=index) for atoms in frames]
    left, graphs, labels = iter(frames), list[list[AtomGraph]](), dict[int, dict[str, Tensor]]()
    for k, own in enumerate(edge_batches(prepared, device=student.device)):
        group = list(islice(left, len(own)))
        graphs.append(own)
        if student.hyper.cutoff != teacher.cutoff:
            cutoff = student.hyper.cutoff
            graphs[-1] = [build_graph(a, cutoff, dtype=student.dtype, specialist=index) for a in group]
        directions = None
        if options.hessian_weight:
            n_atoms = sum(map(len, group))
            directions = torch.randn(n_atoms, 3, generator=generator, dtype=student.dtype)
        if is_mine(k):
            features = bool(options.feature_weight)
            labels[k] = _labels(served, teacher.potential, student, own, directions, features=features)
            labels[k]["stress"][[not atoms.pbc.all() for atoms in group]] = torch.nan
    per_edge = options.feature_match == "edges"
    return [
        LabeledGraph.of(graph, **dict(zip(found, targets, strict=True)))
        for batch, found in zip(graphs, gathered(labels), strict=True)
        for graph, *targets in zip(batch, *_by_structure(found, batch, per_edge=per_edge), strict=True)
    ]


def _labels(
    served: EdgeFunction,
    teacher: Potential,
    student: Potential,
    graphs: Sequence[AtomGraph],
    directions: Tensor | None,
    *,
    features: bool,
) -> dict[str, Tensor]:
    """Targets of a batch by their names in :class:`~ase_gffmerge.training.loss.LabeledGraph`, on the CPU.

    Parameters
    ----------
    served
        The teacher, as fast as it can be, with its features as inputs of the readout where they are targets.
    teacher, student
        As for :func:`_graphs_with_targets`.
    graphs
        With the teacher's neighbors.
    directions : (n_atoms, 3)
        With which products of Hessians are taken, where they are targets.
    features
        Whether the teacher's features are targets.
    """
    batch = batch_graphs(graphs).to(student.device)
    prediction = predict(served, batch)
    references = student.references[student.species_row[batch.atomic_numbers]]
    reduced = prediction.energy.index_add(0, batch.structure_index, -references)
    found = {
        "energy": reduced.to(student.dtype),
        "forces": prediction.forces,
        "stress": prediction.stress(batch.cell),
    }
    if features:
        found["features"] = prediction.readout_inputs[-1]
    if directions is not None:
        directions = directions.to(batch.positions)
        products = hessian_products(teacher, batch, directions)
        found["curvature"] = torch.cat([directions, products], dim=1)
    return {name: tensor.cpu() for name, tensor in found.items()}


def _by_structure(
    found: Mapping[str, Tensor], graphs: Sequence[AtomGraph], *, per_edge: bool
) -> list[tuple[Tensor, ...]]:
    """Every tensor of a batch as one per structure; features may belong to edges."""
    n_atoms, n_edges = [len(graph) for graph in graphs], [graph.n_edges for graph in graphs]
    rows = {"energy": [1] * len(graphs), "stress": [1] * len(graphs)}
    if per_edge:
        rows["features"] = n_edges
    return [tensor.split(rows.get(name, n_atoms)) for name, tensor in found.items()]
