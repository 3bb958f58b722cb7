"""Hot dynamics, compressed dimers and crowded boxes of a merge with and without its core repulsion.

The bundled pair is merged (or taken from the cache) by the recipe, once; the same weights are then run with and without core
repulsion::

    python core_repulsion.py --json [--model merged.safetensors]

A replica holds when all energies are finite, its temperature stays below five times that of the thermostat and no atom
leaves: the largest distance from the center stays below twice the first. It ends with an error when an energy is not finite,
or when the criteria of ``gffmerge md`` stop it; anything else is a collapse that nobody tells. ``dynamics`` is without these
criteria, ``watched_dynamics`` with them.
"""

import argparse
import json
import time

import numpy as np
from ase import Atoms
from ase.calculators.calculator import CalculationFailed
from ase.optimize import FIRE

from ase_gffmerge import ForceField, GFFMergeCalculator
from ase_gffmerge.dynamics.batched_md import run_replicas
from ase_gffmerge.dynamics.stopping import StoppingCriteria
from ase_gffmerge.dynamics.trajectory import Trajectory
from ase_gffmerge.forcefield.force_field import bundled_test_frames

PAIR = ("rmd17-ethanol", "rmd17-malonaldehyde")
DISTANCES = (0.3, 0.5, 0.7, 0.9)
BOXES = (4, 5, 6, 7, 8)
UNWATCHED = StoppingCriteria(stretch=None, contact=None, heat=None)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a merged file; default: the bundled pair by --recipe")
    parser.add_argument("--recipe", default="gffmerge")
    parser.add_argument("--temperature", type=float, default=1000.0, help="K")
    parser.add_argument("--time", type=float, default=2.0, help="of every replica, ps")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    sources = [options.model] if options.model else list(PAIR)
    calc = GFFMergeCalculator(sources, recipe=options.recipe, device="cpu")
    fields = {"with": calc.force_field, "without": calc.force_field.without_core_repulsion()}
    result = {
        name: {
            "dynamics": dynamics(field, options, criteria=UNWATCHED),
            "watched_dynamics": dynamics(field, options, criteria=StoppingCriteria()),
            "dimers": dimers(field),
            "boxes": boxes(field),
            "ms_per_step": milliseconds(field),
        }
        for name, field in fields.items()
    }
    print(json.dumps(result, indent=None if options.json else 2))


def dynamics(
    field: ForceField, options: argparse.Namespace, *, criteria: StoppingCriteria
) -> dict[str, dict[str, int]]:
    """Langevin dynamics of both molecules from a test frame with a time step of 0.5 fs: how many replicas end how."""
    found = {}
    for name in PAIR:
        start = bundled_test_frames(name)[0]
        runs = run_replicas(
            field,
            [start] * options.seeds,
            ensemble="nvt",
            temperature=options.temperature,
            timestep=0.5,
            steps=round(2000 * options.time),
            every=20,
            friction=0.01,
            criteria=criteria,
        )
        ends = [end_of(run, options.temperature) for run in runs]
        found[name] = {end: ends.count(end) for end in ("held", "error", "collapse")}
    return found


def end_of(run: Trajectory, temperature: float) -> str:
    """What became of a replica."""
    if run.stopped:
        return "error"
    centered = run.positions - run.positions.mean(axis=1, keepdims=True)
    radii = np.linalg.norm(centered, axis=2).max(axis=1)
    held = run.temperatures.max() < 5 * temperature and radii.max() < 2 * radii[0]
    return "held" if held else "collapse"


def dimers(field: ForceField) -> dict[str, list[float]]:
    """Energies in eV of two atoms at every distance, from those of the atoms alone."""
    calc = GFFMergeCalculator([field], device="cpu")
    found = {}
    for pair in ("HH", "CH", "OH", "CC", "CO", "OO"):
        energies = []
        for distance in DISTANCES:
            energies.append(energy_of(Atoms(pair, positions=[[0, 0, 0], [distance, 0, 0]]), calc))
        found[pair] = energies
    return found


def boxes(field: ForceField) -> list[dict[str, float]]:
    """Random boxes of 24 atoms: energy per atom in eV before and after 100 steps of FIRE, and the shortest distance."""
    calc, rng, found = GFFMergeCalculator([field], device="cpu"), np.random.default_rng(0), []
    for length in BOXES:
        atoms = Atoms([6, 8, 1, 1] * 6, positions=rng.random((24, 3)) * length, cell=[length] * 3, pbc=True)
        row = {
            "length": length,
            "shortest": shortest(atoms),
            "energy_per_atom": energy_of(atoms, calc) / len(atoms),
        }
        atoms.calc = calc
        try:
            FIRE(atoms, logfile=None).run(fmax=0.5, steps=100)
            row |= {
                "relaxed_energy_per_atom": energy_of(atoms, calc) / len(atoms),
                "relaxed_shortest": shortest(atoms),
            }
        except (CalculationFailed, RuntimeError):
            row |= {"relaxed_energy_per_atom": float("nan"), "relaxed_shortest": float("nan")}
        found.append(row)
    return found


def shortest(atoms: Atoms) -> float:
    """Shortest distance in Å."""
    distances = atoms.get_all_distances(mic=True)
    return float(distances[np.triu_indices(len(atoms), 1)].min())


def energy_of(atoms: Atoms, calc: GFFMergeCalculator) -> float:
    """Energy in eV without reference energies; NaN where there is none."""
    copied, potential = atoms.copy(), calc.force_field.potential
    copied.calc = calc
    try:
        return float(
            copied.get_potential_energy()
            - potential.references[potential.species_row[copied.numbers]].sum().item()
        )
    except CalculationFailed:
        return float("nan")


def milliseconds(field: ForceField, *, repeats: int = 200) -> float:
    """Processor time of one evaluation of ethanol, the least of five series."""
    atoms = bundled_test_frames("rmd17-ethanol")[0]
    calc = GFFMergeCalculator([field], device="cpu")
    series = []
    for _ in range(5):
        began = time.process_time()
        for _ in range(repeats):
            calc.calculate(atoms)
        series.append(time.process_time() - began)
    return 1000 * min(series) / repeats


if __name__ == "__main__":
    main()
