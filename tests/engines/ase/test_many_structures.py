"""Many structures by many workers: the same results, once each, whoever is killed."""

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from ase.build import molecule
from ase.calculators.emt import EMT

from ase_gffmerge import GFFMergeCalculator, evaluate_many
from ase_gffmerge.errors import ArgumentError, EvaluationFailed
from ase_gffmerge.runtime.executors import LocalProcesses, open_executor
from ase_gffmerge.runtime.memory import _glibc
from helpers.counting import KILLED, MADE, SEEN, Counting, maker, molecules, seen
from helpers.toys import toy

STRUCTURES = [molecule(name) for name in ("CH3CH2OH", "H2O", "CH4", "CO2", "CH3OH", "H2O")]


def same(results, expected) -> bool:
    return all(
        one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)
        for one, other in zip(results, expected, strict=True)
    )


def expected_of(folder: Path, structures):
    calculator = Counting(folder)
    names = ("energy", "forces")
    return [{name: calculator.get_property(name, atoms) for name in names} for atoms in structures]


@pytest.fixture
def tests_for_workers(monkeypatch):
    """Processes that import nothing of this one find what the tests share."""
    tests = Path(__file__).parents[2]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tests), str(tests.parent)]))


# -- without processes --


@pytest.fixture
def threads():
    with ThreadPoolExecutor(2) as pool:
        yield pool


@pytest.mark.parametrize("given", ["calculator", "force field", "file"])
def test_results_are_those_of_the_calculator(threads, tmp_path, given):
    field = toy()
    calculator = GFFMergeCalculator(field, dtype="float64")
    source = {
        "calculator": calculator,
        "force field": field,
        "file": field.save(tmp_path / "toy.safetensors"),
    }
    found = evaluate_many(STRUCTURES, source[given], executor=threads, chunk=2)
    for one, other in zip(found, calculator.evaluate(STRUCTURES), strict=True):
        assert one.keys() == other.keys()
        np.testing.assert_allclose(
            one["forces"], other["forces"], atol=1e-12 if given == "calculator" else 1e-4
        )


def test_any_calculator_of_ase(threads):
    found = evaluate_many(STRUCTURES, EMT, ["energy", "forces"], executor=threads)
    for atoms, one in zip(STRUCTURES, found, strict=True):
        atoms = atoms.copy()
        atoms.calc = EMT()
        assert one["energy"] == atoms.get_potential_energy()
        np.testing.assert_array_equal(one["forces"], atoms.get_forces())


def test_equal_structures_are_evaluated_once_and_found_again(threads, tmp_path):
    structures = molecules(5)
    structures = [*structures, structures[2].copy()]
    store, fresh = tmp_path / "store", tmp_path / "fresh"
    fresh.mkdir()
    first = evaluate_many(structures[:3], maker(tmp_path), executor=threads, chunk=2, store=store)
    assert seen(tmp_path) == [0, 1, 2]
    told = []
    found = evaluate_many(
        structures,
        maker(tmp_path),
        executor=threads,
        chunk=3,
        store=store,
        progress=lambda fraction, text: told.append((fraction, text)),
    )
    assert seen(tmp_path) == [0, 1, 2, 3, 4], "none twice, though chunks are others"
    assert told[0] == (3 / 5, "3 of 5 structures")
    assert told[-1] == (1.0, "5 of 5 structures")
    assert same(found, expected_of(fresh, structures))
    assert same(first, found[:3])


def test_other_calculators_and_properties_do_not_share_results(threads, tmp_path):
    store, field = tmp_path / "store", toy()
    single, double = (GFFMergeCalculator(field, dtype=name) for name in ("float32", "float64"))
    for calculator, other in ((single, None), (double, None), (double, ["energy"]), (toy(seed=1), None)):
        files = set(store.glob("*"))
        evaluate_many(STRUCTURES[:2], calculator, other, executor=threads, store=store)
        assert set(store.glob("*")) > files
    evaluate_many(STRUCTURES[:2], single.spawn(), executor=threads, store=store)
    assert len(list(store.glob("*"))) == 4


def test_failures_stop_nothing_else(threads, tmp_path):
    structures = molecules(5)
    structures[3].info["refused"] = True
    store = tmp_path / "store"
    with pytest.raises(EvaluationFailed, match="1 of 5 structures failed, first structure 3: refused"):
        evaluate_many(structures, maker(tmp_path), executor=threads, store=store)
    found = evaluate_many(structures, maker(tmp_path), executor=threads, store=store, failures="skip")
    assert seen(tmp_path) == [0, 1, 2, 4]
    assert found[3] == {"error": "refused"}
    unknown = molecule("SiH4")
    found = evaluate_many([*STRUCTURES, unknown], toy(), executor=threads, failures="skip")
    assert "Si" in found[-1]["error"]
    assert all("forces" in one for one in found[:-1])


@pytest.mark.parametrize(
    ("arguments", "options", "match"),
    [
        ((STRUCTURES[0], EMT), {}, "put it into a list"),
        ((STRUCTURES, EMT), {"chunk": 0}, "a task needs at least one"),
        ((STRUCTURES, EMT), {"failures": "ignore"}, "use 'raise' or 'skip'"),
        ((STRUCTURES, dict), {}, "is no calculator"),
    ],
)
def test_arguments(threads, arguments, options, match):
    with pytest.raises(ArgumentError, match=match):
        evaluate_many(*arguments, executor=threads, **options)


def test_no_structures(threads):
    assert evaluate_many([], EMT, executor=threads) == []


def test_long_arrays_count_with_all_of_their_numbers():
    from ase_gffmerge.engines.ase.many_structures import identity_of, structure_key

    atoms, other = molecule("H2O"), molecule("H2O")
    atoms.info["specialist"], other.info["specialist"] = np.zeros(3000, dtype=int), np.zeros(3000, dtype=int)
    assert structure_key("same", atoms) == structure_key("same", other)
    other.info["specialist"][1500] = 1
    assert structure_key("same", atoms) != structure_key("same", other)
    calculators = [EMT(), EMT()]
    for calc, last in zip(calculators, (0.0, 1.0), strict=True):
        calc.parameters["table"] = np.append(np.zeros(3000), [last, *np.zeros(3000)])
    assert identity_of(calculators[0], None) != identity_of(calculators[1], None)


def test_files_of_other_packages_are_found_from_any_folder(tmp_path, monkeypatch):
    from ase_gffmerge.engines.ase.many_structures import _once_per_worker
    from ase_gffmerge.integrations import adapter_for

    adapter_for("mattersim").write(toy("mattersim").potential, tmp_path / "m.pth")
    monkeypatch.chdir(tmp_path)
    made, _ = _once_per_worker("mattersim:m.pth")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert made().get_property("energy", molecule("H2O")) < 1e3


# -- with processes that are killed --


@pytest.mark.slow
def test_a_killed_worker_is_replaced_and_nothing_finished_repeated(tmp_path):
    structures = molecules(60)
    with LocalProcesses(2) as workers:
        found = evaluate_many(
            structures, maker(tmp_path, fatal=31), executor=workers, chunk=5, store=tmp_path / "store"
        )
    assert (tmp_path / KILLED).exists()
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    assert same(found, expected_of(fresh, structures))
    again = [index for index in range(60) if seen(tmp_path).count(index) > 1]
    assert len(again) <= 2 * 5, "only chunks that were under way are computed again"
    processes = {line.split()[1] for line in (tmp_path / SEEN).read_text().splitlines()}
    made = (tmp_path / MADE).read_text().splitlines()
    assert len(made) - 1 == len(set(made) - {str(os.getpid())}), (
        "one calculator per process; one shows what it is"
    )
    assert processes <= set(made)


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.parametrize("kind", ["local", "dask"])
def test_a_structure_that_always_kills_is_named(tmp_path, tests_for_workers, kind):
    if kind == "dask":
        pytest.importorskip("distributed")
    structures = molecules(12)
    with open_executor(kind, 2) as workers, pytest.raises(EvaluationFailed, match="among them structures "):
        evaluate_many(
            structures,
            maker(tmp_path, fatal=4, always=True),
            executor=workers,
            chunk=2,
            store=tmp_path / "store",
        )
    finished = evaluate_many(
        [atoms for atoms in structures if atoms.info["index"] not in (4, 5)],
        maker(tmp_path, fatal=4, always=True),
        executor=ThreadPoolExecutor(1),
        store=tmp_path / "store",
    )
    assert len(finished) == 10


@pytest.mark.slow
@pytest.mark.skipif(_glibc() is None, reason="another C library, or told what to do by the environment")
def test_workers_keep_freed_memory_from_task_to_task():
    with LocalProcesses(1) as workers:
        found = workers.submit(eval, "__import__('sys').modules['ase_gffmerge.runtime.memory']._working")
        assert found.result() == 1


@pytest.mark.slow
def test_an_executor_that_does_not_replace_its_workers(tmp_path):
    store = tmp_path / "store"
    context = get_context("forkserver")
    with (
        ProcessPoolExecutor(1, mp_context=context) as pool,
        pytest.raises(EvaluationFailed, match="ProcessPoolExecutor does not replace it"),
    ):
        evaluate_many(molecules(9), maker(tmp_path, fatal=7), executor=pool, chunk=3, store=store)
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        evaluate_many(molecules(9), maker(tmp_path, fatal=7), executor=pool, chunk=3, store=store)
    assert seen(tmp_path) == [0, 1, 2, 3, 4, 5, 6, 6, 7, 8]


DRIVER = """
    import sys
    from pathlib import Path
    from ase_gffmerge import evaluate_many
    from ase_gffmerge.runtime.executors import open_executor
    from helpers.counting import maker, molecules, tell

    if __name__ == "__main__":
        folder = Path(sys.argv[1])
        with open_executor(sys.argv[2], 2) as workers:
            make = maker(folder, pause=float(sys.argv[3]))
            evaluate_many(molecules(2000), make, executor=workers, chunk=50, store=folder / "store")
        tell(folder / "ended", "well")
"""


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["local", "dask"])
def test_a_killed_driver_loses_nothing_that_was_finished(tmp_path, kind):
    if kind == "dask":
        pytest.importorskip("distributed")
    script = tmp_path / "driver.py"
    script.write_text(textwrap.dedent(DRIVER))
    tests = Path(__file__).parents[2]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(tests), str(tests.parent)]),
        "OMP_NUM_THREADS": "1",
    }

    def start(pause: float) -> subprocess.Popen:
        command = [sys.executable, str(script), str(tmp_path), kind, str(pause)]
        return subprocess.Popen(command, env=environment)

    driver = start(0.01)  # ten seconds, of which it is given one or two, however late the kill is
    while len(list((tmp_path / "store").glob("*.safetensors"))) < 5:
        assert driver.poll() is None, "it ended too soon"
        time.sleep(0.002)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    processes = {int(pid) for pid in (tmp_path / MADE).read_text().splitlines()}
    deadline = time.monotonic() + 60
    while any(running(pid) for pid in processes):
        assert time.monotonic() < deadline, "workers outlive the driver"
        time.sleep(0.05)
    kept = 50 * len(list((tmp_path / "store").glob("*.safetensors")))
    assert 250 <= kept < 2000
    before = len(seen(tmp_path))
    assert start(0.0).wait() == 0
    assert (tmp_path / "ended").exists()
    assert len(seen(tmp_path)) - before == 2000 - kept, "what was kept is not evaluated again"
    assert sorted(set(seen(tmp_path))) == list(range(2000))


@pytest.mark.slow
@pytest.mark.parametrize("package", ["distributed", "executorlib"])
def test_other_executors_replace_a_killed_worker(tmp_path, tests_for_workers, package):
    other = pytest.importorskip(package)
    structures = molecules(60)
    with (
        open_executor("dask", 2)
        if package == "distributed"
        else other.SingleNodeExecutor(max_workers=2, block_allocation=True)
    ) as workers:
        found = evaluate_many(
            structures, maker(tmp_path, fatal=31), executor=workers, chunk=5, store=tmp_path / "store"
        )
    assert (tmp_path / KILLED).exists()
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    assert same(found, expected_of(fresh, structures))


def test_a_missing_scheduler_is_one_line(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ArgumentError, match="no command sbatch"), open_executor("slurm", 1):
        pass
