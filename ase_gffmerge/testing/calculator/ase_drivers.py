"""Points 17 and 18: evaluations per step, files, and other calculators around this one."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from threading import Thread

import numpy as np
from ase import Atoms, units
from ase.calculators.calculator import Calculator
from ase.calculators.fd import FiniteDifferenceCalculator
from ase.calculators.loggingcalc import LoggingCalculator
from ase.calculators.mixing import SumCalculator
from ase.calculators.socketio import SocketClient, SocketIOCalculator
from ase.db import connect
from ase.filters import FrechetCellFilter
from ase.io import Trajectory, read, write
from ase.md import MTKNPT, VelocityVerlet, thermalize_momenta
from ase.mep import NEB
from ase.optimize import BFGS, FIRE

from ase_gffmerge.testing.calculator.harness import (
    NotApplicable,
    Results,
    Subject,
    check,
    counted,
    derivative,
    deviation,
    raised_by,
    require,
)

STEPS = 8
PER_STEP = 1.3  # evaluations; what asks for energy, forces and stress one by one costs two or three
FEW_ATOMS = 10


def _per_step(subject: Subject, run: Callable[[Atoms], object]) -> str:
    """Count the calls of ``calculate`` during a run of ``STEPS`` steps; the first structure is not counted."""
    atoms = subject.atoms()
    thermalize_momenta(atoms, temperature_K=100.0, rng=np.random.default_rng(0))
    subject.reset()
    with counted(subject.calc) as calls:
        run(atoms)
    if not calls:
        raise NotApplicable("its calculate() was never called")
    rate = (len(calls) - 1) / STEPS
    require(rate <= PER_STEP, f"{rate:.2f} evaluations per step: ask once, answer everything")
    return f"{rate:.2f} per step"


@check(17)
def evaluations_of_dynamics(subject: Subject) -> str:
    """Velocity Verlet asks for forces and energies."""
    subject.needs("energy", "forces")

    def run(atoms: Atoms) -> None:
        dynamics = VelocityVerlet(atoms, timestep=subject.timestep * units.fs)
        dynamics.attach(atoms.get_total_energy, interval=1)
        dynamics.run(STEPS)

    return _per_step(subject, run)


@check(17)
def evaluations_of_relaxation(subject: Subject) -> str:
    """BFGS and FIRE ask for forces and (free) energies."""
    subject.needs("energy", "forces")
    rates = [
        _per_step(subject, lambda atoms, kind=kind: kind(atoms, logfile=None).run(fmax=0, steps=STEPS))  # type: ignore[misc]
        for kind in (BFGS, FIRE)
    ]
    return ", ".join(rates)


@check(17)
def evaluations_with_a_moving_cell(subject: Subject) -> str:
    """Constant pressure and cell filters ask for the stress as well, and first."""
    subject.needs("energy", "forces", "stress")
    if not subject.structure.pbc.all():
        raise NotApplicable("the structure is not periodic in three directions")

    def pressure(atoms: Atoms) -> None:
        MTKNPT(
            atoms,
            timestep=subject.timestep * units.fs,
            temperature_K=100.0,
            pressure_au=0.0,
            tdamp=100 * units.fs,
            pdamp=1000 * units.fs,
        ).run(STEPS)

    def relaxation(atoms: Atoms) -> None:
        FIRE(FrechetCellFilter(atoms), logfile=None).run(fmax=0, steps=STEPS)

    return ", ".join(_per_step(subject, run) for run in (pressure, relaxation))


@check(17)
def evaluations_of_a_band(subject: Subject) -> str:
    """A nudged elastic band of five images costs three evaluations per step with calculators of their own."""
    subject.needs("energy", "forces")
    images = [subject.structure.copy() for _ in range(5)]
    images[-1].positions[0] += 0.2
    twins = [subject.twin() for _ in images]
    for image, twin in zip(images, twins, strict=True):
        image.calc = twin
    band = NEB(images, method="improvedtangent")
    band.interpolate()
    counts: list[int] = []
    for twin in twins:
        _count_for_good(twin, counts)
    FIRE(band, logfile=None).run(fmax=0, steps=STEPS)
    rate = (len(counts) - len(images)) / STEPS
    require(rate <= 3 * PER_STEP, f"{rate:.1f} evaluations per step of a band with three moving images")
    return f"{rate:.2f} per step, three moving images"


def _count_for_good(calc: Calculator, calls: list[int]) -> None:
    """Let every call of ``calc.calculate`` add to ``calls``; the calculator is not used afterwards."""
    plain = calc.calculate

    def calculate(*args: object, **kwargs: object) -> None:
        calls.append(1)
        plain(*args, **kwargs)

    calc.calculate = calculate  # type: ignore[method-assign]


@check(18)
def files_keep_the_results(subject: Subject) -> str:
    """Trajectory, extended XYZ and database give back structure, energy and forces."""
    subject.needs("energy", "forces")
    atoms = subject.atoms()
    expected = {"energy": atoms.get_potential_energy(), "forces": atoms.get_forces()}
    with tempfile.TemporaryDirectory() as folder:
        stored = dict(_stored(atoms, Path(folder)))
    for kind, back in stored.items():
        got = {"energy": back.get_potential_energy(), "forces": back.get_forces()}
        moved = deviation(back.positions, atoms.positions)
        require(moved < 1e-7, f"{kind} moves atoms by {moved:.1e} Å")
        gap = max(deviation(got[name], expected[name]) for name in expected)
        require(gap < 1e-6, f"{kind} changes results by {gap:.1e}")
    name = stored["a trajectory"].calc.name
    require(
        name == subject.calc.name, f"a trajectory calls the calculator {name!r}, not {subject.calc.name!r}"
    )
    return ", ".join(stored)


def _stored(atoms: Atoms, folder: Path) -> list[tuple[str, Atoms]]:
    """What comes back from each kind of file."""
    with Trajectory(folder / "a.traj", "w", atoms) as trajectory:
        trajectory.write()
    write(folder / "a.xyz", atoms, format="extxyz")
    with connect(folder / "a.db") as database:
        row = database.get_atoms(database.write(atoms))
    return [
        ("a trajectory", read(folder / "a.traj")),
        ("extended XYZ", read(folder / "a.xyz")),
        ("a database", row),
    ]


@check(18)
def sums_and_logs(subject: Subject) -> str:
    """``SumCalculator`` and ``LoggingCalculator`` work around it."""
    subject.needs("energy", "forces")
    expected = subject.evaluate(subject.structure)
    atoms = subject.structure.copy()
    atoms.calc = SumCalculator([subject.calc, subject.twin()])
    doubled = {"energy": atoms.get_potential_energy() / 2, "forces": atoms.get_forces() / 2}
    subject.compare(doubled, expected, what="SumCalculator")
    atoms.calc = LoggingCalculator(subject.calc)
    logged = {"energy": atoms.get_potential_energy(), "forces": atoms.get_forces()}
    return subject.compare(logged, expected, what="LoggingCalculator")


@check(18)
def finite_difference_calculator(subject: Subject) -> str:
    """``FiniteDifferenceCalculator`` works around it."""
    subject.needs("energy", "forces")
    if subject.structure.cell.rank < 3:
        raise NotApplicable("ASE's FiniteDifferenceCalculator wants a volume")
    if len(subject.structure) > FEW_ATOMS:
        raise NotApplicable(f"more than {FEW_ATOMS} atoms; point 14 tries some of them")
    expected, energies = subject.evaluate(subject.structure), []

    def forces(step: float) -> np.ndarray:
        atoms = subject.atoms(FiniteDifferenceCalculator(subject.calc, eps_disp=step, eps_strain=step))
        energies.append(atoms.get_potential_energy())
        return atoms.get_forces()

    numerical, doubt = derivative(forces, subject.displacement)
    gap = max(deviation(energy, expected["energy"]) for energy in energies)
    require(gap <= subject.tolerances.energy * len(subject.structure), f"the energy differs by {gap:.3g} eV")
    error = deviation(numerical, expected["forces"])
    require(
        error <= subject.tolerances.forces + doubt,
        f"its forces differ by {error:.3g} eV/Å (tolerance {subject.tolerances.forces:.1g} and {doubt:.1g} for the "
        "differences)",
    )
    return f"forces to {error:.1e} eV/Å"


@check(18)
def socket_client(subject: Subject) -> str:
    """ASE's socket client, the way to i-PI, serves energies and forces of structures that move."""
    subject.needs("energy", "forces")
    moved = subject.structure.copy()
    moved.positions[0] += 0.1
    expected = [subject.evaluate(atoms) for atoms in (subject.structure, moved)]
    subject.reset()
    problems: list[BaseException] = []
    with tempfile.TemporaryDirectory() as folder:
        name = Path(folder).name
        with SocketIOCalculator(unixsocket=name, timeout=30) as server:
            client = Thread(target=_serve, args=(subject, name, problems), daemon=True)
            client.start()
            got: list[Results] = []
            error = raised_by(lambda: _ask(server, [subject.structure, moved], got))
        client.join(30)
    for problem in (*problems, error):
        require(problem is None, f"raises {type(problem).__name__}: {problem}")
    return [subject.compare(a, b, what="the socket") for a, b in zip(got, expected, strict=True)][-1]


def _ask(server: SocketIOCalculator, structures: list[Atoms], got: list[Results]) -> None:
    """Send structures, one after the other, and collect the answers."""
    atoms = structures[0].copy()
    atoms.calc = server
    for structure in structures:
        atoms.positions = structure.positions
        got.append({"energy": atoms.get_potential_energy(), "forces": atoms.get_forces()})


def _serve(subject: Subject, name: str, problems: list[BaseException]) -> None:
    """Answer through the socket until the server closes it."""
    client = SocketClient(unixsocket=name, timeout=30)
    use_stress = "stress" in subject.properties and subject.structure.cell.rank == 3
    try:
        client.run(subject.atoms(), use_stress=use_stress)
    except Exception as problem:
        problems.append(problem)
    finally:
        client.close()


CHECKS = (
    evaluations_of_dynamics,
    evaluations_of_relaxation,
    evaluations_with_a_moving_cell,
    evaluations_of_a_band,
    files_keep_the_results,
    sums_and_logs,
    finite_difference_calculator,
    socket_client,
)
