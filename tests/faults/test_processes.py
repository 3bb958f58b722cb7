"""Many processes and threads: one merge, one answer."""

import threading
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context

import numpy as np
import pytest
from ase.build import molecule

from ase_gffmerge import GFFMergeCalculator
from ase_gffmerge.workflows.cache import MergeCache
from helpers import workers
from helpers.faults import RECIPE, run

SYSTEMS = ("CH3OH", "CH3CHO", "H2O", "CH3CH2OH", "H2CO", "HCOOH", "CO2", "CH4")


def test_eight_processes_merge_once_and_get_the_same_bits(processes, files, tmp_path):
    start, answers = processes.Event(), processes.Queue()
    arguments = (files, RECIPE, tmp_path / "cache", start, answers)
    crowd = [processes.Process(target=workers.build_at_once, args=arguments) for _ in range(8)]
    for process in crowd:
        process.start()
    start.set()
    outcomes = [answers.get(timeout=60) for _ in crowd]
    for process in crowd:
        process.join(30)
    assert [process.exitcode for process in crowd] == [0] * 8
    assert sorted(merged for merged, *_ in outcomes) == [False] * 7 + [True]
    assert all(hit is not merged for merged, hit, *_ in outcomes)
    assert len({tuple(result) for _, _, *result in outcomes}) == 1
    assert [check.ok for check in MergeCache(tmp_path / "cache").verify()] == [True]


def test_eight_threads_merge_once(files, tmp_path):
    merges, barrier = [], threading.Barrier(8)

    def build(_: int) -> str:
        barrier.wait()
        calc = GFFMergeCalculator(
            files,
            recipe=RECIPE,
            cache_dir=tmp_path / "cache",
            device="cpu",
            progress=lambda done, what: merges.append(threading.get_ident()),
        )
        return calc.force_field.fingerprint

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(build, range(8)))) == 1
    assert len(set(merges)) == 1


@pytest.fixture
def calc(files) -> GFFMergeCalculator:
    return GFFMergeCalculator(files[0], dtype="float64", device="cpu")


def forces_of(calc: GFFMergeCalculator, system: str) -> np.ndarray:
    atoms = molecule(system)
    atoms.calc = calc
    return atoms.get_forces()


@pytest.mark.parametrize("own", [False, True], ids=["one calculator", "spawn per thread"])
def test_threads(calc, own):
    serial = [forces_of(calc.spawn(), system) for system in SYSTEMS]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            threaded = pool.map(lambda s: forces_of(calc.spawn() if own else calc, s), SYSTEMS)
            for ours, theirs in zip(threaded, serial, strict=True):
                np.testing.assert_array_equal(ours, theirs)


def test_one_shared_structure_in_many_threads(calc):
    atoms = molecule("CH3OH")
    atoms.calc = calc
    expected = atoms.get_forces()
    calc.reset()
    with ThreadPoolExecutor(8) as pool:
        for forces in pool.map(lambda _: atoms.get_forces(), range(16)):
            np.testing.assert_array_equal(forces, expected)


def test_spawned_processes_equal_serial(calc):
    """``spawn`` starts from nothing: the calculator travels pickled."""
    with get_context("spawn").Pool(1) as pool:
        answers = pool.map(workers.ForcesWith(calc), SYSTEMS[:3])
    for answer, system in zip(answers, SYSTEMS, strict=False):
        np.testing.assert_array_equal(answer, forces_of(calc, system))


@pytest.mark.parametrize("threads", [1, 2])
def test_forked_processes_equal_serial(processes, calc, threads):
    """Also when the parent's torch has used several threads, which a forked child would wait for forever."""
    answers = processes.SimpleQueue()
    assert run(processes, workers.fork_and_compare, calc, SYSTEMS[:3], threads, answers) == 0
    serial, forked = answers.get()
    for one, other, system in zip(serial, forked, SYSTEMS, strict=False):
        np.testing.assert_array_equal(one, other)
        np.testing.assert_array_equal(one, forces_of(calc, system))


def test_a_process_forked_in_the_middle_of_an_evaluation_does_not_wait_for_it(processes, calc):
    answers = processes.SimpleQueue()
    assert run(processes, workers.fork_while_a_thread_evaluates, calc, answers) == 0
    np.testing.assert_array_equal(answers.get(), forces_of(calc, "CH3CHO"))
