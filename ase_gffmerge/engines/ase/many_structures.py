"""Energies, forces and stresses of many structures by many workers, with finished results on disk."""

import hashlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, cast

import numpy as np
from ase import Atoms
from ase.calculators.calculator import BaseCalculator, PropertyNotImplementedError

from ase_gffmerge.engines.ase.calculator import GFFMergeCalculator
from ase_gffmerge.engines.ase.dispersion import Results
from ase_gffmerge.engines.ase.results import has_volume, listed
from ase_gffmerge.errors import ArgumentError, EvaluationFailed, GFFMergeError, first_line
from ase_gffmerge.forcefield.force_field import ForceField
from ase_gffmerge.integrations.load import describe
from ase_gffmerge.runtime.executors import CHUNK, Failure, LocalProcesses, OncePerWorker, run_chunks
from ase_gffmerge.runtime.progress import Progress, progress_bar
from ase_gffmerge.storage.results import ResultStore

Source = BaseCalculator | ForceField | str | Path | Callable[[], BaseCalculator]


def evaluate_many(
    structures: Sequence[Atoms],
    calculator: Source,
    properties: Sequence[str] | None = None,
    *,
    executor: Executor | None = None,
    chunk: int = CHUNK,
    store: str | Path | None = None,
    failures: Literal["raise", "skip"] = "raise",
    progress: Progress | None = None,
) -> list[Results]:
    """Evaluate many structures, shared out among worker processes; what was finished survives kills.

    Parameters
    ----------
    structures
        Of any sizes and boundary conditions; they are not changed, and equal ones are evaluated once.
    calculator
        A force field, its file or bundled name, any ASE calculator, or a function without arguments that makes one, such
        as ``functools.partial(GFFMergeCalculator, "merged.safetensors", dtype="float64")``: each worker makes it once and
        keeps it. Calculators and force fields that are given themselves travel with every chunk; files and functions do not.
    properties
        As ASE names them; default: all that the calculator serves and a structure has.
    executor
        Any :class:`concurrent.futures.Executor`, of Dask or executorlib for example; default: one process per core of this
        machine, which are replaced when they are killed. In a script the call then belongs below
        ``if __name__ == "__main__":``.
    chunk
        Structures per task.
    store
        Folder, which all workers see, of finished results: a later call with the same calculator evaluates only what is not
        there. A :class:`~ase_gffmerge.GFFMergeCalculator` is known by weights and options, others by class and parameters.
    failures
        What becomes of structures that cannot be evaluated: ``raise`` an error when all others are finished, or ``skip``:
        their result is ``{"error": message}``. The next call tries them again.
    progress
        Called with a fraction (0 to 1) and a description; default: a bar, on terminals and in notebooks.

    Returns
    -------
    list of dict
        One for each structure in their order, with keys, units and shapes of ASE's ``results``.

    Raises
    ------
    EvaluationFailed
        For structures that cannot be evaluated, or workers that die again and again.
    ArgumentError
        For something that is no calculator, or a chunk of no structures.
    """
    items = listed(structures)
    if failures not in ("raise", "skip"):
        raise ArgumentError(f"failures={failures!r} is not known; use 'raise' or 'skip'")
    made, example = _once_per_worker(calculator)
    wanted = (
        None if properties is None else tuple([properties] if isinstance(properties, str) else properties)
    )
    identity = identity_of(example, wanted)
    with (
        LocalProcesses() if executor is None else nullcontext(executor) as workers,
        progress_bar("evaluating") if progress is None else nullcontext(progress) as watched,
    ):
        outcomes = run_chunks(
            _Evaluation(made, wanted),
            items,
            keys=[structure_key(identity, atoms) for atoms in items],
            executor=workers,
            chunk=chunk,
            store=None if store is None else ResultStore(Path(store)),
            progress=watched,
        )
    failed = [(k, one.message) for k, one in enumerate(outcomes) if isinstance(one, Failure)]
    if failed and failures == "raise":
        k, message = failed[0]
        rest = (
            f"the others are in {store}" if store else "give a store to keep the others, or failures='skip'"
        )
        raise EvaluationFailed(
            f"{len(failed)} of {len(items)} structures failed, first structure {k}: {message}; {rest}"
        )
    return [cast("Results", {"error": one.message}) if isinstance(one, Failure) else one for one in outcomes]


def _once_per_worker(calculator: Source) -> tuple[OncePerWorker[BaseCalculator], BaseCalculator]:
    """What workers make their calculator with, and one that shows what it is."""
    if isinstance(calculator, GFFMergeCalculator):
        return OncePerWorker.of(calculator.spawn()), calculator
    if isinstance(calculator, BaseCalculator):
        return OncePerWorker.of(calculator), calculator
    if isinstance(calculator, ForceField):
        given = GFFMergeCalculator(calculator)
        return OncePerWorker.of(given), given
    if isinstance(calculator, str | Path):
        make = partial(GFFMergeCalculator, describe(calculator))  # by its absolute path
        return OncePerWorker(make), make()
    made = calculator() if callable(calculator) else calculator
    if not isinstance(made, BaseCalculator):
        raise ArgumentError(
            f"{made!r:.60} is no calculator; give one, a force field, its file, or a function that makes a calculator"
        )
    return OncePerWorker(calculator), made


def identity_of(calculator: BaseCalculator, options: object) -> str:
    """What decides results beside the structure: the calculator, and what is asked of it."""
    if isinstance(calculator, GFFMergeCalculator):
        names = ("dtype", "specialist", "dispersion")
        what: list[object] = [
            calculator.force_field.content_digest,
            *(calculator.parameters[n] for n in names),
        ]
    else:
        what = [f"{type(calculator).__module__}.{type(calculator).__qualname__}", calculator.parameters]
    return json.dumps([what, options], sort_keys=True, default=_in_full)


def _in_full(value: object) -> object:
    """What JSON does not know: arrays with all of their numbers, which their repr leaves out."""
    return [str(value.dtype), value.tolist()] if isinstance(value, np.ndarray) else repr(value)


def structure_key(identity: str, atoms: Atoms) -> str:
    """SHA-256 of an identity and of all that a calculator may read of a structure."""
    sha = hashlib.sha256(identity.encode())
    arrays = {"cell": atoms.cell.array, "pbc": atoms.pbc, **atoms.arrays}
    for name in sorted(arrays.keys() - {"momenta", "masses", "tags"}):
        array = np.ascontiguousarray(arrays[name])
        sha.update(f"{name}|{array.dtype.str}|{array.shape}|".encode())
        sha.update(array.tobytes())
    sha.update(json.dumps(atoms.info, sort_keys=True, default=_in_full).encode())
    return sha.hexdigest()


@dataclass(frozen=True)
class _Evaluation:
    """What a worker does with some structures."""

    calculator: OncePerWorker[BaseCalculator]
    properties: tuple[str, ...] | None

    def __call__(self, structures: Sequence[Atoms]) -> list[Results | Failure]:
        calculator = self.calculator()
        if isinstance(calculator, GFFMergeCalculator):
            try:
                return list(calculator.evaluate(structures, self.properties))
            except (GFFMergeError, PropertyNotImplementedError):  # of one of them, which the loop below finds
                pass
        return [self._single(calculator, atoms) for atoms in structures]

    def _single(self, calculator: BaseCalculator, atoms: Atoms) -> Results | Failure:
        """Result of one structure, or why there is none."""
        try:
            if isinstance(calculator, GFFMergeCalculator):
                return calculator.evaluate([atoms], self.properties)[0]
            names = self.properties or [name for name in USUAL if name in calculator.implemented_properties]
            structure = atoms.copy()
            asked = [name for name in names if self.properties or name != "stress" or has_volume(structure)]
            found = {name: calculator.get_property(name, structure) for name in asked}
        except Exception as error:  # whatever a calculator may raise
            return Failure(first_line(error).removeprefix("structure 0: "))
        return {name: np.array(value) if np.ndim(value) else float(value) for name, value in found.items()}


USUAL = ("energy", "forces", "stress")
"""What is asked of other calculators, as far as they have it."""
