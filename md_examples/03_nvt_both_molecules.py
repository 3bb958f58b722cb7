"""One calculator, two molecules: NVT dynamics at 500 K of ethanol and malonaldehyde with the merged potential."""

import tempfile
from pathlib import Path

from ase.io import read

from ase_gffmerge import GFFMergeCalculator
from ase_gffmerge.dynamics.ase_md import run_md
from ase_gffmerge.dynamics.integrators import Conditions
from ase_gffmerge.forcefield.force_field import bundled_test_frames

NAMES = ("rmd17-ethanol", "rmd17-malonaldehyde")
TEMPERATURE = 500


def main() -> None:
    """Run both for a picosecond, look at temperature and bonds, read a trajectory back."""
    calc = GFFMergeCalculator(NAMES)
    with tempfile.TemporaryDirectory() as folder:
        for name in NAMES:
            atoms = bundled_test_frames(name)[0]
            atoms.calc = calc
            path = Path(folder) / f"{name}.traj"
            conditions = Conditions(ensemble="nvt", temperature=TEMPERATURE, timestep=0.5)
            run = run_md(atoms, conditions, steps=2000, trajectory=path)
            print(
                f"{name}: mean temperature {run.mean_temperature:.0f} K, {len(run.broken_bonds)} broken bonds, "
                f"{run.steps_per_second:.0f} steps per second, {len(read(path, ':'))} frames written"
            )
            assert 350 < run.mean_temperature < 650
            assert not run.broken_bonds


if __name__ == "__main__":
    main()
