"""A system that mixes the territories: ethanol and malonaldehyde together, on one shared potential.

Far apart, the energy is the sum of the molecules' energies. In contact there are forces between them, smooth and
conservative, but no specialist ever saw two molecules: such numbers are extrapolations until someone checks them.
"""

import numpy as np
from ase import Atoms
from ase.optimize import BFGS

from ase_gffmerge import GFFMergeCalculator
from ase_gffmerge.dynamics.ase_md import run_md
from ase_gffmerge.dynamics.integrators import Conditions
from ase_gffmerge.forcefield.force_field import bundled_test_frames

NAMES = ("rmd17-ethanol", "rmd17-malonaldehyde")


def side_by_side(first: Atoms, second: Atoms, gap: float) -> Atoms:
    """Both molecules along x with ``gap`` Å between the atoms closest to each other in x."""
    moved = second.copy()
    moved.translate([first.positions[:, 0].max() - second.positions[:, 0].min() + gap, 0, 0])
    return Atoms(first.numbers, first.positions) + Atoms(moved.numbers, moved.positions)


def main() -> None:
    """Compare far apart with alone, then bring the molecules together and run them."""
    calc = GFFMergeCalculator(NAMES, dtype="float64")
    molecules = []
    for name in NAMES:
        molecule = bundled_test_frames(name)[0]
        molecule.calc = calc
        with BFGS(molecule, logfile=None) as optimiser:
            optimiser.run(fmax=0.01, steps=200)
        molecules.append(molecule)
    alone = sum(molecule.get_potential_energy() for molecule in molecules)

    far = side_by_side(*molecules, gap=20.0)
    far.calc = calc
    difference = far.get_potential_energy() - alone
    print(f"20 Å apart: the energy differs from the sum by {difference:.1e} eV")
    assert abs(difference) < 1e-8

    near = side_by_side(*molecules, gap=3.0)
    near.calc = calc
    forces = near.get_forces()
    print(
        f"3 Å apart: {1000 * (near.get_potential_energy() - alone):+.0f} meV (an extrapolation), "
        f"net force {np.abs(forces.sum(axis=0)).max():.1e} eV/Å"
    )
    assert np.isfinite(forces).all()
    assert np.abs(forces.sum(axis=0)).max() < 1e-8

    run = run_md(near, Conditions(ensemble="nve", temperature=100, timestep=0.5), steps=400, interval=5)
    print(
        f"0.2 ps of NVE: energy drift {1e3 * run.drift_per_atom:+.3f} meV/atom, broken bonds {len(run.broken_bonds)}"
    )
    assert abs(run.drift_per_atom) < 1e-3
    assert not run.broken_bonds


if __name__ == "__main__":
    main()
