"""Many structures by jobs of a real Slurm, which are cancelled, and by a command that is killed."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from pathlib import Path

import pytest

from ase_gffmerge.storage.tensor_file import read_metadata
from helpers.counting import seen
from helpers.slurm import jobs, one_node, output

DRIVER = """
    import sys
    from pathlib import Path
    from ase_gffmerge import evaluate_many
    from ase_gffmerge.runtime.executors import open_executor
    from helpers.counting import maker, molecules, tell

    if __name__ == "__main__":
        folder = Path(sys.argv[1])
        with open_executor("slurm", 2) as workers:
            make = maker(folder, pause=0.01)
            found = evaluate_many(molecules(2000), make, executor=workers, chunk=50, store=folder / "store")
        assert len(found) == 2000
        tell(folder / "ended", "well")
"""
TESTS = Path(__file__).parents[2]


def waited(condition, driver: subprocess.Popen | None = None, seconds: float = 120):
    """What a condition gives as soon as it is true."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert driver is None or driver.poll() is None, "the command ended too soon"
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.02)
    return found


@pytest.mark.slow
@pytest.mark.nightly
def test_cancelled_jobs_and_a_killed_command(tmp_path):
    pytest.importorskip("dask_jobqueue")
    script, store = tmp_path / "driver.py", tmp_path / "store"
    script.write_text(textwrap.dedent(DRIVER))

    def finished() -> int:
        return 50 * len(list(store.glob("*.safetensors")))

    with one_node(tmp_path / "slurm") as slurm:
        environment = slurm | {
            "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)]),
            "OMP_NUM_THREADS": "1",
            "DASK_DISTRIBUTED__DEPLOY__LOST_WORKER_TIMEOUT": "1s",
            "DASK_JOBQUEUE__SLURM__DEATH_TIMEOUT": "10",
        }

        def start() -> subprocess.Popen:
            command = [sys.executable, str(script), str(tmp_path)]
            return subprocess.Popen(command, env=environment, cwd=tmp_path)

        driver = start()
        waited(lambda: finished() >= 200, driver)
        first = jobs(slurm)
        assert len(first) == 2
        output(["scancel", *first], slurm)
        waited(lambda: len(jobs(slurm) - first) == 2, driver)
        cancelled_at = finished()
        assert cancelled_at < 1500, "in the middle"
        waited(lambda: finished() >= cancelled_at + 100, driver)
        driver.send_signal(signal.SIGKILL)
        driver.wait()
        waited(lambda: not jobs(slurm))
        kept, before = finished(), len(seen(tmp_path))
        assert kept < 2000
        assert start().wait(300) == 0
    assert (tmp_path / "ended").exists()
    assert len(seen(tmp_path)) - before == 2000 - kept, "what was kept is not evaluated again"
    assert sorted(set(seen(tmp_path))) == list(range(2000))
    assert before - kept < 3 * 2 * 50, (
        "chunks that were under way: two jobs, then one, were cancelled, then all ended"
    )
    keys = Counter(key for path in store.glob("*.safetensors") for key in read_metadata(path)["keys"])
    assert len(keys) == 2000
    assert set(keys.values()) == {1}, "none twice"
