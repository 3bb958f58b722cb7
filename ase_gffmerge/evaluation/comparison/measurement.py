"""What is measured of one method: errors on every specialist's test frames, seconds, size and cost."""

import statistics
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from ase import Atoms

from ase_gffmerge.errors import MergeWarning
from ase_gffmerge.evaluation.comparison.inputs import LabelledSet
from ase_gffmerge.graphs import batch_graphs, build_graph, predict
from ase_gffmerge.graphs.graph import AtomGraph
from ase_gffmerge.inference.metrics import Errors, evaluate
from ase_gffmerge.methods import MergeInputs, MergeOutput, Method
from ase_gffmerge.models import Potential
from ase_gffmerge.runtime.progress import Progress, no_progress

WARM_UP, REPEATS = 3, 21


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One row of a comparison.

    Attributes
    ----------
    errors
        Against the labels of every specialist's test frames, in the order of the specialists.
    seconds
        Wall time from the specialists to the potential, tuning of hyper-parameters included; ``None`` for the
        specialists themselves.
    parameters
        Numbers that must be stored to serve all territories.
    cost
        Time for energy and forces of one frame in units of the specialist's own, mean over the specialists.
    settings
        Hyper-parameters that the method chose.
    """

    errors: tuple[Errors, ...]
    seconds: float | None
    parameters: int
    cost: float
    settings: Mapping[str, float | str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, object]:
        """JSON-able dictionary."""
        return {
            **vars(self),
            "errors": [errors.to_dict() for errors in self.errors],
            "settings": dict(self.settings),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Measurement":
        """Inverse of :meth:`to_dict`."""
        return cls(**{**data, "errors": tuple(Errors(**errors) for errors in data["errors"])})


def run_timed(
    method: Method, merge_inputs: MergeInputs, progress: Progress | None = None
) -> tuple[MergeOutput, float]:
    """Run a method and return the seconds it took; a comparison shows a bad merge, so nothing warns of one.

    Parameters
    ----------
    method
        Of the registry.
    merge_inputs
        What it is given.
    progress
        Called with a fraction (0 to 1) and a description.
    """
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MergeWarning)
        merge_output = method.run(merge_inputs, progress or no_progress)
    if merge_inputs.device.type == "cuda":
        torch.cuda.synchronize(merge_inputs.device)
    return merge_output, time.perf_counter() - start


def measure(
    method: Method, merge_inputs: MergeInputs, tests: Sequence[LabelledSet], progress: Progress
) -> Measurement:
    """Run a method and measure what comes out.

    Parameters
    ----------
    method
        Of the registry.
    merge_inputs
        What it is given.
    tests
        Labelled frames, one set per specialist, in order.
    progress
        Called with a fraction (0 to 1) and a description.
    """
    merge_output, seconds = run_timed(
        method, merge_inputs, lambda fraction, text: progress(0.8 * fraction, text)
    )
    progress(0.8, "errors on the test frames")
    return measure_output(merge_output, merge_inputs, tests, seconds=seconds)


def measure_specialists(merge_inputs: MergeInputs, tests: Sequence[LabelledSet]) -> Measurement:
    """Every specialist on its own test frames; the number of parameters is that of one."""
    return Measurement(
        errors=tuple(
            evaluate(s.potential, t.frames) for s, t in zip(merge_inputs.specialists, tests, strict=True)
        ),
        seconds=None,
        parameters=n_parameters([merge_inputs.specialists[0].potential]),
        cost=1.0,
    )


def measure_output(
    merge_output: MergeOutput, merge_inputs: MergeInputs, tests: Sequence[LabelledSet], *, seconds: float
) -> Measurement:
    """Errors, size and cost of the potentials that a method made.

    Parameters
    ----------
    merge_output
        The potentials, and the settings that the method chose.
    merge_inputs
        The specialists, whose cost is the unit.
    tests
        Labelled frames, one set per specialist, in order.
    seconds
        How long the method took.
    """
    potentials = [merge_output.potential(k) for k in range(len(tests))]
    own = [specialist.potential for specialist in merge_inputs.specialists]
    return Measurement(
        errors=tuple(
            evaluate(potential, test.frames, specialist=k)
            for k, (potential, test) in enumerate(zip(potentials, tests, strict=True))
        ),
        seconds=seconds,
        parameters=n_parameters(merge_output.potentials),
        cost=statistics.fmean(
            relative_cost(potential, alone, test.frames[0], specialist=k)
            for k, (potential, alone, test) in enumerate(zip(potentials, own, tests, strict=True))
        ),
        settings=dict(merge_output.settings),
    )


def n_parameters(potentials: Sequence[Potential]) -> int:
    """Number of parameters, those that several potentials share counted once."""
    shared = {parameter.data_ptr(): parameter for p in potentials for parameter in p.parameters()}
    return sum(parameter.numel() for parameter in shared.values())


def relative_cost(model: Potential, own: Potential, atoms: Atoms, *, specialist: int = 0) -> float:
    """Time for energy and forces of ``atoms`` by ``model`` over that by ``own``: medians, measured in turns.

    On a CPU its time in this process counts, so that other processes do not. The neighbour list is made beforehand: it is
    the same for both.

    Parameters
    ----------
    model, own
        Potentials on one device.
    atoms
        A structure that both know.
    specialist
        Index of the specialist it belongs to, for ``model``.
    """
    pair = [(model, _graph(model, atoms, specialist)), (own, _graph(own, atoms, 0))]
    seconds: list[list[float]] = [[], []]
    for turn in range(WARM_UP + REPEATS):
        for i in (0, 1) if turn % 2 else (1, 0):
            seconds[i].append(_seconds(*pair[i]))
    return statistics.median(seconds[0][WARM_UP:]) / statistics.median(seconds[1][WARM_UP:])


def _graph(potential: Potential, atoms: Atoms, specialist: int) -> AtomGraph:
    graph = build_graph(atoms, potential.hyper.cutoff, dtype=potential.dtype, specialist=specialist)
    return batch_graphs([graph]).to(potential.device)


def _seconds(potential: Potential, graph: AtomGraph) -> float:
    clock = time.perf_counter if potential.device.type == "cuda" else time.process_time
    start = clock()
    prediction = predict(potential, graph)
    prediction.forces.cpu()  # waits for the device
    return clock() - start
