"""A barrier: rotation of ethanol's methyl group by the nudged elastic band, merged and by the specialist alone.

The methyl group turns by 120 degrees, which only exchanges its hydrogens: start and end have one energy, the path through
the mirror plane is symmetric, and its top is the saddle, where each C-H eclipses another bond.

    python md_examples/10_methyl_rotation.py [--plot barrier.png]
"""

import argparse
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.build import molecule
from ase.mep import NEB
from ase.optimize import BFGS
from ase.utils.forcecurve import fit_images
from matplotlib.figure import Figure

from ase_gffmerge import GFFMergeCalculator

METHYL = [6, 7, 8]  # its hydrogens in ase.build.molecule("CH3CH2OH"), the trans conformer
DIHEDRAL = (2, 1, 0, 6)  # O-C-C-H


def band(calc: GFFMergeCalculator) -> list[Atoms]:
    """Relaxed path of 7 images, with a climbing one; every image has a calculator of its own with shared weights."""
    start = molecule("CH3CH2OH")
    start.calc = calc.spawn()
    with BFGS(start, logfile=None) as optimiser:
        assert optimiser.run(fmax=1e-3, steps=200)
    end = start.copy()
    end.positions[METHYL] = start.positions[np.roll(METHYL, 1)]
    images = [start, *(start.copy() for _ in range(5)), end]
    for image in images[1:]:
        image.calc = calc.spawn()
    neb = NEB(images, climb=True, method="improvedtangent")
    neb.interpolate("idpp")
    with BFGS(neb, logfile=None) as optimiser:
        assert optimiser.run(fmax=0.02, steps=200)
    return images


def main(plot: Path | None) -> None:
    """Compare the barrier of the merged force field with that of the specialist that knows ethanol."""
    both = ["rmd17-ethanol", "rmd17-malonaldehyde"]
    calculators = {"merged": GFFMergeCalculator(both), "specialist": GFFMergeCalculator(both[0])}
    barriers = {}
    figure = Figure(figsize=(5, 4), layout="constrained")
    axes = figure.add_subplot()
    for name, calc in calculators.items():
        images = band(calc)
        energies = np.array([image.get_potential_energy() for image in images])
        energies -= energies[0]
        barriers[name] = energies.max()
        top = images[int(energies.argmax())]
        asymmetry = np.abs(energies - energies[::-1]).max()
        print(
            f"{name}: {1000 * energies.max():.0f} meV forwards, {1000 * (energies.max() - energies[-1]):.0f} meV backwards, "
            f"O-C-C-H {top.get_dihedral(*DIHEDRAL):.0f}° on top, path symmetric within {1000 * asymmetry:.1f} meV"
        )
        assert abs(energies[-1]) < 1e-4  # equal atoms exchanged, up to float32
        assert asymmetry < 5e-3  # both halves converged to forces of 20 meV/Å along paths of about an Å
        assert int(energies.argmax()) == len(images) // 2
        assert abs(top.get_dihedral(*DIHEDRAL) - 120) < 3  # eclipsed
        fit = fit_images(images)
        axes.plot(fit.fit_path, 1000 * np.array(fit.fit_energies), label=name)
    axes.set(xlabel="path (Å)", ylabel="energy (meV)")
    axes.legend()
    # Energies of the merged force field are off by about 1 meV per atom at most, and differences by less
    assert abs(barriers["merged"] - barriers["specialist"]) < 0.015
    if plot:
        figure.savefig(plot)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--plot", type=Path, help="write the energy along the path to this file")
    main(**vars(parser.parse_args()))
