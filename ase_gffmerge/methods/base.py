"""What a method is (one function from several specialists to potentials, its source and needs), and all of them by name.

All methods by name, in the order in which tables show them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import torch
from ase import Atoms

from ase_gffmerge.errors import RecipeError
from ase_gffmerge.forcefield.force_field import ForceField
from ase_gffmerge.models import Potential
from ase_gffmerge.runtime.progress import Progress
from ase_gffmerge.runtime.registry import Registry


class Requirement(StrEnum):
    """What a method needs beside the specialists' weights."""

    FRAMES = "frames"
    """Unlabelled calibration frames of every specialist."""
    BASE = "base"
    """The common ancestor's weights."""
    LABELS = "labels"
    """Labelled training frames of every specialist."""


@dataclass(frozen=True, kw_only=True)
class MergeInputs:
    """What every method is given.

    Attributes
    ----------
    specialists
        Compatible specialists with calibration frames, of one conditioning, never changed by a method.
    base
        Their common ancestor, if it is at hand.
    labelled
        Labelled training frames, one sequence per specialist, if they are at hand.
    device
        Where to compute.
    """

    specialists: tuple[ForceField, ...]
    base: ForceField | None = None
    labelled: tuple[Sequence[Atoms], ...] | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def provides(self, need: Requirement) -> bool:
        """Whether the inputs hold what a method needs."""
        held = {
            Requirement.FRAMES: all(s.calibration for s in self.specialists),
            Requirement.BASE: self.base is not None,
            Requirement.LABELS: self.labelled is not None,
        }
        return held[need]


@dataclass(frozen=True, kw_only=True)
class MergeOutput:
    """What a method makes of several specialists.

    Attributes
    ----------
    potentials
        One potential for all structures or, for methods that are :attr:`Method.per_specialist`, one for the structures of
        each specialist, in their order.
    settings
        Hyper-parameters that were chosen, with their values, for the report.
    """

    potentials: tuple[Potential, ...]
    settings: Mapping[str, float | str] = field(default_factory=dict)

    def potential(self, specialist: int) -> Potential:
        """The potential for structures like the calibration frames of a specialist."""
        return self.potentials[specialist if len(self.potentials) > 1 else 0]


MethodFunction = Callable[[MergeInputs, Progress], MergeOutput]


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way to use several specialists together.

    Attributes
    ----------
    name, citation
        Short name, and where the method comes from.
    needs
        What it cannot do without.
    trains
        Whether it trains by gradient descent (left out of a comparison unless it is asked for).
    per_specialist
        Whether it makes one potential per specialist, between which somebody has to choose for every structure: not one
        potential energy surface.
    merges
        Whether it runs the solves of :mod:`ase_gffmerge.merging`, whose version then decides its outcome too.
    run
        The method itself.
    """

    name: str
    citation: str
    needs: frozenset[Requirement]
    trains: bool
    per_specialist: bool
    merges: bool = False
    run: MethodFunction

    def missing(self, merge_inputs: MergeInputs) -> tuple[Requirement, ...]:
        """What the method needs and the inputs lack."""
        return tuple(sorted(need for need in self.needs if not merge_inputs.provides(need)))


def method(
    name: str,
    *,
    citation: str,
    needs: Sequence[Requirement] = (),
    trains: bool = False,
    per_specialist: bool = False,
    merges: bool = False,
) -> Callable[[MethodFunction], Method]:
    """Decorate a function that is a method: it becomes a :class:`Method` of that name.

    Parameters
    ----------
    name, citation, needs, trains, per_specialist, merges
        See :class:`Method`.
    """

    def of(run: MethodFunction) -> Method:
        return Method(
            name=name,
            citation=citation,
            needs=frozenset(needs),
            trains=trains,
            per_specialist=per_specialist,
            merges=merges,
            run=run,
        )

    return of


METHODS: Registry[Method] = Registry(
    "method",
    group="ase_gffmerge.methods",
    own={
        "best_single": "ase_gffmerge.methods.references:best_single",
        "ensemble": "ase_gffmerge.methods.references:ensemble",
        "mean": "ase_gffmerge.methods.closed_form:mean",
        "karcher": "ase_gffmerge.methods.karcher:karcher",
        "task_arithmetic": "ase_gffmerge.methods.task_vectors:task_arithmetic",
        "ties": "ase_gffmerge.methods.task_vectors:ties",
        "dare": "ase_gffmerge.methods.task_vectors:dare",
        "fisher": "ase_gffmerge.methods.fisher:fisher",
        "regmean": "ase_gffmerge.methods.regmean:regmean",
        "regmean++": "ase_gffmerge.methods.regmean:regmean_plus_plus",
        "procrustes": "ase_gffmerge.methods.procrustes:procrustes",
        "git_rebasin": "ase_gffmerge.methods.git_rebasin:git_rebasin",
        "emr": "ase_gffmerge.methods.task_vectors:emr",
        "paper": "ase_gffmerge.methods.closed_form:paper",
        "closed-form": "ase_gffmerge.methods.closed_form:closed_form",
        "gffmerge": "ase_gffmerge.methods.closed_form:gffmerge",
        "joint": "ase_gffmerge.methods.references:joint",
    },
    name_of=lambda found: found.name if isinstance(found, Method) else None,
    error=RecipeError,
)
"""A new method is one file and one line here; other packages add theirs as entry points ``ase_gffmerge.methods``."""
