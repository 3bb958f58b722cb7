"""Does a long run stay what it was? Memory, conservation and reproducibility over many steps of molecular dynamics.

    python md_examples/benchmarks/benchmark_soak.py [--steps 100000] [--nve-steps N] [--out FOLDER] [--json]
        [--force-field NAME ...]

Four questions, each with its target:

- memory: Langevin dynamics of a molecule at 300 K for ``--steps`` of 0.5 fs, float32. The resident set of the process must
  grow by less than 1 % after the first thousand steps;
- conservation: NVE of the molecule among its periodic images, which come and go at the cutoff, with a skin around the
  neighbour lists and without, float64, ``--nve-steps`` (default: a tenth of ``--steps``). Total energies must agree to
  round-off, and so their drift;
- reproducibility: the first thousand steps of the Langevin run again, bitwise the same on a CPU;
- speed: milliseconds per step, in the first and in the last tenth.

Interrupted, the Langevin run goes on from its checkpoint in FOLDER (positions, momenta, state of the random numbers) as if
nothing had happened. 10^5 steps of ethanol take about 15 minutes on one core. The exit code is 1 when a target is missed.
"""

import argparse
import json
import os
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import psutil
from ase import Atoms, units
from ase.md import Langevin, VelocityVerlet

from ase_gffmerge import GFFMergeCalculator
from ase_gffmerge.cli.output import print_json
from ase_gffmerge.dynamics.integrators import new_momenta
from ase_gffmerge.forcefield.force_field import bundled_test_frames

TIMESTEP, TEMPERATURE, FRICTION, SEED = 0.5, 300.0, 0.01, 0  # fs, K, 1/fs
WARM_UP = 1000  # steps
ROUND_OFF = 1e-9  # eV, of total energies of about 4000 eV


@dataclass
class Soak:
    """State of the Langevin run, and what was measured on the way.

    Attributes
    ----------
    step
        Steps done.
    positions, momenta
        (n_atoms, 3).
    random
        State of the generator.
    sessions
        One per process that ran a part: rows of step, resident set (bytes) and seconds per step.
    """

    step: int
    positions: list[list[float]]
    momenta: list[list[float]]
    random: dict[str, Any]
    sessions: list[list[tuple[int, int, float]]] = field(default_factory=list)

    @classmethod
    def begin(cls, start: Atoms) -> "Soak":
        """At the start, with velocities."""
        atoms, rng = start.copy(), np.random.default_rng(SEED)
        new_momenta(atoms, TEMPERATURE, rng=rng)
        return cls(0, atoms.positions.tolist(), atoms.get_momenta().tolist(), rng.bit_generator.state)

    @classmethod
    def load(cls, path: Path, start: Atoms) -> "Soak":
        """From a checkpoint if there is one."""
        return cls(**json.loads(path.read_text())) if path.exists() else cls.begin(start)

    def save(self, path: Path) -> None:
        """Write the checkpoint; a kill leaves the one before."""
        new = path.with_suffix(".new")
        new.write_text(json.dumps(asdict(self)))
        os.replace(new, path)

    def run(
        self, start: Atoms, calc: GFFMergeCalculator, *, steps: int, every: int, path: Path | None
    ) -> None:
        """Go on to step ``steps``, with a measurement (and a checkpoint) every ``every`` steps."""
        atoms, rng = start.copy(), np.random.default_rng()
        atoms.positions, rng.bit_generator.state = self.positions, self.random
        atoms.set_momenta(self.momenta)
        atoms.calc = calc
        dynamics = Langevin(
            atoms,
            TIMESTEP * units.fs,
            temperature_K=TEMPERATURE,
            friction=FRICTION / units.fs,
            fixcm=False,
            rng=rng,
        )
        if self.step < steps:
            self.sessions.append([])
        while self.step < steps:
            n, started = min(every, steps - self.step), perf_counter()
            dynamics.run(n)
            self.step += n
            self.positions, self.momenta = atoms.positions.tolist(), atoms.get_momenta().tolist()
            self.random = rng.bit_generator.state
            speed = (perf_counter() - started) / n
            self.sessions[-1].append((self.step, psutil.Process().memory_info().rss, speed))
            if path is not None:
                self.save(path)

    def growth(self) -> float:
        """Largest relative growth of the resident set in any process, from its first measurement (a thousand steps) on."""
        return max(max(size for _, size, _ in rows) / rows[0][1] - 1 for rows in self.sessions)

    def milliseconds(self) -> tuple[float, float]:
        """Median per step in the first and in the last tenth."""
        speeds = [1000 * speed for rows in self.sessions for _, _, speed in rows]
        tenth = max(1, len(speeds) // 10)
        return float(np.median(speeds[:tenth])), float(np.median(speeds[-tenth:]))


def crowd(molecule: Atoms) -> Atoms:
    """A molecule among its periodic images, 3 Å from one to the next."""
    atoms = molecule.copy()
    atoms.set_cell(np.ptp(molecule.positions, axis=0) + 3.0)
    atoms.pbc = True
    return atoms


def total_energies(start: Atoms, calc: GFFMergeCalculator, *, steps: int) -> np.ndarray:
    """Total energy (eV) of an NVE run at every tenth step."""
    atoms = start.copy()
    new_momenta(atoms, TEMPERATURE, rng=np.random.default_rng(SEED))
    atoms.calc = calc
    dynamics = VelocityVerlet(atoms, TIMESTEP * units.fs)
    return np.array([atoms.get_total_energy() for k, _ in enumerate(dynamics.irun(steps)) if k % 10 == 0])


def drift(energies: np.ndarray, n_atoms: int) -> float:
    """Slope in µeV per atom and ps."""
    return 1e6 * float(np.polyfit(np.arange(len(energies)) * TIMESTEP / 100, energies, 1)[0]) / n_atoms


def measure(sources: list[str], *, steps: int, nve_steps: int, out: Path) -> dict[str, Any]:
    """Answer all questions."""
    start = bundled_test_frames("rmd17-ethanol")[0]
    crowded = crowd(start)
    calc = GFFMergeCalculator(sources, device="cpu")
    out.mkdir(parents=True, exist_ok=True)
    every, path = max(1, min(WARM_UP, steps // 10)), out / "soak.json"
    soak = Soak.load(path, start)
    soak.run(start, calc, steps=steps, every=every, path=path)
    first, last = soak.milliseconds()

    again = [Soak.begin(start) for _ in range(2)]
    for run in again:
        run.run(start, calc.spawn(), steps=min(steps, WARM_UP), every=every, path=None)
    with_skin, without = (
        total_energies(
            crowded, GFFMergeCalculator(sources, device="cpu", dtype="float64", skin=skin), steps=nve_steps
        )
        for skin in (1.0, 0.0)
    )
    return {
        "force_fields": sources,
        "steps": soak.step,
        "sessions": len(soak.sessions),
        "resident_mb": soak.sessions[-1][-1][1] / 1e6,
        "memory_growth": soak.growth(),
        "ms_per_step_first_tenth": first,
        "ms_per_step_last_tenth": last,
        "nve_steps": nve_steps,
        "drift_with_skin_uev_per_atom_ps": drift(with_skin, len(start)),
        "drift_without_skin_uev_per_atom_ps": drift(without, len(start)),
        "largest_energy_difference_ev": float(np.abs(with_skin - without).max()),
        "bitwise_reproducible": again[0].positions == again[1].positions
        and again[0].momenta == again[1].momenta,
    }


def missed(result: dict[str, Any]) -> list[str]:
    """Targets that were not met."""
    targets = {
        "memory": result["memory_growth"] < 0.01,
        "conservation": result["largest_energy_difference_ev"] < ROUND_OFF,
        "reproducibility": result["bitwise_reproducible"],
    }
    return [name for name, met in targets.items() if not met]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--nve-steps", type=int)
    parser.add_argument("--force-field", nargs="+", default=["rmd17-ethanol"])
    parser.add_argument("--out", type=Path, default=Path("benchmark-soak"))
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    nve_steps = arguments.steps // 10 if arguments.nve_steps is None else arguments.nve_steps
    if arguments.steps < 20 or nve_steps < 20:
        parser.error("--steps and --nve-steps must be at least 20")
    result = measure(arguments.force_field, steps=arguments.steps, nve_steps=nve_steps, out=arguments.out)
    result["missed"] = missed(result)
    if arguments.json:
        print_json(result)
    else:
        for name, value in result.items():
            print(f"{name:36s} {value:.6g}" if isinstance(value, float) else f"{name:36s} {value}")
    return 1 if result["missed"] else 0


if __name__ == "__main__":
    sys.exit(main())
