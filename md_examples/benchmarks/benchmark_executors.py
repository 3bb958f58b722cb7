"""What it costs to share many structures out among workers: processor seconds beside those of one process.

    python md_examples/benchmarks/benchmark_executors.py --json

Bundled ethanol, displaced at random, one thread per worker; with results kept on disk. Needs 2 cores; with
``--executor dask`` the package distributed.
"""

import argparse
import json
import os
import statistics
import time
from concurrent.futures import Executor
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from ase_gffmerge import GFFMergeCalculator, evaluate_many
from ase_gffmerge.forcefield.force_field import bundled_test_frames
from ase_gffmerge.runtime.executors import open_executor


def measured(folder, task):
    """Run a task, and write down which process it took how many seconds."""
    start = time.process_time()
    result = task()
    spent = time.process_time() - start
    with (Path(folder) / f"{os.getpid()}.txt").open("a") as file:
        file.write(f"{spent} {os.getppid()}\n")
    return result


class Measured(Executor):
    """Another executor's workers, whose processor seconds are written into a folder."""

    def __init__(self, executor, folder):
        self.executor, self.folder = executor, folder

    def submit(self, fn, /, *args, **kwargs):
        """Submit a task that is measured."""
        return self.executor.submit(measured, self.folder, partial(fn, *args, **kwargs))


def structures(n):
    rng = np.random.default_rng(0)
    frames = bundled_test_frames("rmd17-ethanol")
    found = []
    for k in range(n):
        atoms = frames[k % len(frames)].copy()
        atoms.positions += 0.01 * rng.standard_normal(atoms.positions.shape)
        found.append(atoms)
    return found


def server_seconds(pid):
    """Processor seconds of the process that workers were forked from: it imports the packages."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=2000)
    parser.add_argument("--chunk", type=int, default=200)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--executor", default="local", choices=["local", "dask", "slurm"])
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    items, calculator = structures(options.n), GFFMergeCalculator("rmd17-ethanol", device="cpu")
    calculator.evaluate(items[:100])
    rows = []
    with open_executor(options.executor, options.workers) as executor, TemporaryDirectory() as warm:
        evaluate_many(
            items[: 4 * options.workers], "rmd17-ethanol", executor=Measured(executor, warm), chunk=2
        )
        for _ in range(options.repeats):
            start = time.process_time()
            expected = calculator.evaluate(items)
            serial = time.process_time() - start
            with TemporaryDirectory() as folder, TemporaryDirectory() as store:
                start = time.process_time()
                found = evaluate_many(
                    items,
                    "rmd17-ethanol",
                    executor=Measured(executor, folder),
                    chunk=options.chunk,
                    store=store,
                )
                driver = time.process_time() - start
                lines = [
                    line.split()
                    for path in Path(folder).glob("*.txt")
                    for line in path.read_text().splitlines()
                ]
                workers, parent = sum(float(line[0]) for line in lines), int(lines[0][1])
                start = time.process_time()
                evaluate_many(items, "rmd17-ethanol", executor=Measured(executor, folder), store=store)
                again = time.process_time() - start
            worst = max(abs(a["forces"] - b["forces"]).max() for a, b in zip(found, expected, strict=True))
            rows.append(
                {"serial": serial, "workers": workers, "driver": driver, "again": again, "worst": worst}
            )
        start_up = server_seconds(parent) if options.executor == "local" else None
    total = [(row["workers"] + row["driver"]) / row["serial"] for row in rows]
    result = {
        "executor": options.executor,
        "structures": options.n,
        "chunk": options.chunk,
        "serial_processor_s": statistics.median(row["serial"] for row in rows),
        "workers_processor_s": statistics.median(row["workers"] for row in rows),
        "driver_processor_s": statistics.median(row["driver"] for row in rows),
        "total_over_serial": statistics.median(total),
        "finding_all_again_s": statistics.median(row["again"] for row in rows),
        "start_up_processor_s": start_up,
        "largest_force_difference": max(row["worst"] for row in rows),
    }
    print(json.dumps(result, indent=1) if options.json else "\n".join(f"{k}: {v}" for k, v in result.items()))


if __name__ == "__main__":
    main()
