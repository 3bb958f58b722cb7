"""All methods side by side on the same specialists and the same test frames."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from itertools import combinations

from ase_gffmerge.errors import GFFMergeError
from ase_gffmerge.evaluation.comparison.inputs import (
    LabelledSet,
    check_elements,
    check_leaks,
    frames_seen,
    unrecorded,
)
from ase_gffmerge.evaluation.comparison.measurement import Measurement, RowStore, measure, measure_specialists
from ase_gffmerge.inference.errors import Errors
from ase_gffmerge.merging.average import related
from ase_gffmerge.methods import METHODS, MergeInputs, Method, Requirement
from ase_gffmerge.runtime.executors import Failure, OncePerWorker, run_chunks
from ase_gffmerge.runtime.progress import Progress, no_progress
from ase_gffmerge.storage.results import Record

SPECIALIST = "specialist"
UNITS = {
    "force_mae": "eV/Å",
    "force_rmse": "eV/Å",
    "energy_mae": "eV/atom",
    "worst_ratio": "force MAE of the specialist",
    "seconds": "s",
    "parameters": "1",
    "cost": "time of the specialist",
}
REMEDIES = {
    Requirement.FRAMES: "needs calibration frames of every specialist; train with --frames N",
    Requirement.BASE: "needs the common base, which is not bundled; give its file with --base",
    Requirement.LABELS: "needs labelled training frames; give them with --labels, once per specialist",
}


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What was measured of every method.

    Attributes
    ----------
    names
        Of the specialists, in order.
    rows
        By method; the first, ``specialist``, has every specialist on its own test frames.
    skipped
        Why a method has no row.
    told_apart
        Methods that must be told which specialist a structure belongs to.
    frames
        Number of test frames by specialist.
    base
        Name of the common ancestor, if it was at hand.
    notes
        What a reader should know about the numbers.
    """

    names: tuple[str, ...]
    rows: Mapping[str, Measurement]
    skipped: Mapping[str, str]
    told_apart: tuple[str, ...] = ()
    frames: Mapping[str, int]
    base: str | None = None
    notes: tuple[str, ...] = ()

    def errors(self, kind: str) -> dict[str, dict[str, float]]:
        """``force_mae``, ``force_rmse`` (eV/Å) or ``energy_mae`` (eV/atom) by method and specialist."""
        return {
            model: {name: getattr(e, kind) for name, e in zip(self.names, row.errors, strict=True)}
            for model, row in self.rows.items()
        }

    def worst_ratio(self, model: str) -> float:
        """Force MAE of a method over the specialist's own, on the specialist where it does worst.

        Where the specialist's own is below 1 meV/Å, as on frames that have no forces by symmetry, that counts in its place,
        and energies count too, from 0.1 meV/atom on.
        """
        pairs = zip(self.rows[model].errors, self.rows[SPECIALIST].errors, strict=True)
        return max(_ratio(mine, theirs) for mine, theirs in pairs)

    def to_dict(self) -> dict[str, object]:
        """JSON-able document; ``seconds`` has no entry for the specialists themselves."""
        return {
            **{kind: self.errors(kind) for kind in ("force_mae", "force_rmse", "energy_mae")},
            "worst_ratio": {model: self.worst_ratio(model) for model in self.rows},
            "seconds": {model: row.seconds for model, row in self.rows.items() if row.seconds is not None},
            "parameters": {model: row.parameters for model, row in self.rows.items()},
            "cost": {model: row.cost for model, row in self.rows.items()},
            "settings": {model: dict(row.settings) for model, row in self.rows.items() if row.settings},
            "skipped": dict(self.skipped),
            "told_apart": list(self.told_apart),
            "frames": dict(self.frames),
            "base": self.base,
            "notes": list(self.notes),
            "units": UNITS,
        }


FORCE_RESOLUTION, ENERGY_RESOLUTION = 1e-3, 1e-4
"""Errors in eV/Å and eV/atom that no method need be better than."""


def _ratio(mine: Errors, theirs: Errors) -> float:
    forces = mine.force_mae / max(theirs.force_mae, FORCE_RESOLUTION)
    if theirs.force_mae >= FORCE_RESOLUTION:
        return forces
    return max(forces, mine.energy_mae / max(theirs.energy_mae, ENERGY_RESOLUTION))


def compare_methods(
    merge_inputs: MergeInputs,
    tests: Sequence[LabelledSet],
    methods: Sequence[str] | None = None,
    *,
    labelled: Sequence[LabelledSet] = (),
    store: RowStore | None = None,
    executor: Executor | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Run methods and measure them on test frames that nobody has seen.

    Parameters
    ----------
    merge_inputs
        The specialists, see :func:`~ase_gffmerge.evaluation.comparison.inputs.make_merge_inputs`.
    tests
        Labelled frames, one set per specialist, in order.
    methods
        Names; default: all that need no training by gradient descent and whose needs are met.
    labelled
        Where the labelled frames of the mixture come from, so that leaks from them are named.
    store
        Finished rows are taken from here, and kept here as soon as they are measured.
    executor
        Workers, each of which runs one method at a time; default: this process.
    progress
        Called with a fraction (0 to 1) and a description.

    Raises
    ------
    RecipeError
        For an unknown method.
    FramesError
        For test frames that specialists, base or labels contain, or with elements that a specialist does not know.
    """
    chosen, skipped = choose(merge_inputs, methods)
    check_elements(merge_inputs, tests)
    check_leaks(tests, frames_seen(merge_inputs, labelled))
    models = [SPECIALIST, *(method.name for method in chosen)]
    keys = (
        [store.key(model, method) for model, method in zip(models, [None, *chosen], strict=True)]
        if store
        else models
    )
    tell, given = progress or no_progress, (merge_inputs, tuple(tests))
    if executor is None:
        sections = {model: _section(tell, k, len(chosen), model) for k, model in enumerate(models[1:])}
        found = run_chunks(_Rows(lambda: given, sections), models, keys=keys, chunk=1, store=store)
    else:
        found = run_chunks(
            _Rows(OncePerWorker.of(given), {}),
            models,
            keys=keys,
            executor=executor,
            chunk=1,
            store=store,
            progress=tell,
            what="methods",
        )
    rows = {}
    for model, row in zip(models, found, strict=True):
        if isinstance(row, Failure):
            skipped[model] = row.message
        else:
            rows[model] = Measurement.from_dict(row)
    names = tuple(specialist.name for specialist in merge_inputs.specialists)
    return Comparison(
        names=names,
        rows=rows,
        skipped=skipped,
        told_apart=tuple(method.name for method in chosen if method.per_specialist),
        frames={name: len(test.frames) for name, test in zip(names, tests, strict=True)},
        base=merge_inputs.base.name if merge_inputs.base else None,
        notes=_notes(merge_inputs),
    )


def choose(merge_inputs: MergeInputs, names: Sequence[str] | None) -> tuple[list[Method], dict[str, str]]:
    """Methods to run, and why others are not: all that train unless asked for by name, and those that lack something."""
    methods = [METHODS[name] for name in dict.fromkeys(names)] if names else list(METHODS.values())
    chosen, skipped = [], {}
    for method in methods:
        if method.trains and not names:
            skipped[method.name] = f"trains by gradient descent; ask for it with --methods {method.name}"
        elif missing := method.missing(merge_inputs):
            skipped[method.name] = "; ".join(REMEDIES[need] for need in missing)
        else:
            chosen.append(method)
    return chosen, skipped


@dataclass(frozen=True)
class _Rows:
    """What a worker does with names of methods: measure them."""

    given: Callable[[], tuple[MergeInputs, tuple[LabelledSet, ...]]]
    sections: Mapping[str, Progress]

    def __call__(self, models: Sequence[str]) -> list[Record | Failure]:
        return [self._row(model) for model in models]

    def _row(self, model: str) -> Record | Failure:
        merge_inputs, tests = self.given()
        if model == SPECIALIST:
            return measure_specialists(merge_inputs, tests).to_dict()
        progress = self.sections.get(model, no_progress)
        progress(0.0, "")
        try:
            return measure(METHODS[model], merge_inputs, tests, progress).to_dict()
        except GFFMergeError as error:
            return Failure(" ".join(str(error).split()))


def _section(progress: Progress, done: int, total: int, name: str) -> Progress:
    return lambda fraction, text: progress((done + fraction) / total, f"{name}  {text}")


def _notes(merge_inputs: MergeInputs) -> tuple[str, ...]:
    notes = []
    if unknown := unrecorded(merge_inputs):
        notes.append(
            f"nothing says which frames the training of {', '.join(unknown)} saw (files of earlier versions do not), so "
            "test frames could be compared with calibration frames only"
        )
    strangers = [pair for pair in combinations(merge_inputs.specialists, 2) if not related(*pair)]
    if strangers:
        pairs = "; ".join(f"{first.name} and {second.name}" for first, second in strangers)
        notes.append(f"no common base is on record: {pairs}; merging by weights cannot work for them")
    return tuple(notes)
