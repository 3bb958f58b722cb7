"""What ASE does with a calculator: dynamics, relaxation, files, composition."""

import io
import os
from threading import Thread
from uuid import uuid4

import numpy as np
import pytest
from ase import Atoms, units
from ase.build import bulk
from ase.calculators.fd import FiniteDifferenceCalculator
from ase.calculators.loggingcalc import LoggingCalculator
from ase.calculators.mixing import SumCalculator
from ase.calculators.socketio import SocketClient, SocketIOCalculator
from ase.calculators.subprocesscalculator import Client, PackedCalculator, PythonSubProcessCalculator
from ase.constraints import FixCom
from ase.db import connect
from ase.filters import FrechetCellFilter
from ase.io import Trajectory, read, write
from ase.md import MTKNPT, Bussi, Langevin, NoseHooverChainNVT, VelocityVerlet, thermalize_momenta
from ase.mep import NEB
from ase.optimize import BFGS, FIRE, RFO

from ase_gffmerge.errors import StructureError
from ase_gffmerge.graphs.derivatives import assemble
from ase_gffmerge.inference import predict as serving
from helpers.structures import cluster, crystal


@pytest.fixture
def evaluations(monkeypatch):
    """A list that grows with every evaluation of a calculator."""
    counted = []
    monkeypatch.setattr(serving, "assemble", lambda *arguments: counted.append(1) or assemble(*arguments))
    return counted


def total_energies(atoms, dt, steps):
    dynamics = VelocityVerlet(atoms, timestep=dt * units.fs)
    energies = []
    dynamics.attach(lambda: energies.append(atoms.get_total_energy()), interval=1)
    dynamics.run(steps)
    return np.array(energies)


def test_16_nve_conserves_energy_over_200_steps(calc):
    atoms = crystal() * (2, 1, 1)
    atoms.calc = calc
    thermalize_momenta(atoms, temperature_K=300, rng=np.random.default_rng(0))
    energies = total_energies(atoms, 2.0, 200)
    assert np.abs(energies - energies[0]).max() / len(atoms) < 1e-3


def test_16_energy_error_falls_with_the_square_of_the_time_step(calc):
    errors = []
    for dt in (4.0, 2.0):
        atoms = crystal()
        atoms.calc = calc
        thermalize_momenta(atoms, temperature_K=300, rng=np.random.default_rng(0))
        errors.append(total_energies(atoms, dt, round(200 / dt)).std())
    assert 3.5 < errors[0] / errors[1] < 4.5


STEPS = 10
DRIVERS = {
    "NVE": lambda atoms: VelocityVerlet(atoms, timestep=units.fs).run(STEPS),
    "Langevin": lambda atoms: Langevin(atoms, units.fs, temperature_K=300, friction=0.02, fixcm=False).run(
        STEPS
    ),
    "Bussi": lambda atoms: Bussi(atoms, units.fs, temperature_K=300, taut=50 * units.fs).run(STEPS),
    "NoseHooverChainNVT": lambda atoms: NoseHooverChainNVT(
        atoms, timestep=units.fs, temperature_K=300, tdamp=50 * units.fs
    ).run(STEPS),
    "MTKNPT": lambda atoms: MTKNPT(
        atoms, timestep=units.fs, temperature_K=300, pressure_au=0, tdamp=50 * units.fs, pdamp=500 * units.fs
    ).run(STEPS),
    "BFGS": lambda atoms: BFGS(atoms, logfile=io.StringIO()).run(fmax=0, steps=STEPS),
    "FIRE": lambda atoms: FIRE(atoms, logfile=io.StringIO()).run(fmax=0, steps=STEPS),
    "FrechetCellFilter": lambda atoms: FIRE(FrechetCellFilter(atoms), logfile=io.StringIO()).run(
        fmax=0, steps=STEPS
    ),
}


@pytest.mark.parametrize("driver", DRIVERS)
def test_17_one_evaluation_per_step(calc, evaluations, driver, tmp_path):
    """Energy, forces and stress are asked for, one after the other, by the driver, its log and the trajectory."""
    atoms = crystal() * (2, 1, 1)
    atoms.calc = calc
    thermalize_momenta(atoms, temperature_K=300, rng=np.random.default_rng(0))
    DRIVERS[driver](atoms)
    with Trajectory(tmp_path / "a.traj", "w", atoms) as trajectory:
        trajectory.write()
    atoms.get_potential_energies(), atoms.get_stress()
    assert len(evaluations) == 1 + STEPS


def test_langevin_is_reproducible(calc):
    final = []
    for _ in range(2):
        atoms = cluster()
        atoms.calc = calc
        atoms.set_constraint(FixCom())
        thermalize_momenta(atoms, temperature_K=300, rng=np.random.default_rng(0))
        rng = np.random.default_rng(1)
        Langevin(atoms, units.fs, temperature_K=300, friction=0.02, fixcm=False, rng=rng).run(10)
        final.append(atoms.get_positions())
    assert np.array_equal(*final)


@pytest.mark.parametrize("optimizer", [BFGS, RFO])
def test_relaxations_of_positions_and_cells_go_downhill(calc, optimizer):
    for atoms, build in ((cluster(), lambda a: a), (crystal(), FrechetCellFilter)):
        atoms.calc = calc
        start = atoms.get_potential_energy()
        optimizer(build(atoms), logfile=None, maxstep=0.05).run(fmax=1e-4, steps=5)
        assert atoms.get_potential_energy() < start


def test_17_a_band_costs_three_evaluations_per_step(calc, evaluations):
    """Five images, the ends of which do not move."""
    images = [cluster() for _ in range(5)]
    images[-1].positions[1, 0] += 0.3
    for image in images:
        image.calc = calc.spawn()
    neb = NEB(images, method="improvedtangent")
    neb.interpolate()
    FIRE(neb, logfile=None).run(fmax=0, steps=3)
    assert len(evaluations) == 2 + 3 * (1 + 3)


def test_a_band_may_share_one_calculator(calc, evaluations):
    """The same path as with one per image, at four times the evaluations: one structure's results are remembered."""
    bands, spent = [], []
    for share in (False, True):
        images = [cluster() for _ in range(5)]
        images[-1].positions[1, 0] += 0.3
        for image in images:
            image.calc = calc if share else calc.spawn()
        neb = NEB(images, method="improvedtangent", allow_shared_calculator=share)
        neb.interpolate()
        evaluations.clear()
        FIRE(neb, logfile=None).run(fmax=0, steps=3)
        bands.append(neb.get_positions())
        spent.append(len(evaluations))
    assert np.array_equal(*bands)
    assert spent[1] > 3 * spent[0] == 3 * (2 + 3 * (1 + 3))


def test_18_trajectory_round_trip(calc, atoms, tmp_path):
    path = tmp_path / "run.traj"
    atoms.calc = calc
    with Trajectory(path, "w", atoms) as trajectory:
        trajectory.write()
        energy = atoms.get_potential_energy()
        trajectory.write()
    last = read(path)
    assert last.calc.name == "gffmerge"
    assert last.get_potential_energy() == energy
    assert np.array_equal(last.get_forces(), atoms.get_forces())


def test_18_extxyz_and_database_round_trip(calc, atoms, tmp_path):
    atoms.calc = calc
    energy, forces = atoms.get_potential_energy(), atoms.get_forces()
    write(tmp_path / "a.xyz", atoms, format="extxyz")
    assert np.abs(read(tmp_path / "a.xyz").get_forces() - forces).max() < 1e-7
    with connect(tmp_path / "a.db") as database:
        row = database.get(database.write(atoms))
    assert row.energy == energy
    assert row.calculator == "gffmerge"
    assert np.array_equal(row.forces, forces)


def test_18_sum_logging_and_finite_difference_calculators(calc):
    atoms = crystal()
    atoms.calc = calc
    energy, stress, forces = atoms.get_potential_energy(), atoms.get_stress(), atoms.get_forces()
    atoms.calc = SumCalculator([calc, calc.spawn()])
    assert atoms.get_potential_energy() == pytest.approx(2 * energy)
    assert np.allclose(atoms.get_stress(), 2 * stress)
    atoms.calc = LoggingCalculator(calc)
    assert atoms.get_potential_energy() == energy
    atoms.calc = FiniteDifferenceCalculator(calc, eps_disp=1e-4, eps_strain=1e-4)
    assert np.abs(atoms.get_forces() - forces).max() < 1e-7
    assert np.abs(atoms.get_stress() - stress).max() < 1e-8


def relaxed(atoms, calc):
    """Positions, energy, forces and stress after a few steps of a relaxation."""
    atoms.calc = calc
    BFGS(atoms, logfile=None).run(fmax=0, steps=3)
    return atoms.get_positions(), atoms.get_potential_energy(), atoms.get_forces(), atoms.get_stress()


@pytest.mark.skipif(os.name != "posix", reason="needs Unix sockets")
def test_18_socket_client(calc):
    """A driver reaches the calculator over the i-PI protocol, which carries a virial for the stress."""
    name = f"gffmerge-{uuid4().hex}"  # ASE makes the path of it
    served = crystal()
    served.calc = calc
    with SocketIOCalculator(unixsocket=name, timeout=30) as driver:
        client = SocketClient(unixsocket=name, timeout=30)
        thread = Thread(target=client.run, args=(served, True))
        thread.start()
        results = relaxed(crystal(), driver)
    thread.join(timeout=30)
    assert not thread.is_alive()
    for got, expected in zip(results, relaxed(crystal(), calc.spawn()), strict=True):
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-12)


class Packed(PackedCalculator):
    """A calculator that goes to its process by pickle."""

    def __init__(self, calc):
        self.calc = calc

    def unpack_calculator(self):
        return self.calc


class WorkerThread:
    """ASE's worker over pipes, as a thread: a process would take seconds to import."""

    def execute(self):
        (there, stdin), (stdout, back) = os.pipe(), os.pipe()
        self.stdin, self.stdout = os.fdopen(stdin, "wb"), os.fdopen(stdout, "rb")
        self.thread = Thread(target=self.work, args=(there, back))
        self.thread.start()
        return self

    def work(self, there, back):
        with open(there, "rb") as requests, open(back, "wb") as answers:
            worker = Client(requests, answers)
            worker.mainloop(worker.recv().unpack_calculator())

    def communicate(self):
        self.thread.join(timeout=30)
        self.stdin.close(), self.stdout.close()


def test_18_subprocess_calculator(calc):
    """It goes to the other side by pickle, is asked through ``calculate``, and an error there arrives here."""
    with PythonSubProcessCalculator(Packed(calc), WorkerThread()) as remote:
        results = relaxed(crystal(), remote)
        assert remote.backend().todict() == calc.todict()
        with pytest.raises(StructureError, match="Pu"):
            Atoms("Pu", calculator=remote).get_forces()
    for got, expected in zip(results, relaxed(crystal(), calc), strict=True):
        assert np.array_equal(got, expected)


def test_results_reach_the_log(calc):
    atoms = bulk("Al", cubic=True)
    atoms.rattle(0.05, seed=0)
    atoms.calc = calc
    log = io.StringIO()
    BFGS(atoms, logfile=log).run(fmax=0, steps=1)
    assert "BFGS" in log.getvalue()
