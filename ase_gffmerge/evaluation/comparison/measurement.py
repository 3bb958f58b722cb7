"""What is measured of one method (errors, seconds, size, cost), kept on disk so that a comparison can be resumed."""

import hashlib
import json
import statistics
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from ase import Atoms

from ase_gffmerge import __version__
from ase_gffmerge.data.frames import hash_frames, hash_labelled
from ase_gffmerge.errors import MergeWarning
from ase_gffmerge.evaluation.comparison.inputs import LabelledSet
from ase_gffmerge.forcefield.force_field import ForceField
from ase_gffmerge.graphs import batch_graphs, build_graph, predict
from ase_gffmerge.graphs.graph import AtomGraph
from ase_gffmerge.inference.errors import Errors, evaluate
from ase_gffmerge.merging.recipe import MERGE_VERSION
from ase_gffmerge.methods import MergeInputs, MergeOutput, Method, Requirement
from ase_gffmerge.models import Potential
from ase_gffmerge.runtime.distributed import by_first
from ase_gffmerge.runtime.progress import Progress, no_progress
from ase_gffmerge.storage.results import Record, ResultStore
from ase_gffmerge.workflows.cache import MergeCache

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
        Numbers that must be stored to serve all specialists.
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


def default_folder() -> Path:
    """Where rows are kept unless a folder is named: beside the cached merges."""
    return MergeCache().directory / "comparisons"


class RowStore:
    """Rows of one comparison in a folder that may hold those of others.

    Parameters
    ----------
    folder
        Made when it does not exist.
    merge_inputs, tests
        What is compared: a row of other weights, frames, device or version is not found.
    fresh
        Find nothing: every row is measured again and replaces the old one.

    Raises
    ------
    FileFormatError
        When the folder cannot be written.
    """

    def __init__(
        self, folder: Path, merge_inputs: MergeInputs, tests: Sequence[LabelledSet], *, fresh: bool = False
    ):
        self._results = ResultStore(folder, fresh)
        self._parts, self._needed = _parts(merge_inputs, tests), _needed(merge_inputs)

    def key(self, model: str, method: Method | None = None) -> str:
        """Name of a row, of the specialists themselves without a method.

        Base, labels and the version of the merge count only for methods that declare to need or to use them.
        """
        needs = sorted(method.needs) if method else []
        always = {**self._parts, "merge": MERGE_VERSION if method and method.merges else None}
        parts = [always, *(self._needed[need] for need in needs), model]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def find(self, keys: Sequence[str]) -> dict[str, Record]:
        """Finished rows of these keys, those that this version understands."""
        found = by_first(partial(self._results.find, keys))
        return {key: row for key, row in found.items() if _is_row(row)}

    def keep(self, records: Mapping[str, Record]) -> None:
        """Write finished rows at once and atomically."""
        by_first(partial(self._results.keep, records, name="row"))


def _is_row(record: Record) -> bool:
    try:
        Measurement.from_dict(record)
    except (LookupError, TypeError):
        return False
    return True


def _parts(merge_inputs: MergeInputs, tests: Sequence[LabelledSet]) -> dict[str, object]:
    """What every row depends on."""
    return {
        "version": __version__,
        "device": str(merge_inputs.device),
        "specialists": [_identity(specialist) for specialist in merge_inputs.specialists],
        "tests": [hash_labelled(test.frames) for test in tests],
    }


def _needed(merge_inputs: MergeInputs) -> dict[Requirement, object]:
    """What a row depends on through each need of its method."""
    return {
        Requirement.FRAMES: [hash_frames(specialist.calibration) for specialist in merge_inputs.specialists],
        Requirement.BASE: merge_inputs.base.fingerprint if merge_inputs.base else None,
        Requirement.LABELS: [hash_labelled(frames) for frames in merge_inputs.labelled or ()],
    }


def _identity(specialist: ForceField) -> list[object]:
    return [specialist.name, specialist.fingerprint, list(specialist.species), specialist.level_of_theory]
