"""Many items in chunks on any :class:`concurrent.futures.Executor`: processes of this machine, Dask, Slurm.

Chunks go to workers as they become free. Where there is a store, a worker writes the results of a chunk as soon as it has
them, so that whatever is killed, a worker or the process that submits, what was finished is found and not repeated.
"""

import hashlib
import os
import pickle
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_all_start_methods, get_context, parent_process
from multiprocessing.connection import wait
from multiprocessing.context import BaseContext
from typing import Any, Generic, Literal, ParamSpec, Protocol, TypeVar, cast

from ase_gffmerge.errors import ArgumentError, EvaluationFailed
from ase_gffmerge.runtime.progress import Progress, no_progress

Item = TypeVar("Item")
Result = TypeVar("Result")
Made = TypeVar("Made")
Answer = TypeVar("Answer")
P = ParamSpec("P")
Record = Mapping[str, object]

CHUNK = 100
"""Items per task, unless a caller says otherwise: a task costs some milliseconds beside its items."""

MOST_DEATHS = 3
"""So often in a row a worker may die without anything having been finished in between."""


class Store(Protocol):
    """Where finished results are kept (:class:`~ase_gffmerge.storage.results.ResultStore`)."""

    def find(self, keys: Sequence[str]) -> Mapping[str, Record]:
        """Finished results of these keys, as far as there are any."""
        ...

    def keep(self, records: Mapping[str, Record]) -> object:
        """Write results by key."""
        ...


@dataclass(frozen=True)
class Failure:
    """Why there is no result of an item: it is not kept, and tried again by the next run."""

    message: str


def run_chunks(
    function: Callable[[Sequence[Item]], Sequence[Result]],
    items: Sequence[Item],
    *,
    keys: Sequence[str],
    executor: Executor | None = None,
    chunk: int = CHUNK,
    store: Store | None = None,
    progress: Progress = no_progress,
    what: str = "structures",
) -> list[Result]:
    """Results of every item, in order; items of one key are computed once, and a :class:`Failure` is not kept.

    Parameters
    ----------
    function
        Gives one result for each of a few items; it is pickled, and so are items and results.
    items
        What is worked on.
    keys
        One per item: what decides its result.
    executor
        Where chunks are computed, at once as far as it has workers; default: here, one after the other.
    chunk
        Items per task.
    store
        Finished results are taken from here, and kept here by the workers, who must see its folder.
    progress
        Called with a fraction (0 to 1) and a description.
    what
        The items are, for messages.

    Raises
    ------
    ArgumentError
        For a chunk of no items.
    EvaluationFailed
        When workers die again and again, or an executor that cannot replace them has lost one.
    """
    if chunk < 1:
        raise ArgumentError(f"chunk={chunk}: a task needs at least one of the {what}; give a positive number")
    found = cast("dict[str, Result]", dict(store.find(keys))) if store else {}
    first = {key: k for k, key in reversed(list(enumerate(keys)))}
    missing = sorted(k for key, k in first.items() if key not in found)
    parts = [missing[i : i + chunk] for i in range(0, len(missing), chunk)]
    done = len(first) - len(missing)
    progress(done / max(len(first), 1), f"{done} of {len(first)} {what}")

    def accept(part: list[int], results: Sequence[Result]) -> None:
        found.update((keys[k], result) for k, result in zip(part, results, strict=True))
        progress(len(found) / len(first), f"{len(found)} of {len(first)} {what}")

    def task(part: list[int]) -> "Task[Item, Result]":
        return Task(function, [items[k] for k in part], [keys[k] for k in part], store)

    if executor is None:
        for part in parts:
            accept(part, task(part)())
    else:
        _run_on(executor, parts, task, accept, what)
    return [found[key] for key in keys]


def _run_on(
    executor: Executor,
    parts: list[list[int]],
    task: Callable[[list[int]], "Task[Item, Result]"],
    accept: Callable[[list[int], Sequence[Result]], None],
    what: str,
) -> None:
    """Submit all parts, and those that were lost with a worker again, in the opposite order: none bars the others."""
    deaths = 0
    while parts:
        lost: list[list[int]] = []
        futures: dict[Future[Sequence[Result]], list[int]] = {}
        try:
            for part in parts:
                futures[executor.submit(task(part))] = part
            for future in as_completed(futures):
                try:
                    accept(futures[future], future.result())
                    deaths = 0
                except BrokenExecutor:
                    lost.append(futures[future])
                except Exception as error:
                    if type(error).__name__ != "KilledWorker":  # Dask's, which has tried several workers
                        raise
                    raise _deadly(futures[future], what) from error
        except BrokenExecutor as error:
            raise EvaluationFailed(
                f"a worker died, and {type(executor).__name__} does not replace it; give a new executor, and the same store "
                "if there was one, in which what was finished is found"
            ) from error
        finally:
            for future in futures:
                future.cancel()
        deaths += 1
        if lost and deaths == MOST_DEATHS:
            raise _deadly(min(lost), what)
        parts = sorted(lost, reverse=parts == sorted(parts))


def _deadly(part: Sequence[int], what: str) -> EvaluationFailed:
    return EvaluationFailed(
        f"workers died again and again over tasks that remain, among them {what} {part[0]} to {part[-1]}: memory is the "
        "usual cause; in a script, the call belongs below if __name__ == '__main__'"
    )


@dataclass(frozen=True)
class Task(Generic[Item, Result]):
    """A chunk on its way to a worker, who keeps its results."""

    function: Callable[[Sequence[Item]], Sequence[Result]]
    items: Sequence[Item]
    keys: Sequence[str]
    store: Store | None

    def __call__(self) -> Sequence[Result]:
        """Compute, and keep what is no failure."""
        results = self.function(self.items)
        if self.store is not None:
            pairs = zip(self.keys, results, strict=True)
            self.store.keep({key: cast("Record", one) for key, one in pairs if not isinstance(one, Failure)})
        return results


_made = threading.local()


class OncePerWorker(Generic[Made]):
    """What a worker makes at its first task and keeps: a calculator, for example.

    Each thread of a worker has its own, since not everything may be used by several.

    Parameters
    ----------
    make
        Makes it; pickled, so that it counts as the same in every task.
    """

    def __init__(self, make: Callable[[], Made]):
        self._pickled = pickle.dumps(make)
        self._name = hashlib.sha256(self._pickled).hexdigest()

    @classmethod
    def of(cls, made: Made) -> "OncePerWorker[Made]":
        """Of something that is there already and travels with every task."""
        return cls(partial(_same, made))

    def __call__(self) -> Made:
        """The object of this worker."""
        kept: dict[str, Made] = vars(_made).setdefault("kept", {})
        if self._name not in kept:
            kept.clear()
            kept[self._name] = pickle.loads(self._pickled)()
        return kept[self._name]


def _same(made: Made) -> Made:
    return made


class LocalProcesses(Executor):
    """Processes of this machine, one thread each, that are replaced when one of them is killed.

    They end with the process that submits to them, however that ends.

    Parameters
    ----------
    workers
        How many; default: one for each core that this process may use.
    """

    def __init__(self, workers: int | None = None):
        self.workers = workers or n_cores()
        if self.workers < 1:
            raise ArgumentError(f"{workers} workers: nothing would be computed; give at least 1")
        self._pool = self._new()

    def _new(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(self.workers, mp_context=_context(), initializer=_begin_worker)

    def submit(self, fn: Callable[P, Answer], /, *args: P.args, **kwargs: P.kwargs) -> Future[Answer]:
        """Submit a task, to new processes if the old ones are broken.

        Parameters
        ----------
        fn, *args, **kwargs
            What is called with what.
        """
        try:
            return self._pool.submit(fn, *args, **kwargs)
        except BrokenExecutor:
            self._pool = self._new()
            return self._pool.submit(fn, *args, **kwargs)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End the processes."""
        self._pool.shutdown(wait, cancel_futures=cancel_futures)


def n_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _context() -> BaseContext:
    """Processes forked from a server that has imported torch once but never computed."""
    if "forkserver" not in get_all_start_methods():
        return get_context("spawn")
    context = get_context("forkserver")
    context.set_forkserver_preload(["ase_gffmerge.engines.ase.calculator"])
    return context


_worker = ExitStack()
"""What a worker enters at its start, and leaves with its end: nobody else holds it."""


def _begin_worker() -> None:
    import torch

    from ase_gffmerge.runtime.memory import freed_memory_kept

    torch.set_num_threads(1)
    _worker.enter_context(freed_memory_kept())
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Wait for the end of the process that submits, which nothing else tells a worker that waits for tasks."""
    parent = parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


Kind = Literal["local", "dask", "slurm"]

TRIM_THRESHOLD = 2**30
"""For glibc's malloc, bytes: Dask's own choice of 64 KiB makes it return memory that the network needs again at once."""


@contextmanager
def open_executor(kind: Kind, workers: int) -> Iterator[Executor]:
    """Executor of a kind, for as long as the context lasts.

    Parameters
    ----------
    kind
        ``local``: processes of this machine. ``dask``: the cluster that ``DASK_SCHEDULER_ADDRESS`` names, else processes of
        this machine under Dask. ``slurm``: one Slurm job per worker, by dask-jobqueue and its configuration file.
    workers
        How many.

    Raises
    ------
    ArgumentError
        When a package or a scheduler is missing.
    """
    if kind == "local":
        with LocalProcesses(workers) as pool:
            yield pool
        return
    if kind == "slurm" and shutil.which("sbatch") is None:
        raise ArgumentError(
            "this machine submits no Slurm jobs: it has no command sbatch; choose another executor"
        )
    try:
        import dask
        import distributed

        if kind == "slurm":
            from dask_jobqueue.slurm import SLURMCluster
    except ImportError as error:
        raise ArgumentError(
            f"the executor {kind!r} needs the package {error.name}; install it: pip install 'ase-gffmerge[cluster]'"
        ) from None
    with dask.config.set({"distributed.nanny.pre-spawn-environ.MALLOC_TRIM_THRESHOLD_": TRIM_THRESHOLD}):
        cluster: Any = None
        if kind == "slurm":
            cluster = SLURMCluster(
                cores=dask.config.get("jobqueue.slurm.cores") or 1,
                memory=dask.config.get("jobqueue.slurm.memory") or "4GB",
                processes=dask.config.get("jobqueue.slurm.processes") or 1,
                job_script_prologue=[f"export MALLOC_TRIM_THRESHOLD_={TRIM_THRESHOLD}"],
            )
        elif not dask.config.get("scheduler-address", None):
            cluster = distributed.LocalCluster(
                n_workers=workers, threads_per_worker=1, dashboard_address=":0"
            )
        jobs = _kept_at(cluster, workers) if kind == "slurm" else nullcontext()
        with cluster or nullcontext(), distributed.Client(cluster) as client, jobs:
            yield client.get_executor()


SECONDS_BETWEEN_LOOKS = 5.0
"""After Dask has noticed that a job has ended (its ``distributed.deploy.lost-worker-timeout``), it takes so long at most."""


@contextmanager
def _kept_at(cluster: Any, jobs: int) -> Iterator[None]:
    """Submit so many jobs, and again those that were killed or came to the end of their time."""
    done = threading.Event()

    def look() -> None:
        while not done.wait(SECONDS_BETWEEN_LOOKS):
            cluster.scale(jobs=jobs)

    cluster.scale(jobs=jobs)
    threading.Thread(target=look, daemon=True).start()
    try:
        yield
    finally:
        done.set()
