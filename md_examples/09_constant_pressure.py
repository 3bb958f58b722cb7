"""Constant pressure: copper at 300 K and 5 GPa with the barostat of Martyna, Tobias and Klein, against EMT.

The mean pressure must be the one asked for, the energy of crystal, thermostat and barostat is conserved, and the crystal is
as large as EMT, the source of the labels, makes it under the same conditions.

    python md_examples/09_constant_pressure.py [--long] [--plot lattice.png]
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from ase import units
from ase.build import bulk
from ase.calculators.calculator import Calculator
from ase.calculators.emt import EMT
from ase.md import thermalize_momenta
from ase.md.nose_hoover_chain import IsotropicMTKNPT
from emt_crystals import merged_emt
from matplotlib.figure import Figure

from ase_gffmerge.sampling.temperature_ladder import inefficiency

TEMPERATURE = 300  # K
PRESSURE = 5 * units.GPa
TIMESTEP = 5 * units.fs  # a 25th of the shortest period of a phonon of copper
EQUILIBRATION = 50


@dataclass(frozen=True)
class Run:
    """Lattice constants (Å), pressures and conserved energies (eV/Å^3, eV/atom) of every step."""

    lattice: np.ndarray
    pressure: np.ndarray
    conserved: np.ndarray


def npt(calc: Calculator, steps: int) -> Run:
    """32 atoms of copper, free to expand in all directions alike."""
    atoms = bulk("Cu", a=3.57, cubic=True) * (2, 2, 2)
    atoms.calc = calc
    thermalize_momenta(
        atoms, 2 * TEMPERATURE, rng=np.random.default_rng(0)
    )  # half goes into potential energy
    dynamics = IsotropicMTKNPT(
        atoms,
        TIMESTEP,
        temperature_K=TEMPERATURE,
        pressure_au=PRESSURE,
        tdamp=20 * TIMESTEP,
        pdamp=40 * TIMESTEP,
    )
    dynamics.run(EQUILIBRATION)
    samples = [
        (
            (atoms.get_volume() / 8) ** (1 / 3),
            -atoms.get_stress(include_ideal_gas=True)[:3].mean(),
            dynamics.get_conserved_energy() / len(atoms),
        )
        for _ in dynamics.irun(steps)
    ]
    return Run(*np.array(samples).T)


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """Mean and its standard error; values that are correlated in time count as fewer."""
    return values.mean(), values.std() * np.sqrt(inefficiency(values[:, None]) / len(values))


def main(long: bool, plot: Path | None) -> None:
    """Run the merged force field and EMT."""
    steps = 10_000 if long else 250
    runs = {"merged": npt(merged_emt(), steps), "EMT": npt(EMT(), steps)}
    for name, run in runs.items():
        (pressure, error), (a, a_error) = mean_and_error(run.pressure), mean_and_error(run.lattice)
        drift = np.abs(run.conserved - run.conserved[0]).max()
        print(
            f"{name}: pressure {pressure / units.GPa:.2f} ± {error / units.GPa:.2f} GPa, a = {a:.4f} ± {a_error:.4f} Å, "
            f"conserved energy within {1e3 * drift:.2f} meV/atom"
        )
        assert abs(pressure - PRESSURE) < 4 * error
        assert drift < 1e-3  # as in NVE; kinetic energy alone fluctuates by kT sqrt(3 / 2 N) = 6 meV/atom
    (a, error), (a_emt, error_emt) = (mean_and_error(run.lattice) for run in runs.values())
    # Beyond the statistics, the lattice constant at 0 K is one of EMT's within 0.2 % (08_crystal.py)
    assert abs(a - a_emt) < 4 * np.hypot(error, error_emt) + 0.002 * a_emt
    if plot:
        figure = Figure(figsize=(6, 3), layout="constrained")
        axes = figure.add_subplot()
        for name, run in runs.items():
            axes.plot(np.arange(len(run.lattice)) * TIMESTEP / units.fs / 1000, run.lattice, label=name)
        axes.set(xlabel="time (ps)", ylabel="lattice constant (Å)")
        axes.legend()
        figure.savefig(plot)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--long", action="store_true", help="50 ps each instead of 1.25")
    parser.add_argument("--plot", type=Path, help="write the lattice constants over time to this file")
    main(**vars(parser.parse_args()))
