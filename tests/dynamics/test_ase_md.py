"""Molecular dynamics with cheap calculators of ASE."""

from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms, units
from ase.build import bulk, molecule
from ase.calculators.calculator import Calculator, all_changes
from ase.calculators.emt import EMT
from ase.constraints import FixAtoms
from ase.io import read

from ase_gffmerge.dynamics.ase_md import run_md
from ase_gffmerge.dynamics.integrators import Conditions, degrees_of_freedom, new_momenta
from ase_gffmerge.dynamics.stopping import bonds_intact, broken_bonds, find_bonds
from ase_gffmerge.dynamics.trajectory import Sample, Trajectory
from ase_gffmerge.errors import DynamicsError, FileFormatError, StructureError


class Springs(Calculator):
    """Harmonic bonds between all pairs of atoms: exact forces, no dissociation."""

    implemented_properties = ["energy", "forces"]  # noqa: RUF012

    def __init__(self, atoms: Atoms, k: float = 5.0):
        super().__init__()
        self.k, self.rest = k, atoms.get_all_distances()

    def calculate(self, atoms=None, properties=("energy",), system_changes=tuple(all_changes)) -> None:
        super().calculate(atoms, properties, system_changes)
        vectors = atoms.get_all_distances(vector=True)
        lengths = np.linalg.norm(vectors, axis=-1) + np.eye(len(atoms))
        stretch = (lengths - self.rest - np.eye(len(atoms))) * (1 - np.eye(len(atoms)))
        forces = self.k * (stretch / lengths)[..., None] * vectors
        self.results = {"energy": 0.25 * self.k * (stretch**2).sum(), "forces": forces.sum(axis=1)}


def springs(name: str = "CH3CH2OH", k: float = 5.0) -> Atoms:
    atoms = molecule(name)
    atoms.calc = Springs(atoms, k)
    return atoms


def copper() -> Atoms:
    atoms = bulk("Cu", cubic=True)
    atoms.calc = EMT()
    return atoms


def nve(atoms: Atoms, **changes: object) -> Trajectory:
    options = {"ensemble": "nve", "temperature": 300.0, "steps": 50, "timestep": 0.5, **changes}
    conditions = {
        field.name: options.pop(field.name) for field in fields(Conditions) if field.name in options
    }
    return run_md(atoms, Conditions(**conditions), **options)  # type: ignore[arg-type]


def test_nve_conserves_energy_and_momenta() -> None:
    atoms = springs()
    result = nve(atoms, steps=400, timestep=0.25)
    assert abs(result.drift_per_atom) < 1e-4
    assert abs(result.drift_slope_per_atom) < 1e-3
    assert result.broken_bonds == ()
    np.testing.assert_allclose(atoms.get_momenta().sum(axis=0), 0, atol=1e-10)
    np.testing.assert_allclose(atoms.get_angular_momentum(), 0, atol=1e-9)
    assert result.times[0] == 0
    assert result.times[-1] == pytest.approx(100)
    assert len(result.times) == len(result.total_energies) == len(result.temperatures) == 41
    assert result.potential_energies[-1] == atoms.get_potential_energy()
    assert result.total_energies[-1] == atoms.get_total_energy()
    assert result.steps_per_second > 0
    assert (result.n_atoms, result.steps) == (9, 400)


def test_energy_error_falls_with_the_square_of_the_time_step() -> None:
    spread = [
        np.ptp(nve(springs(), steps=int(100 / dt), timestep=dt, interval=1).total_energies)
        for dt in (1.0, 0.5)
    ]
    assert spread[0] / spread[1] == pytest.approx(4, rel=0.3)


def test_drift_and_slope_of_a_known_series() -> None:
    times = np.array([0.0, 1000.0, 2000.0])
    result = Trajectory(
        start=Atoms("H2"),
        ensemble="nve",
        steps=2000,
        timestep=1.0,
        target_temperature=1.0,
        seconds=4.0,
        times=times,
        potential_energies=np.array([0.4, 0.6, 0.5]),
        kinetic_energies=np.array([0.6, 0.5, 0.7]),
        temperatures=np.array([9.0, 1.0, 2.0]),
        positions=np.empty((0, 2, 3)),
        momenta=np.empty((0, 2, 3)),
        forces=np.empty((0, 2, 3)),
        broken_bonds=((0, 1),),
    )
    summary = result.to_dict()
    assert summary["drift_per_atom"] == pytest.approx(0.1)
    assert summary["drift_slope_per_atom"] == pytest.approx(0.05)
    assert summary["steps_per_second"] == 500
    assert summary["temperature_mean"] == 1.5
    assert summary["broken_bonds"] == [[0, 1]]


def test_seed_repeats_the_run() -> None:
    runs = [nve(springs(), ensemble="nvt", seed=seed).total_energies for seed in (1, 1, 2)]
    np.testing.assert_array_equal(runs[0], runs[1])
    assert not np.array_equal(runs[0], runs[2])


def test_sampling_interval_does_not_change_the_run() -> None:
    for ensemble, make in (("nve", springs), ("nvt", springs), ("npt", copper)):
        ends = []
        for interval in (1, 7, 100):
            atoms = make()
            nve(atoms, ensemble=ensemble, steps=20, interval=interval)
            ends.append(atoms.positions.copy())
        np.testing.assert_allclose(ends[0], ends[1], atol=1e-12)
        np.testing.assert_allclose(ends[0], ends[2], atol=1e-12)


def test_nvt_reaches_the_temperature_and_keeps_the_centre() -> None:
    atoms = springs()
    centre = atoms.get_center_of_mass()
    result = nve(atoms, ensemble="nvt", temperature=400.0, steps=4000, friction=0.05, timestep=1.0)
    assert result.mean_temperature == pytest.approx(400, rel=0.15)
    np.testing.assert_allclose(atoms.get_center_of_mass(), centre, atol=1e-8)
    assert atoms.constraints == []
    assert "drift_per_atom" not in result.to_dict()


def test_constraints_are_kept() -> None:
    atoms = springs()
    atoms.set_constraint(FixAtoms([0]))
    start = atoms.positions[0].copy()
    nve(atoms, ensemble="nvt")
    np.testing.assert_array_equal(atoms.positions[0], start)
    assert len(atoms.constraints) == 1


def test_npt_moves_the_cell() -> None:
    atoms = copper() * (2, 1, 1)
    atoms.calc = EMT()
    volume = atoms.cell.volume
    result = nve(atoms, ensemble="npt", pressure=5.0, timestep=2.0, steps=100)
    assert atoms.cell.volume < volume
    assert np.isfinite(result.total_energies).all()
    assert (result.volumes[0], result.volumes[-1]) == (volume, atoms.cell.volume)
    last = -np.trace(atoms.get_stress(include_ideal_gas=True, voigt=False)) / 3
    assert result.pressures[-1] == pytest.approx(last / units.GPa)
    assert result.to_dict()["pressure_mean"] == pytest.approx(result.pressures[1:].mean())


def test_velocities_can_be_kept() -> None:
    atoms = springs()
    atoms.set_momenta(np.full((9, 3), 0.1))
    kinetic = atoms.get_kinetic_energy()
    samples: list[Sample] = []
    nve(atoms, thermalize=False, on_sample=samples.append)
    assert samples[0].total_energy - samples[0].potential_energy == pytest.approx(kinetic)
    assert [sample.step for sample in samples] == [0, 10, 20, 30, 40, 50]


@pytest.mark.parametrize(("name", "freedom"), [("CH3OH", 12), ("CO2", 4), ("H2", 1)])
def test_temperature_counts_what_can_move(name: str, freedom: int) -> None:
    atoms = molecule(name)
    assert degrees_of_freedom(atoms, at_rest=True) == freedom
    assert degrees_of_freedom(atoms, at_rest=False) == 3 * len(atoms)
    rng = np.random.default_rng(0)
    temperatures = []
    for _ in range(400):
        new_momenta(atoms, 300.0, rng=rng)
        temperatures.append(2 * atoms.get_kinetic_energy() / (freedom * units.kB))
    assert np.mean(temperatures) == pytest.approx(300, rel=0.15)


def test_one_atom() -> None:
    atoms = Atoms("Cu", calculator=EMT())
    result = nve(atoms, temperature=10.0)
    assert result.drift_per_atom == pytest.approx(0)
    nve(atoms, ensemble="nvt")


def test_zero_temperature_stays_at_rest() -> None:
    result = nve(springs(), temperature=0.0)
    assert result.temperatures.max() < 1e-9


# -- trajectories --


@pytest.mark.parametrize("name", ["run.traj", "run.xyz", "run.extxyz"])
def test_trajectory_holds_energies_and_forces(tmp_path: Path, name: str) -> None:
    atoms = springs()
    (tmp_path / name).write_text("old")
    result = nve(atoms, trajectory=tmp_path / name)
    frames = read(tmp_path / name, ":")
    assert len(frames) == len(result.times)
    assert frames[-1].get_potential_energy() == pytest.approx(result.potential_energies[-1], abs=1e-6)
    np.testing.assert_allclose(frames[-1].get_forces(), atoms.get_forces(), atol=1e-6)
    np.testing.assert_allclose(frames[-1].get_momenta(), atoms.get_momenta(), atol=1e-6)


def test_interrupted_run_leaves_a_readable_trajectory(tmp_path: Path) -> None:
    def stop(sample: Sample) -> None:
        if sample.step == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        nve(springs(), trajectory=tmp_path / "run.traj", on_sample=stop)
    assert len(read(tmp_path / "run.traj", ":")) == 3


@pytest.mark.parametrize(
    ("changes", "error", "pattern"),
    [
        ({"ensemble": "nph"}, DynamicsError, "choose one of nve, nvt, npt"),
        ({"steps": 0}, DynamicsError, "at least 1"),
        ({"interval": 0}, DynamicsError, "at least 1"),
        ({"timestep": 0.0}, DynamicsError, "time step"),
        ({"temperature": -1.0}, DynamicsError, "impossible"),
        ({"temperature": np.nan}, DynamicsError, "impossible"),
        ({"ensemble": "npt"}, StructureError, "not periodic in three directions"),
        ({"trajectory": "run.pdf"}, FileFormatError, "must end in"),
    ],
)
def test_bad_options(changes: dict, error: type[Exception], pattern: str) -> None:
    with pytest.raises(error, match=pattern):
        nve(springs(), **changes)


def test_more_bad_input(tmp_path: Path) -> None:
    with pytest.raises(StructureError, match="no atoms"):
        nve(Atoms(calculator=EMT()))
    fixed = copper()
    fixed.set_constraint(FixAtoms([0]))
    with pytest.raises(DynamicsError, match="constraints"):
        nve(fixed, ensemble="npt")
    (tmp_path / "file").write_text("")
    with pytest.raises(FileFormatError, match="cannot write"):
        nve(springs(), trajectory=tmp_path / "file" / "run.traj")


def test_failing_calculator_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(NotImplementedError):
        nve(Atoms("U", calculator=EMT()), trajectory=tmp_path / "run.traj")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_explosion_is_explained() -> None:
    result = nve(springs(k=50.0), timestep=1e5, steps=5000)
    assert result.stopped == "too hot"
    assert "shorter time step" in result.detail


# -- bonds --


def test_bonds_of_ethanol() -> None:
    atoms = molecule("CH3CH2OH")
    bonds = find_bonds(atoms)
    assert len(bonds.pairs) == 8
    assert (bonds.pairs[:, 0] < bonds.pairs[:, 1]).all()
    assert bonds_intact(atoms, bonds)
    atoms.rotate(40, "x")
    atoms.positions += 17
    assert bonds_intact(atoms, bonds)
    carbon, hydrogen = next(pair for pair in bonds.pairs.tolist() if set(atoms.numbers[pair]) == {1, 6})
    atoms.set_distance(carbon, hydrogen, 1.09 * 1.4, fix=0)
    assert bonds_intact(atoms, bonds)
    atoms.set_distance(carbon, hydrogen, 1.09 * 1.6, fix=0)
    assert broken_bonds(atoms, bonds).tolist() == [[carbon, hydrogen]]
    atoms.positions[0] = np.nan
    assert not bonds_intact(atoms, bonds)


def test_bonds_across_the_cell() -> None:
    atoms = Atoms("N2", positions=[[0.2, 0, 0], [4.9, 0, 0]], cell=[5.8, 5.8, 5.8], pbc=True)
    bonds = find_bonds(atoms)
    assert bonds.lengths == pytest.approx([1.1])
    atoms.wrap()
    atoms.positions[1, 0] += 5.8
    assert bonds_intact(atoms, bonds)


def test_no_bonds() -> None:
    for atoms in (Atoms("Ar"), Atoms("Ar2", positions=[[0, 0, 0], [9, 0, 0]]), Atoms()):
        bonds = find_bonds(atoms)
        assert bonds.pairs.shape == (0, 2)
        assert bonds_intact(atoms, bonds)


def test_broken_bonds_are_reported() -> None:
    atoms = Atoms("H2", positions=[[0, 0, 0], [0.74, 0, 0]])
    atoms.calc = Springs(Atoms("H2", positions=[[0, 0, 0], [1.3, 0, 0]]), k=0.5)
    assert nve(atoms, interval=1).broken_bonds == ((0, 1),)
