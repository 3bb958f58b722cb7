"""Dynamics of several models side by side: short runs of tiny potentials, and one of bundled specialists."""

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms, units
from ase.build import bulk, molecule

from ase_gffmerge.dynamics.trajectory import Trajectory, load_trajectories, save_trajectories
from ase_gffmerge.errors import DynamicsError, FramesError, StructureError
from ase_gffmerge.evaluation.md import runs as md_runs
from ase_gffmerge.evaluation.md.evaluate import MDEvaluation, evaluate_dynamics, starting_structures
from ase_gffmerge.evaluation.md.observables import (
    distribution_range,
    frames_distributions,
    mean_diffusion,
    observe,
)
from ase_gffmerge.evaluation.md.report import dynamics_table, plot_dynamics
from ase_gffmerge.evaluation.md.runs import Contestant, Protocol, estimated_seconds, run_models
from ase_gffmerge.forcefield.force_field import ForceField, bundled_test_frames
from ase_gffmerge.inference.errors import evaluate
from ase_gffmerge.models import Potential, build_potential

HYPER = {
    "painn": {"channels": 8, "n_blocks": 1, "n_radial": 4, "cutoff": 4.0},
    "nequip": {
        "channels": 4,
        "n_blocks": 1,
        "n_radial": 4,
        "cutoff": 4.0,
        "l_max": 1,
        "radial_hidden": 8,
    },
}
SHORT = Protocol(picoseconds=0.05, seeds=2, temperature=50.0)


def tiny(architecture: str, species: tuple[int, ...] = (1, 6, 8), seed: int = 0) -> Potential:
    """Random, with forces too weak to break anything in a short run."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        potential = build_potential(architecture, HYPER[architecture], species).eval().requires_grad_(False)
    for parameter in potential.readout.parameters():
        parameter.mul_(0.1)
    return potential


def contestant(label: str, architecture: str = "painn", *, seed: int = 0, **options: object) -> Contestant:
    potential = tiny(architecture, seed=seed, **options)  # type: ignore[arg-type]
    return Contestant(label=label, force_field=ForceField(name=label, potential=potential))


def frames(n: int = 6) -> list[Atoms]:
    rng = np.random.default_rng(0)
    found = []
    for _ in range(n):
        atoms = molecule("CH3OH")
        atoms.rattle(0.05, rng=rng)
        found.append(atoms)
    return found


# -- a trajectory with known answers --


def oscillating(
    *,
    stop: dict[str, Any] | None = None,
    n_frames: int = 501,
    wavenumber: float = 1500.0,
    interval: float = 2.0,
) -> Trajectory:
    """N2 that vibrates harmonically at constant energy; ``interval`` in fs."""
    times = interval * np.arange(n_frames)
    omega = 2 * np.pi * 100 * units._c * wavenumber * 1e-15
    stretch = 0.1 * np.cos(omega * times)
    positions, velocities = np.zeros((n_frames, 2, 3)), np.zeros((n_frames, 2, 3))
    positions[:, 1, 0] = 1.1 + stretch
    velocities[:, 1, 0] = np.gradient(stretch)
    velocities[:, 0, 0] = -velocities[:, 1, 0]
    kinetic = 7.0 * np.square(velocities).sum(axis=(1, 2))
    start = Atoms("N2", masses=[14.0, 14.0])
    return Trajectory(
        start=start,
        ensemble="nve",
        timestep=interval,
        steps=n_frames - 1,
        target_temperature=150.0,
        positions=positions,
        momenta=14.0 * velocities,
        forces=np.zeros_like(positions),
        times=times,
        potential_energies=-10 + 4e-6 * times - kinetic,
        kinetic_energies=kinetic,
        temperatures=np.linspace(100.0, 200.0, n_frames),
        **(stop or {}),
    )


def test_what_is_read_from_known_trajectories() -> None:
    protocol = Protocol(picoseconds=2.0, seeds=2, equilibration=0.5)
    broken = oscillating(
        n_frames=100, stop={"stopped": "bond broken", "detail": "N0 and N1", "stopped_at": 199.0}
    )
    nvt = [oscillating(n_frames=1001), broken]
    nve = [
        oscillating(),
        replace(oscillating(), potential_energies=np.zeros(501), kinetic_energies=np.full(501, 3.0)),
        broken,
    ]
    found = observe("model", nvt, nve, protocol=protocol, r_max=2.0)
    assert found.stability_times == [2.0, 0.199]
    assert found.temperature == pytest.approx(175.0)  # the second half of the first run
    assert found.drifts == pytest.approx([0.002, 0.0])
    kinetic = 14 * np.square(nvt[0].velocities[501:, 0, 0]).mean()
    assert found.potential_energy == pytest.approx(-10 + 0.004 * 1.5 - kinetic, abs=1e-3)
    assert found.spectrum is not None
    assert found.spectrum.resolution == pytest.approx(66.7, abs=0.1)  # half of 1 ps
    peak = found.spectrum.wavenumbers[np.argmax(found.spectrum.density)]
    assert peak == pytest.approx(1500, abs=found.spectrum.resolution / 4)
    assert found.spectral_noise == pytest.approx(1)
    h = found.distributions["h"]
    assert h.values @ np.diff(h.edges) == pytest.approx(1)
    assert h.edges[:-1][h.values > 0].min() == pytest.approx(1.0)
    summary = found.to_dict()
    assert (summary["held"], summary["nve_held"]) == (1, 2)
    assert summary["stopped"] == [None, "bond broken: N0 and N1"]
    assert summary["nve_drift_mean_absolute"] == pytest.approx(0.001)
    assert "diffusion" not in summary


def test_models_that_break_at_once_have_no_observables() -> None:
    empty = oscillating(n_frames=10, stop={"stopped": "too hot", "detail": "9000 K", "stopped_at": 20.0})
    found = observe("model", [empty], [empty], protocol=Protocol(picoseconds=2.0), r_max=2.0)
    assert found.distributions == {}
    assert (found.spectrum, found.spectral_noise, found.temperature, found.drifts) == (None, None, None, ())
    assert found.to_dict()["nve_drift_mean_absolute"] is None


def test_diffusion_of_the_mobile_element_in_a_crystal() -> None:
    """Li walks at random, S stays; the drift of both together is removed."""
    rng = np.random.default_rng(0)
    atoms = bulk("LiS", "rocksalt", a=5.0) * 3
    n_frames, interval, spread = 200, 0.03, 0.02
    li = atoms.numbers == 3
    positions = np.repeat(atoms.positions[None], n_frames, axis=0)
    positions[:, li] += spread * rng.standard_normal((n_frames, li.sum(), 3)).cumsum(axis=0)
    positions += 0.05 * np.arange(n_frames)[:, None, None]
    run = replace(
        oscillating(),
        start=atoms,
        positions=positions,
        momenta=np.zeros_like(positions),
        times=1000 * interval * np.arange(n_frames),
        temperatures=np.full(n_frames, 500.0),
        potential_energies=np.zeros(n_frames),
        kinetic_energies=np.zeros(n_frames),
    )
    protocol = Protocol(picoseconds=6.0, equilibration=0.0)
    found = observe("model", [run, run], [oscillating()], protocol=protocol, r_max=6.0)
    assert list(found.diffusion) == ["Li"]
    assert list(found.distributions) == ["Li-Li", "Li-S", "S-S"]
    value, error = mean_diffusion(found.diffusion["Li"])
    single = found.diffusion["Li"][0]
    assert value == pytest.approx(spread**2 / (2 * interval), rel=0.25)
    assert value == single.coefficient
    assert error == pytest.approx(single.standard_error / np.sqrt(2))
    assert found.to_dict()["diffusion"]["Li"]["n_runs"] == 2


# -- protocol and starting structures --


def test_protocol() -> None:
    protocol = Protocol()
    assert (protocol.steps("nvt"), protocol.steps("nve")) == (20_000, 10_000)
    assert (protocol.every("nvt"), protocol.every("nve")) == (20, 4)
    assert protocol.length("nve") == 5.0
    assert Protocol(timestep=3.0).every("nve") == 1


@pytest.mark.parametrize(
    ("changes", "pattern"),
    [
        ({"seeds": 0}, "at least 1"),
        ({"temperature": 0.0}, "must be positive"),
        ({"timestep": np.nan}, "must be positive"),
        ({"picoseconds": -1.0}, "must be positive"),
        ({"picoseconds": 0.01}, "too short to measure anything; give at least 0.04 ps"),
    ],
)
def test_impossible_protocols(changes: dict, pattern: str) -> None:
    with pytest.raises(DynamicsError, match=pattern):
        Protocol(**changes)


def test_the_shortest_time_in_the_message_is_accepted() -> None:
    assert Protocol(picoseconds=0.04).steps("nve") == 40


def test_starting_structures_are_spread_over_the_frames() -> None:
    several = frames(6)
    found = starting_structures([*several, molecule("H2O")], 3)
    for atoms, index in zip(found, (0, 2, 4), strict=True):
        np.testing.assert_array_equal(atoms.positions, several[index].positions)
    repeated = starting_structures(several[:2], 5)
    assert [bool(np.array_equal(a.positions, several[0].positions)) for a in repeated] == [
        True, False, True, False, True,
    ]  # fmt: skip


# -- trajectories on disk --


def test_trajectories_come_back_bit_for_bit(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "batch.npz"
    batch = [
        oscillating(n_frames=5),
        oscillating(stop={"stopped": "too hot", "detail": "1 K", "stopped_at": 3.0}),
    ]
    save_trajectories(batch, path)
    starts = [run.start for run in batch]
    again = load_trajectories(path, starts)
    assert again is not None
    for first, second in zip(batch, again, strict=True):
        for field in fields(Trajectory)[1:]:
            np.testing.assert_array_equal(getattr(first, field.name), getattr(second, field.name))
        assert second.start == first.start
        assert (type(second.detail), type(second.steps)) == (str, int)
    assert [run.complete for run in again] == [True, False]
    path.write_bytes(path.read_bytes()[:300])
    assert load_trajectories(path, starts) is None
    assert load_trajectories(tmp_path / "missing.npz", starts) is None


def test_finished_batches_are_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    real = md_runs.run_replicas

    def counted(*arguments: object, **options: object) -> object:
        calls.append(str(options["ensemble"]))
        return real(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(md_runs, "run_replicas", counted)
    models, starts = [contestant("a"), contestant("b", seed=1)], starting_structures(frames(), 2)
    first = run_models(models, starts, SHORT, folder=tmp_path)
    assert calls == ["nvt", "nve"] * 2
    sorted(tmp_path.glob("nve-*"))[0].unlink()
    calls.clear()
    second = run_models(models, starts, SHORT, folder=tmp_path)
    assert calls == ["nve"]
    for label in ("a", "b"):
        for run, again in zip(first[label]["nve"], second[label]["nve"], strict=True):
            np.testing.assert_array_equal(run.positions, again.positions)
    calls.clear()
    run_models(models[:1], starts, replace(SHORT, equilibration=0.5), folder=tmp_path)
    assert calls == []
    run_models(models[:1], starts, replace(SHORT, temperature=60.0), folder=tmp_path)
    assert calls == ["nvt", "nve"]


# -- whole evaluations --


@pytest.mark.parametrize("architecture", ["painn", "nequip"])
def test_equal_models_do_the_same(architecture: str) -> None:
    models = [contestant("one", architecture), contestant("two", architecture)]
    told: list[float] = []
    result = evaluate_dynamics(
        models, frames(), protocol=SHORT, progress=lambda fraction, text: told.append(fraction)
    )
    assert told == sorted(told)
    assert told[-1] == pytest.approx(1)
    document = result.to_dict()
    one, two = document["models"]["one"], document["models"]["two"]
    assert one == two
    assert one["h_mae_to_first"] == 0
    assert one["vdos_overlap_with_first"] == pytest.approx(1)
    assert one["h_mae"] > 0
    assert len(one["stability_time"]) == len(one["nve_drift"]) == 2
    assert document["reference"]["n_frames"] == 6
    assert document["reference"]["h_noise"] > 0
    json.dumps(document, allow_nan=False)


def test_reference_frames_of_the_runs_themselves_have_no_error() -> None:
    """Frames of a trajectory as reference: the distances of that trajectory are matched."""
    model = contestant("one")
    protocol = replace(SHORT, equilibration=0.0)
    runs = run_models([model], starting_structures(frames(), 2), protocol)["one"]["nvt"]
    truth = [atoms for run in runs for atoms in run.frames]
    result = evaluate_dynamics([model], frames(), protocol=protocol, reference=truth)
    assert result.distribution_maes(result.models[0])["h"] == pytest.approx(0)
    measured = result.models[0].temperature
    assert measured is not None
    assert result.reference_temperatures["one"] == pytest.approx(measured, abs=0.5)
    assert result.to_dict()["models"]["one"]["h_mae"] == pytest.approx(0)


def test_crystals_have_radial_distributions(tmp_path: Path) -> None:
    atoms = bulk("LiH", "rocksalt", a=4.08, cubic=True)
    atoms.rattle(0.02, seed=0)
    model = contestant("crystal", species=(1, 3))
    result = evaluate_dynamics([model], [atoms], protocol=replace(SHORT, seeds=1, picoseconds=0.04))
    summary = result.to_dict()["models"]["crystal"]
    assert set(summary["rdf_mae"]) == {"H-H", "H-Li", "Li-Li"}
    assert summary["vdos_overlap_of_halves"] is None
    assert result.to_dict()["reference"] == {"n_frames": 1}
    assert any(row[0] == "g(r) MAE H-Li (Å)" for row in dynamics_table(result).rows)
    assert plot_dynamics(result, tmp_path / "md.png").read_bytes().startswith(b"\x89PNG")


def test_frames_that_cannot_be_used() -> None:
    with pytest.raises(FramesError, match="no frames to start from"):
        evaluate_dynamics([contestant("one")], [], protocol=SHORT)
    with pytest.raises(StructureError, match="contains N"):
        evaluate_dynamics([contestant("one")], [molecule("NH3")], protocol=SHORT)
    with pytest.raises(FramesError, match="no reference frame holds the atoms"):
        evaluate_dynamics([contestant("one")], frames(), protocol=SHORT, reference=[molecule("H2O")])


def test_range_and_distributions_of_frames() -> None:
    several = frames()
    r_max = distribution_range(several)
    assert r_max == np.ceil(max(a.get_all_distances().max() for a in several) + 1)
    assert frames_distributions([Atoms("Ar")], r_max=1.0) == {}


def test_estimated_seconds_grow_with_the_work() -> None:
    starts = starting_structures(frames(), 1)
    one, many = (estimated_seconds([contestant("a")] * n, starts, SHORT) for n in (1, 5))
    assert 0 < one < many


@pytest.fixture(scope="module")
def ethanol() -> MDEvaluation:
    """Both bundled specialists on ethanol, 0.06 ps."""
    labelled = bundled_test_frames("rmd17-ethanol")
    models = [
        Contestant(label=name, force_field=ForceField.load(name))
        for name in ("rmd17-ethanol", "rmd17-malonaldehyde")
    ]
    return evaluate_dynamics(
        models,
        labelled,
        protocol=Protocol(picoseconds=0.06, seeds=2, equilibration=0.0),
        errors={m.label: evaluate(m.force_field.potential, labelled) for m in models},
    )


def test_the_own_specialist_holds_and_the_other_does_not(ethanol: MDEvaluation) -> None:
    own, other = ethanol.models
    assert all(run.complete for run in (*own.nvt, *own.nve))
    assert own.stability_times == [0.06, 0.06]
    maes = [ethanol.distribution_maes(model).get("h", np.inf) for model in (own, other)]
    assert maes[0] < maes[1]
    for run in own.nve:
        spread = np.abs(run.total_energies - run.total_energies[0]).max() / 9
        assert spread < 0.002


def test_table(ethanol: MDEvaluation) -> None:
    shown = dynamics_table(ethanol)
    assert [c.heading for c in shown.columns] == ["C2H6O", "rmd17-ethanol", "rmd17-malonaldehyde"]
    table = {row[0]: list(row[1:]) for row in shown.rows}
    assert float(table["force MAE (meV/Å)"][0]) == pytest.approx(
        1000 * ethanol.errors["rmd17-ethanol"].force_mae, abs=0.06
    )
    assert table["seeds that held"][0] == "2 of 2"
    assert table["stable time of seeds, mean (ps)"][0] == "0.06"
    assert "2 seeds, NVT 0.06 ps and NVE 0.03 ps at 500 K" in shown.footnotes[0]
    broken = replace(ethanol.models[0].nvt[0], stopped="too hot: 9 K")
    model = replace(ethanol.models[0], nvt=(broken,), nve=(), spectrum=None, drifts=(), distributions={})
    worse = replace(ethanol, models=(model,), errors={})
    assert "stopped: rmd17-ethanol: too hot: 9 K" in dynamics_table(worse).footnotes[0]
    assert [row[1] for row in dynamics_table(worse).rows][-3:] == ["-", "-", "-"]


def test_plot(ethanol: MDEvaluation, tmp_path: Path) -> None:
    assert plot_dynamics(ethanol, tmp_path / "md.png").stat().st_size > 20_000
