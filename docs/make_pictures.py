"""Make the pictures of README, gallery and how-to pages from the demo, the numbered examples and the pages' own code.

    python docs/make_pictures.py [NAME ...]

Without names all of them, which takes some minutes. They lie in ``docs/pictures`` and are kept by git.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES, PICTURES = ROOT / "md_examples", ROOT / "docs" / "pictures"
sys.path.insert(0, str(EXAMPLES))
PAIR = ("rmd17-ethanol", "rmd17-malonaldehyde")
DPI = 90


def axes_of(**labels: str) -> tuple[Figure, Axes]:
    """A small figure with one panel."""
    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.add_subplot()
    axes.set(**labels)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def demo(path: Path) -> None:
    """The demo's own bars."""
    with tempfile.TemporaryDirectory() as folder:
        short = ("--nvt-ps", "0.01", "--nve-ps", "0.01")
        command = Path(sys.executable).with_name("gffmerge")
        subprocess.run([command, "demo", "--out", folder, *short], check=True)
        path.write_bytes((Path(folder) / "errors.png").read_bytes())


def own_plot(name: str) -> Callable[[Path], None]:
    """For examples that take ``--plot``."""

    def make(path: Path) -> None:
        subprocess.run([sys.executable, str(EXAMPLES / f"{name}.py"), "--plot", str(path)], check=True)

    return make


def first_merge(path: Path) -> None:
    """Forces of the merged potential against the labels."""
    from ase_gffmerge import GFFMergeCalculator
    from ase_gffmerge.forcefield.force_field import bundled_test_frames

    calc = GFFMergeCalculator(PAIR)
    figure = Figure(figsize=(6, 3), layout="constrained")
    for axes, name in zip(figure.subplots(1, 2, sharex=True, sharey=True), PAIR):
        frames = bundled_test_frames(name)
        truth = np.concatenate([atoms.get_forces() for atoms in frames]).ravel()
        ours = np.concatenate([results["forces"] for results in calc.evaluate(frames)]).ravel()
        axes.scatter(truth, ours, s=4, linewidth=0, alpha=0.6, color="#2a8fb0")
        axes.axline((0, 0), slope=1, color="black", linewidth=0.8)
        axes.set(title=f"{name}: {1000 * np.abs(ours - truth).mean():.0f} meV/Å", xlabel="PBE force (eV/Å)")
    figure.axes[0].set_ylabel("merged force (eV/Å)")
    figure.savefig(path, dpi=DPI)


def conservation(path: Path) -> None:
    """Total energy of ethanol with two time steps."""
    from ase_gffmerge import GFFMergeCalculator
    from ase_gffmerge.dynamics.integrators import new_momenta
    from ase_gffmerge.forcefield.force_field import bundled_test_frames

    example = import_module("02_nve_energy_conservation")
    calc = GFFMergeCalculator(PAIR, dtype="float64")
    start = bundled_test_frames(PAIR[0])[0]
    new_momenta(start, example.TEMPERATURE, rng=np.random.default_rng(0))
    figure, axes = axes_of(xlabel="time (fs)", ylabel="total energy (meV)")
    for timestep in (0.5, 0.25):
        energies = example.total_energies(start, calc, timestep=timestep, steps=round(100 / timestep))
        times = timestep * np.arange(len(energies))
        axes.plot(times, 1000 * (energies - energies[0]), label=f"{timestep} fs")
    axes.legend(title="time step")
    figure.savefig(path, dpi=DPI)


def temperatures(path: Path) -> None:
    """Kinetic temperature of both molecules in NVT."""
    from ase_gffmerge import GFFMergeCalculator, run_replicas
    from ase_gffmerge.forcefield.force_field import bundled_test_frames

    potential = GFFMergeCalculator(PAIR).force_field.potential
    starts = [bundled_test_frames(name)[0] for name in PAIR]
    runs = run_replicas(potential, starts, ensemble="nvt", temperature=500, timestep=0.5, steps=1000, every=5)
    figure, axes = axes_of(xlabel="time (fs)", ylabel="temperature (K)")
    for name, run in zip(PAIR, runs):
        values = [atoms.get_temperature() for atoms in run.frames]
        axes.plot(2.5 * np.arange(len(values)), values, label=name, linewidth=1)
    axes.axhline(500, color="black", linewidth=0.8)
    axes.legend()
    figure.savefig(path, dpi=DPI)


def vibrations(path: Path) -> None:
    """Frequencies of both molecules as sticks."""
    from ase.optimize import BFGS

    from ase_gffmerge import GFFMergeCalculator
    from ase_gffmerge.forcefield.force_field import bundled_test_frames

    example = import_module("04_relax_and_vibrations")
    calc = GFFMergeCalculator(PAIR, dtype="float64")
    figure, axes = axes_of(xlabel="wave number (1/cm)", yticks=(0, 1), yticklabels=PAIR)
    for y, name in enumerate(PAIR):
        atoms = bundled_test_frames(name)[0]
        atoms.calc = calc
        with BFGS(atoms, logfile=None) as optimiser, tempfile.TemporaryDirectory() as folder:
            optimiser.run(fmax=1e-4, steps=500)
            waves = example.frequencies(atoms, Path(folder) / "vibrations")[6:]
        axes.vlines(waves, y - 0.35, y + 0.35, color=f"C{y}")
    figure.savefig(path, dpi=DPI)


def contact(path: Path) -> None:
    """Energy of both molecules over their distance."""
    from ase_gffmerge import GFFMergeCalculator
    from ase_gffmerge.forcefield.force_field import bundled_test_frames

    example = import_module("05_mixed_cluster")
    calc = GFFMergeCalculator(PAIR, dtype="float64")
    molecules = [bundled_test_frames(name)[0] for name in PAIR]
    gaps = np.linspace(1.5, 8, 40)
    structures = [example.side_by_side(*molecules, gap=gap) for gap in gaps]
    energies = np.array([results["energy"] for results in calc.evaluate(structures)])
    figure, axes = axes_of(xlabel="gap between the molecules (Å)", ylabel="energy (meV)")
    axes.plot(gaps, 1000 * (energies - energies[-1]))
    axes.set_title("an extrapolation: no specialist has seen two molecules", fontsize="medium")
    figure.savefig(path, dpi=DPI)


def printed_bars(name: str, pattern: str, labels: tuple[str, ...], unit: str) -> Callable[[Path], None]:
    """Bars of the numbers that an example prints: ``pattern`` finds a title, then one number per label, in every line."""

    def make(path: Path) -> None:
        command = [sys.executable, str(EXAMPLES / f"{name}.py")]
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found = re.findall(pattern, printed)
        figure, axes = axes_of(xlabel=unit)
        for i, label in enumerate(labels):
            y = np.arange(len(found)) + 0.35 * i
            bars = axes.barh(y, [float(line[1 + i]) for line in found], height=0.32, label=label)
            axes.bar_label(bars, padding=2, fontsize=8)
        middle = np.arange(len(found)) + 0.175 * (len(labels) - 1)
        axes.set_yticks(middle, [line[0] for line in found])
        axes.invert_yaxis()
        axes.legend()
        figure.savefig(path, dpi=DPI)

    return make


def by_page(name: str) -> Callable[[Path], None]:
    """For how-to pages whose code saves the picture that they show."""

    def make(path: Path) -> None:
        sys.path.insert(0, str(ROOT / "tests"))
        from ase_gffmerge.workflows.cache import MergeCache
        from helpers.page_blocks import Page

        with tempfile.TemporaryDirectory() as folder:
            Page(f"docs/how_to/{name}.md").run(Path(folder), MergeCache().directory)
            path.write_bytes((Path(folder) / path.name).read_bytes())

    return make


MAKERS: dict[str, Callable[[Path], None]] = {
    "force_errors": demo,
    "01_first_merge": first_merge,
    "02_nve_energy_conservation": conservation,
    "03_nvt_both_molecules": temperatures,
    "04_relax_and_vibrations": vibrations,
    "05_mixed_cluster": contact,
    "06_your_own_specialists": printed_bars(
        "06_your_own_specialists",
        r"(\w+): merged differs by (\d+) meV/Å, the mean by (\d+)",
        ("merged", "mean of the weights"),
        "difference from the specialist's forces (meV/Å)",
    ),
    **{
        name: own_plot(name)
        for name in ("07_thermostats", "08_crystal", "09_constant_pressure", "10_methyl_rotation")
    },
    **{
        name: by_page(name)
        for name in (
            "elastic_constants",
            "equation_of_state",
            "nudged_elastic_band",
            "phonons",
            "vibrations",
        )
    },
    "11_path_integrals": printed_bars(
        "11_path_integrals",
        r"(\d+ beads).*?energy ([\d.]+) ± .*?classical ([\d.]+) eV, harmonic with as many beads ([\d.]+)",
        ("quantum", "classical", "harmonic"),
        "kinetic energy of ethanol (eV)",
    ),
    "13_two_chgnets": printed_bars(
        "13_two_chgnets",
        r"(\w+): (\d+) meV/Å from its specialist's forces, the mean (\d+)",
        ("merged", "mean of the weights"),
        "difference from the specialist's forces (meV/Å)",
    ),
}


def main() -> None:
    """Make those that are named."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(MAKERS)}")
    names = parser.parse_args().names or list(MAKERS)
    PICTURES.mkdir(exist_ok=True)
    for name in names:
        MAKERS[name](PICTURES / f"{name}.png")
        print(f"{name}.png: {(PICTURES / f'{name}.png').stat().st_size // 1024} kB", flush=True)


if __name__ == "__main__":
    main()
