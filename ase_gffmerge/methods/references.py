"""References that are no merges: the best specialist, the ensemble, joint training on all labels."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from ase_gffmerge.errors import FramesError, IncompatibleSpecialistsError
from ase_gffmerge.forcefield.force_field import symbols
from ase_gffmerge.graphs.graph import Topology
from ase_gffmerge.merging.disagreement import DisagreementMetric
from ase_gffmerge.methods.base import MergeInputs, MergeOutput, Requirement, method
from ase_gffmerge.methods.weight_space import aligned_copies
from ase_gffmerge.models import Potential
from ase_gffmerge.runtime.progress import Progress
from ase_gffmerge.training.train import FINE_TUNING, train_jointly


@method("best_single", citation="the one specialist closest to all", needs=(Requirement.FRAMES,))
def best_single(merge_inputs: MergeInputs, progress: Progress) -> MergeOutput:
    """Choose the specialist whose forces on everybody's calibration frames differ least from their owners'.

    Raises
    ------
    IncompatibleSpecialistsError
        When no specialist knows all elements of all frames.
    """
    specialists = aligned_copies(merge_inputs)
    elements = {int(z) for s in specialists for atoms in s.calibration for z in atoms.numbers}
    able = [s for s in specialists if elements <= set(s.species)]
    if not able:
        raise IncompatibleSpecialistsError(
            f"no specialist knows all elements of the calibration frames ({symbols(sorted(elements))}), so none can stand "
            "for all; leave best_single out of this comparison"
        )
    metric = DisagreementMetric.of(specialists)
    disagreements = []
    for i, specialist in enumerate(able):
        progress(i / len(able), specialist.name)
        disagreements.append(metric.disagreement(specialist.potential))
    best = able[disagreements.index(min(disagreements))]
    return MergeOutput(potentials=(best.potential,), settings={"specialist": best.name})


class Ensemble(nn.Module):
    """Mean of the energies, and with them of the forces, of several potentials.

    A structure is the business of the members that know all its elements: all of its atoms get the mean over these
    members, so that every structure has one smooth energy. The cost is that of all members.

    Parameters
    ----------
    members
        Potentials of one architecture, cutoff, device, precision and zero of energy.
    """

    def __init__(self, members: Sequence[Potential]):
        super().__init__()
        self.members = nn.ModuleList(members)
        self.architecture, self.hyper = members[0].architecture, members[0].hyper
        self.species = tuple(sorted({z for member in members for z in member.species}))

    def for_inference(self) -> "Ensemble":
        """Give the ensemble of what serves its members."""
        return Ensemble([member.for_inference() for member in self.members])  # type: ignore[operator]

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the members' weights."""
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Device of the members' weights."""
        return next(self.parameters()).device

    def forward(self, vectors: Tensor, graph: Topology) -> tuple[Tensor, list[Tensor]]:
        """Per-atom energies (n_atoms,) in eV for edge vectors (n_edges, 3) in Å; members share no inputs of a readout.

        Raises
        ------
        FramesError
            When no member knows all elements of a structure.
        """
        total = torch.zeros(len(graph), dtype=torch.float64, device=vectors.device)
        count = torch.zeros_like(total)
        for member in self.members:
            able = self._knows(member, graph)  # type: ignore[arg-type]
            if able.any():
                total = total + torch.where(able, member(vectors, graph)[0], 0.0)
                count = count + able
        if not count.all():
            raise FramesError(
                "no specialist knows all elements of one of the structures, so there are no outputs to average; a merged "
                "potential covers them"
            )
        return total / count, []

    @staticmethod
    def _knows(member: Potential, graph: Topology) -> Tensor:
        """Whether a member knows all elements of the structure that an atom belongs to (n_atoms,)."""
        foreign = member.species_row[graph.atomic_numbers] < 0
        counts = torch.zeros(len(graph), device=foreign.device)  # there are no more structures than atoms
        counts.index_add_(0, graph.structure_index, foreign.float())
        return counts[graph.structure_index] == 0


@method("ensemble", citation="mean of the specialists' outputs")
def ensemble(merge_inputs: MergeInputs, progress: Progress) -> MergeOutput:
    """All specialists at once, K times the cost: the mean of their energies and forces."""
    progress(0.0, "references")
    members = Ensemble([s.potential for s in aligned_copies(merge_inputs)])
    return MergeOutput(potentials=(cast("Potential", members),))


@method(
    "joint",
    citation="the reference: training on all labels",
    needs=(Requirement.BASE, Requirement.LABELS),
    trains=True,
)
def joint(merge_inputs: MergeInputs, progress: Progress) -> MergeOutput:
    """Fine-tune the common base on all labelled frames, as a specialist is fine-tuned on its own."""
    assert merge_inputs.base is not None
    assert merge_inputs.labelled is not None
    config = FINE_TUNING
    potential, _ = train_jointly(
        merge_inputs.base,
        merge_inputs.labelled,
        config,
        device=merge_inputs.device,
        callback=lambda epoch, losses: progress(epoch / config.epochs, f"epoch {epoch}/{config.epochs}"),
    )
    settings = {"epochs": config.epochs, "learning rate": config.learning_rate}
    return MergeOutput(potentials=(potential,), settings=settings)
