"""Quantum nuclei: i-PI moves the beads of a path integral, ASE's socket client serves the merged forces.

Even at room temperature, zero-point motion gives nuclei more kinetic energy than kT / 2 per degree of freedom. For harmonic
vibrations it is known at any number of beads P: kT / 2 per mode times the sum over k < P of w^2 / (w^2 + w_k^2), where
w_k = 2 P kT / hbar sin(pi k / P). Anharmonic ethanol comes close to it.

    pip install ipi
    python md_examples/11_path_integrals.py [--long]
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from ase import Atoms, units
from ase.calculators.socketio import SocketClient
from ase.optimize import BFGS
from ase.vibrations import Vibrations

from ase_gffmerge import GFFMergeCalculator
from ase_gffmerge.forcefield.force_field import bundled_test_frames
from ase_gffmerge.sampling.temperature_ladder import inefficiency

TEMPERATURE = 300  # K
KT = units.kB * TEMPERATURE
PATIENCE = 600  # s until i-PI listens
INPUT = """
<simulation verbosity="quiet">
  <output prefix="ethanol">
    <properties stride="1" filename="kinetic">[kinetic_cv{{electronvolt}}]</properties>
  </output>
  <total_steps>{steps}</total_steps>
  <prng><seed>1</seed></prng>
  <ffsocket name="gffmerge" mode="unix"><address>{address}</address><latency>1e-3</latency></ffsocket>
  <system>
    <initialize nbeads="{beads}">
      <file mode="xyz">start.xyz</file>
      <velocities mode="thermal" units="kelvin">{temperature}</velocities>
    </initialize>
    <forces><force forcefield="gffmerge"/></forces>
    <ensemble><temperature units="kelvin">{temperature}</temperature></ensemble>
    <motion mode="dynamics">
      <fixcom>False</fixcom>
      <dynamics mode="nvt">
        <timestep units="femtosecond">0.5</timestep>
        <thermostat mode="pile_l"><tau units="femtosecond">20</tau></thermostat>
      </dynamics>
    </motion>
  </system>
</simulation>
"""


def connect(address: str, server: subprocess.Popen[bytes]) -> SocketClient:
    """Client of the server as soon as that listens."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return SocketClient(unixsocket=address)
        except (FileNotFoundError, ConnectionRefusedError):
            assert server.poll() is None, "i-PI stopped before it listened"
            assert time.monotonic() < deadline, "i-PI does not listen"
            time.sleep(0.05)


def path_integral(atoms: Atoms, folder: Path, *, ipi: str, beads: int, steps: int) -> np.ndarray:
    """Quantum kinetic energy (eV) at every step, by the centroid virial estimator."""
    address = f"gffmerge-{os.getpid()}"
    values = {"steps": steps, "beads": beads, "address": address, "temperature": TEMPERATURE}
    (folder / "input.xml").write_text(INPUT.format(**values))
    lines = [f"{s} {x:.10f} {y:.10f} {z:.10f}" for s, (x, y, z) in zip(atoms.symbols, atoms.positions)]
    cell = "# CELL(abcABC): 100 100 100 90 90 90 cell{angstrom} positions{angstrom}"  # an isolated molecule
    (folder / "start.xyz").write_text("\n".join([str(len(atoms)), cell, *lines]) + "\n")
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen([ipi, "input.xml"], cwd=folder, stdout=log, stderr=subprocess.STDOUT)
        try:
            connect(address, server).run(atoms, use_stress=False)
            assert server.wait(PATIENCE) == 0, (folder / "log").read_text()
        finally:
            server.kill()
    return np.loadtxt(folder / "ethanol.kinetic")


def harmonic(atoms: Atoms, folder: Path, beads: int) -> float:
    """Kinetic energy (eV) of free motion and harmonic vibrations with that many beads."""
    vibrations = Vibrations(atoms, name=str(folder / "vibrations"))
    vibrations.run()
    w = np.sort(vibrations.get_energies().real)[6:, None] / KT
    w_k = 2 * beads * np.sin(np.pi * np.arange(beads) / beads)
    return KT / 2 * (6 + float((w**2 / (w**2 + w_k**2)).sum()))


def main(long: bool) -> None:
    """Run ethanol and compare with classical and harmonic nuclei."""
    ipi = shutil.which("i-pi") or shutil.which("i-pi", path=str(Path(sys.executable).parent))
    if ipi is None:
        print("skipped: i-PI is not installed here; pip install ipi, then run this example again")
        return
    beads, steps = (16, 10_000) if long else (4, 250)
    atoms = bundled_test_frames("rmd17-ethanol")[0]
    atoms.calc = GFFMergeCalculator(["rmd17-ethanol", "rmd17-malonaldehyde"], dtype="float64")
    with BFGS(atoms, logfile=None) as optimiser:
        assert optimiser.run(fmax=1e-3, steps=300)
    with tempfile.TemporaryDirectory() as folder:
        expected = harmonic(atoms, Path(folder), beads)
        kinetic = path_integral(atoms, Path(folder), ipi=ipi, beads=beads, steps=steps)
    settled = kinetic[len(kinetic) // 3 :]
    error = settled.std() * np.sqrt(inefficiency(settled[:, None]) / len(settled))
    classical = 1.5 * len(atoms) * KT
    print(
        f"{beads} beads, {steps} steps: quantum kinetic energy {settled.mean():.3f} ± {error:.3f} eV; "
        f"classical {classical:.3f} eV, harmonic with as many beads {expected:.3f} eV"
    )
    assert settled.mean() - 4 * error > classical
    # Stretches of C-H and O-H are anharmonic by some per cent: their frequencies, and so the energy, are lower
    assert abs(settled.mean() - expected) < 4 * error + 0.05 * expected


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--long", action="store_true", help="16 beads for 5 ps instead of 4 for an eighth of one"
    )
    main(**vars(parser.parse_args()))
