"""What the processes of these tests do; none of them ends well."""

import os
import resource
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from ase_gffmerge import GFFMergeCalculator
from ase_gffmerge.forcefield.force_field import ForceField
from ase_gffmerge.merging.recipe import Recipe
from ase_gffmerge.storage import tensor_file as atomic
from ase_gffmerge.workflows.cache import MergeCache

torch.set_num_threads(1)

UNLIMITED = resource.RLIM_INFINITY
WATCHED = ("open", "os.rename", "os.remove", "os.mkdir", "os.truncate", "os.chmod", "fcntl.flock")
"""Python's audit events of what changes files and locks; they are raised before the deed."""


class Moments:
    """Counts moments at which a process could die, and dies at one of them.

    Parameters
    ----------
    folder
        Only files below it count.
    fatal
        Index of the moment to die at; ``None`` writes the number of moments to ``folder/moments`` in the end.
    """

    def __init__(self, folder: Path, fatal: int | None):
        self.folder, self.fatal, self.count = folder, fatal, 0
        sys.addaudithook(self._audit)
        fsync, write_bytes = os.fsync, atomic._write_bytes

        def dying_fsync(descriptor: int) -> None:
            self("before the data are on disk")
            fsync(descriptor)

        def halved(path: Path, data: bytes) -> None:
            write_bytes(path, data[: len(data) // 2])
            self("half written")
            write_bytes(path, data)

        os.fsync, atomic._write_bytes = dying_fsync, halved

    def __call__(self, what: str) -> None:
        if self.count == self.fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        self.count += 1

    def _audit(self, event: str, arguments: tuple) -> None:
        if event == "fcntl.flock" or (event in WATCHED and str(self.folder) in str(arguments[0])):
            self(event)

    def report(self) -> None:
        """Say how many there were."""
        count, self.fatal = self.count, None
        (self.folder / "moments").write_text(str(count))


def merge_into_cache(files: list[Path], recipe: Recipe, folder: Path, fatal: int | None) -> None:
    """Build the calculator of some specialists, and die at a moment of it."""
    warnings.simplefilter("ignore")
    moments = Moments(folder, fatal)
    GFFMergeCalculator(files, recipe=recipe, cache_dir=folder, progress=lambda done, what: moments(what))
    moments.report()


def save_again(source: Path, path: Path, fatal: int | None) -> None:
    """Write a specialist to ``path``, and die at a moment of it."""
    specialist = ForceField.load(source)
    moments = Moments(path.parent, fatal)
    specialist.save(path)
    moments.report()


def train_to(frames: Path, out: Path, options: dict, fatal: int | None) -> None:
    """Train a specialist, and die at a moment of it."""
    from ase_gffmerge.training.config import TrainConfig
    from ase_gffmerge.training.train import train

    moments = Moments(out.parent, fatal)
    train([frames], out, TrainConfig(**options), n_calibration=2, device="cpu")
    moments.report()


def dynamics(model: Path, trajectory: Path, fatal: int) -> None:
    """Run molecular dynamics, and die after a sample."""
    from ase.build import molecule

    from ase_gffmerge.dynamics.ase_md import run_md
    from ase_gffmerge.dynamics.integrators import Conditions

    atoms = molecule("H2O")
    atoms.calc = GFFMergeCalculator(model)

    def watch(sample) -> None:
        if sample.step == fatal:
            os.kill(os.getpid(), signal.SIGKILL)

    run_md(
        atoms,
        Conditions(ensemble="nve", temperature=50, timestep=0.1),
        steps=fatal + 5,
        interval=1,
        trajectory=trajectory,
        on_sample=watch,
    )


def build_at_once(files: list[Path], recipe: Recipe, folder: Path, start, answers) -> None:
    """Wait for the others, build the calculator, and answer whether this process merged, and with what result."""
    from ase.build import molecule

    warnings.simplefilter("ignore")
    merged: list[float] = []
    start.wait()
    calc = GFFMergeCalculator(
        files, recipe=recipe, cache_dir=folder, progress=lambda done, what: merged.append(done)
    )
    atoms = molecule("CH3OH")
    atoms.calc = calc
    forces = atoms.get_forces().tobytes()
    answers.put((bool(merged), calc.cache_hit, calc.force_field.fingerprint, forces))


def limited(size: int, answers, work: Callable, *arguments) -> None:
    """Do ``work`` where no file may grow beyond ``size`` bytes, and answer with its warnings and how it ended."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, UNLIMITED))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            outcome, error = work(*arguments), None
        except Exception as failure:
            outcome, error = None, failure
    errors = [cls.__name__ for cls in type(error).__mro__] if error else []
    answers.put((outcome, errors, str(error or ""), [(w.category.__name__, str(w.message)) for w in caught]))


def as_nobody(answers, work: Callable, *arguments) -> None:
    """Do ``work`` as a user without rights, with unlimited files."""
    if os.geteuid() == 0:
        os.setgid(65534)
        os.setuid(65534)
    limited(UNLIMITED, answers, work, *arguments)


def energy_of(files: list[Path], recipe: Recipe, folder: Path) -> tuple[float, bool | None]:
    """Energy of a molecule with the merge of ``files``, and whether it came from the cache."""
    from ase.build import molecule

    calc = GFFMergeCalculator(files, recipe=recipe, cache_dir=folder)
    atoms = molecule("CH3OH")
    atoms.calc = calc
    return atoms.get_potential_energy(), calc.cache_hit


def entries_of(folder: Path) -> int:
    """Number of entries of a cache."""
    return len(MergeCache(folder).entries())


def hold_lock(files: list[Path], recipe: Recipe, folder: Path, holding) -> None:
    """Begin a merge and never end it."""

    def forever(done: float, what: str) -> None:
        holding.set()
        signal.pause()

    GFFMergeCalculator(files, recipe=recipe, cache_dir=folder, progress=forever)


class ForcesWith:
    """Forces of molecules with a calculator; it can be sent to other processes."""

    def __init__(self, calc: GFFMergeCalculator):
        self.calc = calc

    def __call__(self, system: str):
        from ase.build import molecule

        atoms = molecule(system)
        atoms.calc = self.calc
        return atoms.get_forces()


def fork_and_compare(calc: GFFMergeCalculator, systems: tuple[str, ...], threads: int, answers) -> None:
    """Forces computed here and in forked processes, after torch has used a pool of threads."""
    from multiprocessing import get_context

    torch.set_num_threads(threads)
    rows = torch.ones(100_000, 8, requires_grad=True)
    torch.nn.functional.silu(rows).sum().backward()  # large enough for all threads
    forces = ForcesWith(calc)
    serial = [forces(system) for system in systems]
    pool = get_context("fork").Pool(2, initializer=large_enough_to_hang, initargs=(calc,))
    with pool:
        forked = pool.map_async(forces, systems).get(timeout=40)
    answers.put((serial, forked))


def large_enough_to_hang(calc: GFFMergeCalculator) -> None:
    """Evaluate a structure that torch would share among threads."""
    from ase.build import bulk

    crystal = bulk("C", "diamond", a=3.0, cubic=True) * (4, 4, 4)
    crystal.calc = calc.spawn()
    crystal.get_forces()


def fork_while_a_thread_evaluates(calc: GFFMergeCalculator, answers) -> None:
    """Fork in the middle of an evaluation, which goes on when the child has ended."""
    from ase.build import molecule

    evaluating, done = threading.Event(), threading.Event()
    busy, serve = molecule("CH3OH"), calc._predictor

    def slow(graph, **options):
        evaluating.set()
        done.wait(60)
        return serve(graph, **options)

    calc._predictor, busy.calc = slow, calc
    thread = threading.Thread(target=busy.get_forces)
    thread.start()
    evaluating.wait(60)
    if os.fork() == 0:
        signal.alarm(20)  # ends a child that waits for a thread it does not have
        calc._predictor = serve
        answers.put(ForcesWith(calc)("CH3CHO"))
        os._exit(0)
    _, status = os.wait()
    done.set()
    thread.join()
    sys.exit(status != 0)
