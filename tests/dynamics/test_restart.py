"""A run that stopped and went on is the run that did not stop, to the last bit, with every integrator."""

from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.emt import EMT
from ase.constraints import FixAtoms
from ase.io import read

from ase_gffmerge import GFFMergeCalculator
from ase_gffmerge.dynamics.ase_md import run_md
from ase_gffmerge.dynamics.integrators import Conditions, restart_path
from ase_gffmerge.dynamics.trajectory import Sample
from ase_gffmerge.errors import DynamicsError, FileFormatError
from helpers.pairs import Pairs
from helpers.toys import random_force_field

WAYS = {
    "nve": {"ensemble": "nve"},
    "langevin": {"ensemble": "nvt"},
    "ramp": {"ensemble": "nvt", "final_temperature": 600.0},
    "bussi": {"ensemble": "nvt", "thermostat": "bussi"},
    "nose-hoover": {"ensemble": "nvt", "thermostat": "nose-hoover"},
    "npt": {"ensemble": "npt", "pressure": 1.0},
    "isotropic": {"ensemble": "npt", "barostat": "isotropic"},
}


class Killed(Exception):
    """What stands for the end of a process."""


def conditions(way: str, **changes: object) -> Conditions:
    return Conditions(**{"temperature": 300.0, "timestep": 2.0, **WAYS[way], **changes})  # type: ignore[arg-type]


def copper() -> Atoms:
    atoms = bulk("Cu", cubic=True) * (2, 1, 1)
    atoms.rattle(0.05, seed=1)
    atoms.calc = Pairs()
    return atoms


def kill_at(step: int):
    def watch(sample: Sample) -> None:
        if sample.step == step:
            raise Killed

    return watch


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("suffix", [".traj", ".extxyz"])
def test_a_resumed_run_ends_in_the_same_bits(way: str, suffix: str, tmp_path: Path) -> None:
    if suffix == ".extxyz" and way not in ("langevin", "npt"):
        pytest.skip("the integrators are tested with the other format")
    whole, parted = tmp_path / f"whole{suffix}", tmp_path / f"parted{suffix}"
    atoms = copper()
    expected = run_md(atoms, conditions(way), steps=23, interval=5, trajectory=whole)
    options = {"steps": 23, "interval": 5, "trajectory": parted, "restart": restart_path(parted)}
    with pytest.raises(Killed):
        run_md(copper(), conditions(way), **options, on_sample=kill_at(10))
    again = copper()
    found = run_md(again, conditions(way), **options, resume=True)
    np.testing.assert_array_equal(again.positions, atoms.positions)
    np.testing.assert_array_equal(again.get_momenta(), atoms.get_momenta())
    np.testing.assert_array_equal(again.cell.array, atoms.cell.array)
    np.testing.assert_array_equal(found.total_energies, expected.total_energies)
    np.testing.assert_array_equal(found.times, expected.times)
    for one, other in zip(read(parted, ":"), read(whole, ":"), strict=True):
        np.testing.assert_array_equal(one.positions, other.positions)
        np.testing.assert_array_equal(one.get_momenta(), other.get_momenta())
        assert one.get_potential_energy() == other.get_potential_energy()


def test_what_our_calculator_remembers_of_a_run_does_not_matter(tmp_path: Path) -> None:
    def ethanol() -> Atoms:
        atoms = molecule("CH3CH2OH")
        atoms.calc = GFFMergeCalculator(random_force_field("painn"), device="cpu", skin=0.2)
        return atoms

    hot = conditions("langevin", temperature=500.0, timestep=1.0)
    atoms, again, path = ethanol(), ethanol(), tmp_path / "run.restart"
    run_md(atoms, hot, steps=60, interval=20)
    with pytest.raises(Killed):
        run_md(ethanol(), hot, steps=60, interval=20, restart=path, on_sample=kill_at(40))
    run_md(again, hot, steps=60, interval=20, restart=path, resume=True)
    np.testing.assert_array_equal(again.positions, atoms.positions)


def test_frames_after_the_restart_point_are_taken_off(tmp_path: Path) -> None:
    path = tmp_path / "run.traj"
    options = {"steps": 20, "interval": 5, "trajectory": path, "restart": restart_path(path)}
    with pytest.raises(Killed):
        run_md(copper(), conditions("langevin"), **options, on_sample=kill_at(10))
    early = restart_path(path).read_bytes()
    run_md(copper(), conditions("langevin"), **options, resume=True)
    expected = [atoms.positions for atoms in read(path, ":")]
    restart_path(path).write_bytes(early)  # as if killed between a frame and its restart file
    run_md(copper(), conditions("langevin"), **options, resume=True)
    np.testing.assert_array_equal([atoms.positions for atoms in read(path, ":")], expected)


def test_a_finished_run_is_extended(tmp_path: Path) -> None:
    path = tmp_path / "run.traj"
    run_md(copper(), conditions("bussi"), steps=10, interval=5, trajectory=path, restart=restart_path(path))
    longer = run_md(
        copper(),
        conditions("bussi"),
        steps=20,
        interval=5,
        trajectory=path,
        restart=restart_path(path),
        resume=True,
    )
    straight = run_md(copper(), conditions("bussi"), steps=20, interval=5)
    np.testing.assert_array_equal(longer.total_energies, straight.total_energies)
    assert len(read(path, ":")) == 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"temperature": 310.0}, "temperature was 300.0, now 310.0"), ({"timestep": 1.0}, "timestep was 2.0")],
)
def test_other_conditions_are_refused(changes: dict, message: str, tmp_path: Path) -> None:
    path = tmp_path / "run.traj"
    options = {"steps": 10, "interval": 5, "trajectory": path, "restart": restart_path(path)}
    run_md(copper(), conditions("langevin"), **options)
    with pytest.raises(DynamicsError, match=message):
        run_md(copper(), conditions("langevin", **changes), **options, resume=True)


def test_other_forces_constraints_and_boundaries_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.traj"
    options = {"steps": 10, "interval": 5, "trajectory": path, "restart": restart_path(path)}
    run_md(copper(), conditions("langevin"), **options)
    held, slab, other = copper(), copper(), copper()
    held.set_constraint(FixAtoms([0]))
    slab.pbc = (True, True, False)
    other.calc = EMT()
    for atoms, message in (
        (held, "constraints was none, now .*FixAtoms"),
        (slab, "periodic directions was"),
        (other, "calculator was Pairs, now EMT"),
    ):
        with pytest.raises(DynamicsError, match=message):
            run_md(atoms, conditions("langevin"), **options, resume=True)


def test_speed_counts_the_steps_that_were_done_in_the_time_they_took(tmp_path: Path) -> None:
    path = tmp_path / "run.traj"
    options = {"interval": 5, "trajectory": path, "restart": restart_path(path)}
    first = run_md(copper(), conditions("nve"), steps=20, **options)
    again = run_md(copper(), conditions("nve"), steps=20, **options, resume=True)  # nothing is left to do
    assert again.seconds >= 0.5 * first.seconds
    assert again.steps_per_second <= 2 * first.steps_per_second
    burst = run_md(copper(), conditions("nve", timestep=60.0), steps=400, interval=1)
    assert burst.steps_per_second * burst.seconds == pytest.approx(len(burst.times) - 1)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    path = tmp_path / "run.traj"
    options = {"steps": 10, "interval": 5, "trajectory": path, "restart": restart_path(path)}
    with pytest.raises(FileFormatError, match="and so no run to continue"):
        run_md(copper(), conditions("langevin"), **options, resume=True)
    run_md(copper(), conditions("langevin"), **options)
    path.unlink()
    with pytest.raises(FileFormatError, match="holds 0 frames, fewer than the 3"):
        run_md(copper(), conditions("langevin"), **(options | {"steps": 20}), resume=True)


def test_frames_are_appended(tmp_path: Path) -> None:
    path = tmp_path / "run.extxyz"
    for _ in range(2):
        run_md(copper(), conditions("nve"), steps=4, interval=2, trajectory=path, append=True)
    assert len(read(path, ":")) == 6


def test_the_log_has_a_line_for_every_sample(tmp_path: Path) -> None:
    path, log = tmp_path / "run.traj", tmp_path / "run.log"
    options = {"interval": 5, "trajectory": path, "restart": restart_path(path), "log": log}
    run_md(copper(), conditions("npt"), steps=10, **options)
    run_md(copper(), conditions("npt"), steps=20, **options, resume=True)
    header, *lines = log.read_text().splitlines()
    assert header.split()[:5] == ["Time[ps]", "Etot[eV]", "Epot[eV]", "Ekin[eV]", "T[K]"]
    assert [float(line.split()[0]) for line in lines] == pytest.approx([0, 0.01, 0.02, 0.03, 0.04], abs=1e-4)


def test_a_run_that_explodes_stops_and_says_when() -> None:
    result = run_md(copper(), conditions("nve", timestep=60.0), steps=400, interval=1)
    assert result.stopped == "too hot"
    assert result.stopped_at is not None
    assert result.stopped_at < 400 * 60
    assert "shorter time step" in result.detail
    assert np.isfinite(result.total_energies).all()


def test_a_ramp_heats() -> None:
    hot = run_md(
        copper(), conditions("ramp", friction=0.2, final_temperature=1200.0), steps=400, interval=20
    ).temperatures
    assert hot[-8:].mean() > 1.5 * hot[1:8].mean()


@pytest.mark.parametrize(("way", "spread"), [("bussi", 60.0), ("nose-hoover", 60.0)])
def test_thermostats_reach_their_temperature(way: str, spread: float) -> None:
    atoms = bulk("Cu", cubic=True) * (2, 2, 2)
    atoms.calc = Pairs()
    run = run_md(atoms, conditions(way, thermostat_time=50.0, timestep=5.0), steps=600, interval=5)
    assert run.temperatures[60:].mean() == pytest.approx(300, abs=spread)
