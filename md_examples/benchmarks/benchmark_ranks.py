"""What a merge costs each of the processes that share it: wall and processor seconds, and memory.

    python md_examples/benchmarks/benchmark_ranks.py --json

The bundled pair by the default recipe, distillation included; then in closed form on large periodic frames, for memory,
with the wide readout and without. One thread per process; wall seconds mean something on an idle machine only, with a core
for each.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from ase_gffmerge import load_force_field, merge
from ase_gffmerge.runtime.distributed import sharing

NAMES = ("rmd17-ethanol", "rmd17-malonaldehyde")
CASES = {"default": "gffmerge", "large": "closed-form", "large, plain readout": "fast"}
"""Recipes."""


def large_frames(specialist, n, cells):
    """Crystals of the molecule that the specialist knows."""
    found = []
    for atoms in specialist.calibration[:n]:
        crystal = atoms.copy()
        crystal.set_cell([7.0, 7.0, 7.0])
        crystal.pbc = True
        found.append(crystal * (cells, cells, cells))
    return replace(specialist, calibration=tuple(found))


def rank(case, out, n, cells):
    """Merge with the other processes, and write down what it took this one."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    specialists = [load_force_field(name) for name in NAMES]
    if case.startswith("large"):
        specialists = [large_frames(one, n, cells) for one in specialists]
    with sharing():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        wall, processor = time.perf_counter(), time.process_time()
        _, report = merge(specialists, CASES[case], device="cpu")
        found = {
            "wall_s": time.perf_counter() - wall,
            "processor_s": time.process_time() - processor,
            "before_mb": before,
            "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            "held_out": report.held_out,
        }
    (Path(out) / f"{os.environ['RANK']}.json").write_text(json.dumps(found))


def measured(case, ranks, options):
    with TemporaryDirectory() as folder:
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        task = [
            __file__,
            "--rank",
            case,
            folder,
            "--frames",
            str(options.frames),
            "--cells",
            str(options.cells),
        ]
        subprocess.run([*start, *task], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        return [json.loads(path.read_text()) for path in sorted(Path(folder).glob("*.json"))]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--cases", nargs="+", default=CASES, choices=CASES)
    parser.add_argument("--frames", type=int, default=16, help="large frames per specialist")
    parser.add_argument("--cells", type=int, default=3, help="cells of a large frame along each direction")
    parser.add_argument("--rank", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.rank:
        rank(*options.rank, options.frames, options.cells)
        return
    rows = []
    for case in options.cases:
        for n in options.ranks:
            found = measured(case, n, options)
            rows.append(
                {
                    "case": case,
                    "ranks": n,
                    "wall_s": max(one["wall_s"] for one in found),
                    "processor_s": [one["processor_s"] for one in found],
                    "peak_mb": [one["peak_mb"] for one in found],
                    "before_mb": [one["before_mb"] for one in found],
                    "held_out": found[0]["held_out"],
                }
            )
    print(json.dumps(rows, indent=1) if options.json else "\n".join(map(str, rows)))


if __name__ == "__main__":
    main()
