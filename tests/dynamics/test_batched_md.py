"""Replicas: the right integrators, whatever else is in the batch and however neighbours are found."""

import numpy as np
import pytest
import torch
from ase import Atoms, units
from ase.build import molecule
from ase.calculators.emt import EMT
from ase.constraints import FixAtoms
from ase.md import VelocityVerlet

from ase_gffmerge import ForceField, GFFMergeCalculator, run_replicas
from ase_gffmerge.dynamics.stopping import StoppingCriteria
from ase_gffmerge.dynamics.trajectory import Trajectory
from ase_gffmerge.errors import DynamicsError, FramesError, StructureError
from ase_gffmerge.graphs.graph import build_graph
from ase_gffmerge.graphs.verlet import VerletGraph
from helpers.springs import Springs
from helpers.toys import random_force_field, stranger

OFF = StoppingCriteria(stretch=None, contact=None, heat=None)


def positions(run: Trajectory) -> np.ndarray:
    return np.array([atoms.positions for atoms in run.frames])


def start(atoms: Atoms, temperature: float = 300.0, seed: int = 0) -> Atoms:
    atoms = atoms.copy()
    atoms.set_momenta(
        np.random.default_rng(seed).standard_normal((len(atoms), 3))
        * np.sqrt(units.kB * temperature * atoms.get_masses())[:, None]
    )
    return atoms


def test_nve_follows_ases_velocity_verlet(potential, structures):
    starts = [start(atoms) for atoms in structures]
    runs = run_replicas(
        potential,
        starts,
        ensemble="nve",
        temperature=300,
        timestep=0.5,
        steps=20,
        every=20,
        thermalize=False,
        criteria=OFF,
    )
    for atoms, run in zip(starts, runs, strict=True):
        atoms.calc = GFFMergeCalculator(
            ForceField(name="toy", potential=potential), dtype="float64", device="cpu"
        )
        VelocityVerlet(atoms, 0.5 * units.fs).run(20)
        np.testing.assert_allclose(run.frames[-1].positions, atoms.positions, atol=1e-9)
        np.testing.assert_allclose(run.frames[-1].get_momenta(), atoms.get_momenta(), atol=1e-8)
        assert run.potential_energies[-1] == pytest.approx(atoms.get_potential_energy(), abs=1e-9)
        assert run.kinetic_energies[-1] == pytest.approx(atoms.get_kinetic_energy(), abs=1e-9)
        np.testing.assert_allclose(run.velocities[-1], atoms.get_velocities(), atol=1e-9)
        np.testing.assert_allclose(run.frames[-1].get_forces(), atoms.get_forces(), atol=1e-8)


def test_nve_conserves_energy_to_second_order():
    def fluctuation(timestep: float, steps: int) -> float:
        (run,) = run_replicas(
            Springs(),
            [molecule("H2O")],
            ensemble="nve",
            temperature=300,
            timestep=timestep,
            steps=steps,
            every=1,
            seed=3,
            criteria=OFF,
        )
        return float(run.total_energies.std())

    assert 3.5 < fluctuation(0.5, 400) / fluctuation(0.25, 800) < 4.5


def test_initial_velocities_are_at_rest_and_have_the_temperature():
    runs = run_replicas(
        Springs(),
        [molecule("CH3CH2OH")] * 60,
        ensemble="nve",
        temperature=400,
        timestep=0.5,
        steps=1,
        every=1,
        criteria=OFF,
    )
    for run in runs[:5]:
        np.testing.assert_allclose(run.frames[0].get_momenta().sum(axis=0), 0, atol=1e-9)
        np.testing.assert_allclose(run.frames[0].get_angular_momentum(), 0, atol=1e-8)
    assert np.mean([run.temperatures[0] for run in runs]) == pytest.approx(400, rel=0.05)


def test_langevin_samples_temperature_and_configurations():
    """A spring at k: <(r-r0)^2> = kB T/k to leading order; two temperatures in one batch."""
    stiffness, temperatures = 30.0, np.repeat([200.0, 600.0], 50)
    pair = Atoms("CO", [[0, 0, 0], [4.0, 0, 0]])
    runs = run_replicas(
        Springs(stiffness=stiffness, length=4.0),
        [pair] * 100,
        ensemble="nvt",
        temperature=temperatures,
        timestep=1.0,
        steps=500,
        every=4,
        friction=0.1,
        criteria=OFF,
    )
    for target in (200.0, 600.0):
        chosen = [run for run in runs if run.target_temperature == target]
        kinetic = np.mean([run.temperatures[15:].mean() for run in chosen])
        bonds = np.concatenate(
            [np.linalg.norm(positions(run)[15:, 1] - positions(run)[15:, 0], axis=1) for run in chosen]
        )
        assert kinetic == pytest.approx(target, rel=0.06)
        assert np.var(bonds) == pytest.approx(units.kB * target / stiffness, rel=0.08)


def test_a_replica_does_not_notice_the_others(potential, structures):
    options = {"ensemble": "nvt", "timestep": 0.5, "steps": 12, "every": 4, "criteria": OFF}
    together = run_replicas(potential, structures, temperature=[300, 100, 200], seed=[5, 6, 7], **options)
    for atoms, temperature, seed, run in zip(structures, (300, 100, 200), (5, 6, 7), together, strict=True):
        (alone,) = run_replicas(potential, [atoms], temperature=temperature, seed=[seed], **options)
        np.testing.assert_allclose(positions(run), positions(alone), atol=1e-9)
        np.testing.assert_allclose(run.temperatures, alone.temperatures, rtol=1e-6)


def test_skin_changes_nothing(potential, structures):
    options = {"ensemble": "nvt", "temperature": 2000, "timestep": 1.0, "steps": 40, "criteria": OFF}
    runs = [run_replicas(potential, structures, skin=skin, **options) for skin in (0.0, 0.3)]
    for exact, fast in zip(*runs, strict=True):
        assert np.abs(positions(exact)[-1] - positions(exact)[0]).max() > 0.2  # lists were found again
        np.testing.assert_allclose(positions(fast), positions(exact), atol=1e-8)


@pytest.mark.parametrize("skin", [0.0, 0.4])
def test_edges_are_exactly_those_within_the_cutoff(structures, skin, rng):
    graph = VerletGraph(structures, cutoff=3.5, skin=skin, device=torch.device("cpu"), specialist=[0, 1, 2])
    moved = [atoms.copy() for atoms in structures]
    for _ in range(6):
        for atoms in moved:
            atoms.positions += 0.07 * rng.standard_normal(atoms.positions.shape)
        batch = graph.at(torch.as_tensor(np.concatenate([atoms.positions for atoms in moved])))
        offset, expected = 0, set()
        for k, atoms in enumerate(moved):
            single = build_graph(atoms, 3.5)
            rows = torch.cat([single.edge_index + offset, single.shifts.long().T]).T.tolist()
            expected |= {tuple(row) for row in rows}
            offset += len(atoms)
            assert (batch.specialist[batch.structure_index == k] == k).all()
        found = torch.cat([batch.edge_index, batch.shifts.long().T]).T.tolist()
        assert {tuple(row) for row in found} == expected
        assert len(found) == len(expected)


def test_the_seed_decides(potential):
    def final(seed: int) -> np.ndarray:
        options = {
            "ensemble": "nvt",
            "temperature": 300,
            "timestep": 0.5,
            "steps": 5,
            "every": 5,
            "criteria": OFF,
        }
        return positions(run_replicas(potential, [molecule("H2O")] * 2, seed=seed, **options)[1])[-1]

    np.testing.assert_array_equal(final(1), final(1))
    assert not np.allclose(final(1), final(2))


def test_float32_networks_move_in_float64(potential):
    (run,) = run_replicas(
        potential.float(), [molecule("H2O")], ensemble="nve", temperature=300, timestep=0.5, steps=4, every=2
    )
    assert run.stopped is None
    assert (
        np.abs(run.frames[-1].get_momenta().sum(axis=0)).max() < 1e-12
    )  # float32 forces that cancel exactly


def test_a_broken_replica_leaves_and_the_others_go_on():
    hot = start(molecule("H2O"))
    momenta = np.zeros((3, 3))
    momenta[1] = [0, 30.0, 0]  # one hydrogen leaves
    hot.set_momenta(momenta)
    cold = start(molecule("CH4"), temperature=50.0)
    options = {
        "ensemble": "nve",
        "temperature": 300,
        "timestep": 0.2,
        "steps": 60,
        "every": 10,
        "thermalize": False,
    }
    springs = Springs(stiffness=0.01)
    broken, fine = run_replicas(springs, [hot, cold], criteria=StoppingCriteria(heat=None), **options)
    assert broken.stopped == "bond broken"
    assert "O0 and H1" in broken.detail or "H1" in broken.detail
    assert 0 < broken.stopped_at < 12
    assert broken.times[-1] <= broken.stopped_at
    assert fine.stopped is None
    assert fine.times.tolist() == [0, 2, 4, 6, 8, 10, 12]
    (alone,) = run_replicas(springs, [cold], criteria=StoppingCriteria(heat=None), **options)
    np.testing.assert_allclose(positions(fine), positions(alone), atol=1e-12)
    (too_hot,) = run_replicas(springs, [hot], **options)
    assert (too_hot.stopped, too_hot.stopped_at, too_hot.frames) == ("too hot", 0.0, ())


def test_other_reasons_to_stop():
    options = {"ensemble": "nve", "temperature": 0, "timestep": 0.5, "steps": 10, "every": 5}
    close = Atoms("H2", [[0, 0, 0], [0.2, 0, 0]])
    water = molecule("H2O")
    nan = Springs(stiffness=np.nan)
    assert run_replicas(nan, [water], **options)[0].stopped == "not finite"
    assert run_replicas(Springs(stiffness=1e9), [water], criteria=OFF, **options)[0].stopped == "not finite"
    run, other = run_replicas(Springs(), [close, water], **options)
    assert (run.stopped, other.stopped) == ("atoms too close", None)
    assert "0.20 Å" in run.detail
    graded = StoppingCriteria(grade=lambda graph: graph.atomic_numbers / 4.0, max_grade=1.9)
    run, other = run_replicas(Springs(), [water, close], criteria=graded, **options)
    assert (run.stopped, other.stopped) == ("extrapolation", "atoms too close")
    assert run.detail == "atom O0 has an extrapolation grade of 2.00"


@pytest.mark.parametrize("pbc", [True, False])
def test_replicas_that_explode_stop_before_neighbours_are_searched(monkeypatch, pbc):
    """A search costs time in proportion to the distance, and the others wait for it."""
    hot, cold = (molecule("H2O", cell=[9, 9, 9], pbc=pbc) for _ in range(2))
    hot.set_momenta(np.full((3, 3), 1e12))
    searched = []
    candidates = VerletGraph._candidates
    monkeypatch.setattr(VerletGraph, "_candidates", lambda self, k: searched.append(k) or candidates(self, k))
    options = {
        "ensemble": "nve",
        "temperature": 0,
        "timestep": 0.5,
        "steps": 4,
        "every": 1,
        "thermalize": False,
    }
    lost, fine = run_replicas(Springs(stiffness=0.01), [hot, cold], criteria=OFF, **options)
    assert (lost.stopped, lost.detail) == ("not finite", "an atom moved further than the cutoff in one step")
    assert fine.stopped is None
    assert searched == [0, 1]
    hot.positions[0] += 1e12
    with pytest.raises(StructureError, match="from the origin"):
        run_replicas(Springs(), [hot], **options)


def test_mobile_ions_may_hop_and_bonds_reach_across_cells():
    crystal = Atoms(
        "LiOC", [[1.9, 0, 0], [3.8, 0, 0], [0.2, 0, 0]], cell=[4, 9, 9], pbc=True
    )  # O-C across the face
    crystal.set_momenta([[0, 40.0, 0], [0, 0, 0], [0, 0, 0]])
    options = {"ensemble": "nve", "temperature": 300, "timestep": 0.5, "steps": 40, "thermalize": False}
    springs = Springs(stiffness=1e-6)
    springs.species = (3, 6, 8)
    held = StoppingCriteria(heat=None, contact=None)
    assert run_replicas(springs, [crystal], criteria=held, **options)[0].stopped is None
    strict = StoppingCriteria(heat=None, contact=None, mobile=())
    assert run_replicas(springs, [crystal], criteria=strict, **options)[0].stopped == "bond broken"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"ensemble": "npt"}, DynamicsError, "choose one of nve, nvt"),
        ({"steps": 0}, DynamicsError, "at least 1"),
        ({"timestep": -1.0}, DynamicsError, "impossible"),
        ({"temperature": np.nan}, DynamicsError, "finite"),
        ({"temperature": [1.0, 2.0]}, DynamicsError, "2 temperatures were given for 1 structures"),
        ({"structures": []}, FramesError, "no frames"),
        ({"structures": [Atoms()]}, StructureError, "no atoms"),
        ({"structures": [Atoms("Au")]}, FramesError, "Au"),
        ({"structures": [Atoms("H2", constraint=FixAtoms([0]))]}, StructureError, "constraints"),
    ],
)
def test_impossible_requests_are_refused(change, error, message):
    options = {
        "structures": [molecule("H2O")],
        "ensemble": "nve",
        "temperature": 1.0,
        "timestep": 1.0,
        "steps": 1,
    }
    options |= change
    with pytest.raises(error, match=message):
        run_replicas(Springs(), options.pop("structures"), **options)


def test_a_calculator_or_a_force_field_says_what_its_potential_cannot(tmp_path):
    """Whose embeddings are used: by name, from the calculator where the structures say nothing."""
    base = random_force_field("painn")
    pair = [stranger(base, name, "H2O", seed=seed) for seed, name in enumerate(("a", "b"))]
    options = {
        "conditioning": "per-specialist",
        "recipe": "mean",
        "allow_unrelated": True,
        "cache_dir": tmp_path,
    }
    calc = GFFMergeCalculator(pair, specialist="b", device="cpu", dtype="float64", **options)
    run = {"ensemble": "nve", "temperature": 300, "timestep": 0.5, "steps": 3, "every": 1, "criteria": OFF}
    water, field = [molecule("H2O")], calc.force_field
    expected = run_replicas(field.potential, water, specialist="b", names=field.specialist_names, **run)[
        0
    ].potential_energies
    energies = [
        run_replicas(calc, water, **run),
        run_replicas(field, water, specialist="b", **run),
        run_replicas(field, water, specialist=1, **run),
    ]
    for (same,) in energies:
        np.testing.assert_array_equal(same.potential_energies, expected)
    (other,) = run_replicas(calc, water, specialist="a", **run)
    assert not np.allclose(other.potential_energies, expected)


def test_calculators_that_cannot_be_batched_are_refused():
    run = {"ensemble": "nve", "temperature": 300, "timestep": 0.5, "steps": 3}
    with pytest.raises(DynamicsError, match="EMT is not evaluated in batches; give a GFFMergeCalculator"):
        run_replicas(EMT(), [molecule("H2O")], **run)
    calc = GFFMergeCalculator(random_force_field("painn"), device="cpu")
    calc.parameters["dispersion"] = "d3bj:pbe"
    with pytest.raises(DynamicsError, match=r"adds dispersion.*calc\.force_field"):
        run_replicas(calc, [molecule("H2O")], **run)
