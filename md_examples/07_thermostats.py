"""Two thermostats, one distribution: Bussi and a Nosé-Hoover chain sample the canonical ensemble.

In it the kinetic temperature of N_f degrees of freedom has the mean T and the variance 2 T^2 / N_f, whatever the potential.
The chain also conserves an energy, that of molecule and thermostat together.

    python md_examples/07_thermostats.py [--long] [--plot histograms.png]
"""

import argparse
from pathlib import Path

import numpy as np
from ase import Atoms, units
from ase.md import Bussi, NoseHooverChainNVT, thermalize_momenta
from matplotlib.figure import Figure
from scipy.stats import chi2, gamma

from ase_gffmerge import GFFMergeCalculator
from ase_gffmerge.forcefield.force_field import bundled_test_frames
from ase_gffmerge.sampling.temperature_ladder import inefficiency

NAMES = ("rmd17-ethanol", "rmd17-malonaldehyde")
TEMPERATURE = (
    500  # K; the bundled frames come from dynamics at 500 K, so they are in equilibrium from the start
)
TIMESTEP = 0.5 * units.fs
EQUILIBRATION = 100


def bussi(atoms: Atoms) -> Bussi:
    """Stochastic velocity rescaling; a short time constant gives many independent temperatures in a short run."""
    return Bussi(atoms, TIMESTEP, temperature_K=TEMPERATURE, taut=5 * units.fs, rng=np.random.default_rng(1))


def nose_hoover(atoms: Atoms) -> NoseHooverChainNVT:
    """Deterministic chain of three thermostats."""
    return NoseHooverChainNVT(atoms, TIMESTEP, temperature_K=TEMPERATURE, tdamp=10 * units.fs)


def check(temperatures: np.ndarray, n_freedom: int) -> None:
    """Hold mean and variance to what as many independent values would give.

    Values that are correlated in time count as fewer; n times the variance over the canonical one follows chi^2_n, and
    both tests fail once in ten thousand runs by chance.
    """
    n = len(temperatures) / inefficiency(temperatures[:, None])
    variance = 2 * TEMPERATURE**2 / n_freedom
    error, spread = np.sqrt(variance / n), temperatures.var() / variance
    print(
        f"  temperature {temperatures.mean():.0f} K (expected {TEMPERATURE} ± {error:.0f}), "
        f"variance {spread:.2f} of the canonical one (± {np.sqrt(2 / n):.2f}), {n:.0f} independent values"
    )
    assert abs(temperatures.mean() - TEMPERATURE) < 4 * error
    assert chi2.ppf(5e-5, n) < n * spread < chi2.ppf(1 - 5e-5, n)


def draw(curves: dict[str, tuple[np.ndarray, int]], path: Path) -> None:
    """Histograms of the temperature over the canonical density, a gamma distribution."""
    figure = Figure(figsize=(7, 3), layout="constrained")
    for axes, (title, (values, n)) in zip(figure.subplots(1, len(curves)), curves.items(), strict=True):
        x = np.linspace(0, 2.5 * TEMPERATURE, 200)
        axes.hist(values, bins=30, density=True, color="tab:blue", alpha=0.5)
        axes.plot(x, gamma.pdf(x, n / 2, scale=2 * TEMPERATURE / n), color="black")
        axes.set(xlabel="kinetic temperature (K)", yticks=[])
        axes.set_title(title, fontsize="medium")
    figure.savefig(path)


def main(long: bool, plot: Path | None) -> None:
    """Run one molecule with each thermostat."""
    calc = GFFMergeCalculator(NAMES)
    curves = {}
    for name, thermostat in zip(NAMES, (bussi, nose_hoover), strict=True):
        atoms = bundled_test_frames(name)[0]
        atoms.calc = calc
        thermalize_momenta(atoms, TEMPERATURE, rng=np.random.default_rng(0))
        dynamics = thermostat(atoms)
        dynamics.run(EQUILIBRATION)
        temperatures, conserved = [], []
        for _ in dynamics.irun(40_000 if long else 400):
            temperatures.append(atoms.get_temperature())
            if isinstance(dynamics, NoseHooverChainNVT):
                conserved.append(dynamics.get_conserved_energy())
        title = f"{type(dynamics).__name__}, {name.removeprefix('rmd17-')}"
        print(title)
        n_freedom = atoms.get_number_of_degrees_of_freedom()
        check(np.array(temperatures), n_freedom)
        if conserved:
            error = np.abs(np.array(conserved) - conserved[0]).max() / len(atoms)
            print(f"  conserved energy within {1000 * error:.2f} meV/atom")
            assert error < 5e-3  # while kinetic energy alone fluctuates by kT sqrt(3 / 2 N) = 18 meV/atom
        curves[title] = (np.array(temperatures), n_freedom)
    if plot:
        draw(curves, plot)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--long", action="store_true", help="20 ps each instead of 0.2")
    parser.add_argument("--plot", type=Path, help="write histograms of the temperature to this file")
    main(**vars(parser.parse_args()))
