"""Measure EScAIP against PaiNN and NequIP: milliseconds, memory, accuracy on rMD17 ethanol, conservation, and a merged pair.

    python md_examples/benchmarks/benchmark_escaip.py DATA_FOLDER --out FOLDER [--only PART ...] [--json]

DATA_FOLDER holds the rMD17 files ``rmd17_<molecule>_{train,test}_01.npz``. Seconds are processor time on one thread.

``cost``: energy and forces of random weights at 9, 243, 1125 and 4608 atoms (boxes of ethanol), and the largest memory of a
process that does nothing else, less that of one at 9 atoms. With ``--device cuda``, wall time and the GPU's memory.
``accuracy``: PaiNN and EScAIP trained on 950 frames of ethanol for the same epochs.
``aspirin``: the same on aspirin.
``equal-time``: PaiNN trained as long as EScAIP.
``drift``: energy drift in NVE dynamics of both after that training.
``pair``: a base on both molecules, two specialists from it and their default merge, for both architectures.

Finished parts are kept in FOLDER (delete one to measure it again); all of them take about an hour.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms, units
from ase.build import molecule
from ase.md import thermalize_momenta
from ase.md.verlet import VelocityVerlet
from benchmark_students import box
from training_plan import say, write_frames

from ase_gffmerge import ForceField, GFFMergeCalculator, merge
from ase_gffmerge.data.readers import read_frames
from ase_gffmerge.errors import MergeWarning
from ase_gffmerge.graphs import build_graph, predict
from ase_gffmerge.inference.errors import evaluate
from ase_gffmerge.models import build_potential
from ase_gffmerge.training.config import TrainConfig
from ase_gffmerge.training.train import train

ARCHITECTURES = ("painn", "escaip", "nequip")
SIDES = (0, 3, 5, 8)
"""Molecules along the edge of a box; 0 is one molecule in a vacuum."""
LARGEST = {"nequip": 5}
"""Of architectures that need many gigabytes beyond."""
EPOCHS, FRAMES, TESTS = 24, 950, 500
PAIR = ("ethanol", "malonaldehyde")


def structure(side: int) -> Atoms:
    """One molecule, or a box of them."""
    return box(side) if side else molecule("CH3CH2OH")


def one_cost(architecture: str, side: int, device: str) -> dict[str, float]:
    """Time and memory of energy and forces in this process."""
    torch.set_num_threads(1)
    atoms = structure(side)
    potential = build_potential(architecture, {"channels": 64, "n_blocks": 3, "cutoff": 5.0}, (1, 6, 8))
    served = potential.eval().requires_grad_(False).to(device).for_inference()
    graph = build_graph(atoms, 5.0, dtype=torch.float32).to(torch.device(device))
    gpu, times = device == "cuda", list[float]()
    clock = time.perf_counter if gpu else time.process_time
    while len(times) < 2 or (sum(times) < 3.0 and len(times) < 200):
        start = clock()
        predict(served, graph)
        if gpu:
            torch.cuda.synchronize()
        times.append(clock() - start)
    memory = (
        torch.cuda.max_memory_allocated()
        if gpu
        else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    )
    return {"ms": 1000 * float(np.median(times[1:])), "mb": memory / 1e6, "edges": float(graph.n_edges)}


def cost(data: Path, out: Path, device: str) -> list[dict[str, Any]]:
    """Every architecture and size in a process of its own."""
    rows: list[dict[str, Any]] = []
    for architecture in ARCHITECTURES:
        for side in (side for side in SIDES if device == "cuda" or side <= LARGEST.get(architecture, side)):
            done = subprocess.run(
                [sys.executable, __file__, "--one", architecture, str(side), "--device", device, str(data)],
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode:
                say(f"{architecture}, {side}: {done.stderr.strip().splitlines()[-1]}")
                continue
            rows.append(
                {"architecture": architecture, "atoms": len(structure(side)), **json.loads(done.stdout)}
            )
            first = next(row for row in rows if row["architecture"] == architecture)
            rows[-1]["mb_more"] = rows[-1]["mb"] - first["mb"]
            say(str(rows[-1]))
    return rows


def trained(
    data: Path, out: Path, architecture: str, epochs: int, molecule: str = "ethanol"
) -> tuple[ForceField, float]:
    """A model of a molecule and the seconds of its training; continued if it was killed."""
    path = out / f"{architecture}-{epochs}{'' if molecule == 'ethanol' else f'-{molecule}'}.safetensors"
    clock = path.with_suffix(".seconds")
    if not path.exists():
        frames = out / f"{molecule}.extxyz"
        write_frames(frames, read_frames(data / f"rmd17_{molecule}_train_01.npz")[:FRAMES])
        start = time.process_time()
        config = TrainConfig(model=architecture, epochs=epochs, validation=0)
        train([frames], path, config, device="cpu")
        clock.write_text(str(time.process_time() - start))
    return ForceField.load(path), float(clock.read_text())


def accuracy(data: Path, out: Path, device: str) -> list[dict[str, Any]]:
    """Equal epochs."""
    return [measured(data, out, architecture, EPOCHS) for architecture in ("painn", "escaip")]


def equal_time(data: Path, out: Path, device: str) -> list[dict[str, Any]]:
    """PaiNN for as many epochs as EScAIP's training takes."""
    painn, escaip = (trained(data, out, architecture, EPOCHS)[1] for architecture in ("painn", "escaip"))
    return [measured(data, out, "painn", round(EPOCHS * escaip / painn))]


def aspirin(data: Path, out: Path, device: str) -> list[dict[str, Any]]:
    """Equal epochs on a larger molecule."""
    return [measured(data, out, architecture, EPOCHS, "aspirin") for architecture in ("painn", "escaip")]


def measured(
    data: Path, out: Path, architecture: str, epochs: int, molecule: str = "ethanol"
) -> dict[str, Any]:
    """Errors of a model of a molecule on test frames."""
    made, seconds = trained(data, out, architecture, epochs, molecule)
    found = evaluate(made.potential, read_frames(data / f"rmd17_{molecule}_test_01.npz")[:TESTS])
    row = {
        "molecule": molecule,
        "architecture": architecture,
        "epochs": epochs,
        "seconds": seconds,
        "force_mae": 1000 * found.force_mae,
        "energy_mae": 1000 * found.energy_mae,
        "parameters": sum(p.numel() for p in made.potential.parameters()),
    }
    say(str(row))
    return row


def drift(data: Path, out: Path, device: str) -> list[dict[str, Any]]:
    """Slope of the total energy over 10 ps of ethanol at 300 K, in float32 as served."""
    rows = []
    for architecture in ("painn", "escaip"):
        made, _ = trained(data, out, architecture, EPOCHS)
        atoms = molecule("CH3CH2OH")
        atoms.calc = GFFMergeCalculator(made, device="cpu")
        thermalize_momenta(atoms, 600, rng=np.random.default_rng(0))
        energies: list[float] = []
        dynamics = VelocityVerlet(atoms, 0.5 * units.fs)
        dynamics.attach(lambda found=energies, a=atoms: found.append(a.get_total_energy()), interval=20)
        dynamics.run(20_000)
        picoseconds = 0.01 * np.arange(len(energies))
        slope = float(np.polyfit(picoseconds, energies, 1)[0]) / len(atoms)
        spread = float(np.std(energies)) / len(atoms)
        rows.append(
            {"architecture": architecture, "drift_uev_atom_ps": 1e6 * slope, "spread_uev_atom": 1e6 * spread}
        )
        say(str(rows[-1]))
    return rows


def pair(data: Path, out: Path, device: str) -> list[dict[str, Any]]:
    """Base on both molecules, specialists and their merge: force MAE over the specialists' own."""
    rows = []
    training = {name: read_frames(data / f"rmd17_{name}_train_01.npz")[:600] for name in PAIR}
    tests = {name: read_frames(data / f"rmd17_{name}_test_01.npz")[:TESTS] for name in PAIR}
    for architecture in ("painn", "escaip"):

        def model(
            name: str,
            frames: list[Atoms],
            config: TrainConfig,
            init: ForceField | None,
            kind: str = architecture,
        ) -> ForceField:
            path = out / f"{kind}-{name}.safetensors"
            if not path.exists():
                source = out / f"pair-{name}.extxyz"
                write_frames(source, frames)
                train([source], path, config, init=init, device="cpu")
            return ForceField.load(path)

        both = [atoms for name in PAIR for atoms in training[name][:300]]
        base = model("base", both, TrainConfig(model=architecture, epochs=15, validation=0), None)
        gentle = TrainConfig(epochs=10, learning_rate=5e-4, validation=0)
        specialists = [model(name, training[name], gentle, base) for name in PAIR]
        start = time.process_time()
        merged, report = merge(specialists, device="cpu")
        row: dict[str, Any] = {
            "architecture": architecture,
            "seconds": time.process_time() - start,
            "verdict": report.verdict,
        }
        ratios = []
        for specialist, name in zip(specialists, PAIR, strict=True):
            alone, together = (
                1000 * evaluate(f.potential, tests[name]).force_mae for f in (specialist, merged)
            )
            row |= {f"{name}_alone": alone, f"{name}_merged": together}
            ratios.append(together / alone)
        rows.append({**row, "ratio": float(np.mean(ratios))})
        say(str(rows[-1]))
    return rows


PARTS = {
    "cost": cost,
    "accuracy": accuracy,
    "equal-time": equal_time,
    "aspirin": aspirin,
    "drift": drift,
    "pair": pair,
}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a column per key of the first row."""
    keys = list(rows[0])
    shown = [[f"{v:.3g}" if isinstance(v, float) else str(v) for v in map(row.get, keys)] for row in rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (keys, ["---"] * len(keys), *shown))


def main() -> None:
    """Measure what is not in the folder yet, then print all of it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, default=Path())
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(one_cost(arguments.one[0], int(arguments.one[1]), arguments.device)))
        return
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", MergeWarning)
    arguments.out.mkdir(parents=True, exist_ok=True)
    results = {}
    for name in arguments.only:
        path = arguments.out / f"{name}-{arguments.device}.json"
        if not path.exists():
            path.write_text(
                json.dumps(PARTS[name](arguments.data, arguments.out, arguments.device), indent=1)
            )
        results[name] = json.loads(path.read_text())
    print(json.dumps(results, indent=1) if arguments.json else "\n\n".join(map(table, results.values())))


if __name__ == "__main__":
    main()
