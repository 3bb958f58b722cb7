"""Restart after a kill: dynamics that died goes on from its trajectory, and nobody can tell.

A second process runs and is killed with SIGKILL, as a queue or the lack of memory does it. Its trajectory is complete up to
some frame; the run continues from that one, in the same file. All frames are those of a run that nobody disturbed.
"""

import itertools
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from ase import Atoms, units
from ase.io import Trajectory, read
from ase.md import VelocityVerlet

from ase_gffmerge import GFFMergeCalculator
from ase_gffmerge.dynamics.integrators import new_momenta
from ase_gffmerge.forcefield.force_field import bundled_test_frames

INTERVAL = 5  # steps from frame to frame
FRAMES_BEFORE, FRAMES = 10, 20
PATIENCE = 1200  # s to wait for the second process, on a slow machine


def calculator() -> GFFMergeCalculator:
    """In float64, with its skin: where a neighbour list began leaves no trace in the results."""
    return GFFMergeCalculator(["rmd17-ethanol", "rmd17-malonaldehyde"], dtype="float64", device="cpu")


def first_frame() -> Atoms:
    """Ethanol at 300 K."""
    atoms = bundled_test_frames("rmd17-ethanol")[0]
    new_momenta(atoms, 300, rng=np.random.default_rng(0))
    return atoms


def run(atoms: Atoms, path: Path, *, frames: int | None, mode: str) -> None:
    """NVE that writes positions and momenta every few steps; ``frames=None``: until it is killed."""
    atoms.calc = calculator()
    with Trajectory(path, mode, atoms) as trajectory, VelocityVerlet(atoms, 0.5 * units.fs) as dynamics:
        for _ in range(frames) if frames else itertools.count():
            if mode == "w":
                trajectory.write()
            dynamics.run(INTERVAL)
            if mode == "a":
                trajectory.write()


def frames_in(path: Path) -> int:
    """How many complete frames the file holds, also while it is being written."""
    try:
        with Trajectory(path) as trajectory:
            return len(trajectory)
    except (OSError, ValueError):  # not there yet, or not even a header
        return 0


def kill_after(path: Path, n_frames: int) -> None:
    """Start this script once more, for a run without end, and kill it when it has written some frames."""
    process = subprocess.Popen([sys.executable, __file__, str(path)])
    try:
        deadline = time.monotonic() + PATIENCE
        while frames_in(path) < n_frames:
            assert process.poll() is None, "the second process stopped by itself"
            assert time.monotonic() < deadline, "the second process writes nothing"
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()


def main() -> None:
    """Kill, continue, and compare with an undisturbed run."""
    with tempfile.TemporaryDirectory() as folder:
        path, undisturbed = Path(folder) / "killed.traj", Path(folder) / "undisturbed.traj"
        kill_after(path, FRAMES_BEFORE)
        survived = frames_in(path)
        atoms = read(path, index=-1)
        run(atoms, path, frames=max(FRAMES - survived, 5), mode="a")
        after = read(path, ":")
        run(first_frame(), undisturbed, frames=len(after), mode="w")
        expected = read(undisturbed, ":")
    differences = [
        max(np.abs(a.positions - b.positions).max(), np.abs(a.get_momenta() - b.get_momenta()).max())
        for a, b in zip(after, expected, strict=True)
    ]
    print(
        f"killed after {survived} frames, continued to {len(after)}: positions and momenta differ from those of an "
        f"undisturbed run by {max(differences)}"
    )
    assert max(differences) == 0  # bitwise, on a CPU


if __name__ == "__main__":
    if len(sys.argv) == 2:
        run(first_frame(), Path(sys.argv[1]), frames=None, mode="w")
    main()
