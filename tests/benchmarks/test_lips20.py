"""The benchmark of crystals on tiny ones with made-up forces: it runs through, and its virial check sees a wrong sign."""

import json
import sys
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from ase import Atoms, units
from ase.calculators.morse import MorsePotential
from ase.calculators.singlepoint import SinglePointCalculator
from ase.md import thermalize_momenta
from ase.md.velocitydistribution import Stationary

from ase_gffmerge import merge
from ase_gffmerge.data.readers import read_frames
from ase_gffmerge.forcefield.force_field import ForceField
from ase_gffmerge.inference.predict import predict_frames
from ase_gffmerge.models import build_potential

UNIT = {"Li7P3S11": "Li2PS3", "Li4P2S6": "Li2PS2", "beta-Li3PS4": "Li3PS2", "gamma-Li3PS4": "Li3PS4"}
N_FRAMES = 24
TINY = {"channels": 8, "n_blocks": 2, "n_radial": 6, "cutoff": 3.5}


def morse() -> MorsePotential:
    return MorsePotential(epsilon=0.5, r0=2.4, rho0=4.0, rcut1=3.0, rcut2=3.4)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """LiPS20's layout with cells of a few atoms, labelled by a Morse potential."""
    folder = tmp_path_factory.mktemp("lips20")
    for seed, (system, formula) in enumerate(UNIT.items()):
        rng = np.random.default_rng(seed)
        grid = np.array([[i, j, k] for i in range(2) for j in range(2) for k in range(2)], dtype=float)
        atoms = Atoms(formula, cell=[5.0, 5.1, 5.2], pbc=True)
        start = 2.5 * grid[: len(atoms)]
        frames = []
        for _ in range(N_FRAMES):
            atoms.positions = start + 0.15 * rng.standard_normal(start.shape)
            atoms.calc = morse()
            stress = atoms.get_stress(voigt=False)
            frames.append(
                (
                    atoms.positions.copy(),
                    atoms.get_potential_energy(),
                    atoms.get_forces(),
                    -stress * atoms.get_volume(),
                )
            )
        coords, energies, forces, virials = (np.array(column) for column in zip(*frames))
        np.savez(
            folder / f"{system}.npz",
            nuclear_charges=atoms.numbers.astype(np.uint8),
            cell=atoms.cell.array,
            coords=coords,
            energies=energies,
            forces=forces,
            virials=virials,
        )
    return folder


@pytest.fixture
def benchmark(script, monkeypatch):
    module = script("benchmark_lips20")
    tiny = replace(
        module.SMALL,
        hyper=TINY,
        frames=12,
        base_epochs=1,
        epochs=1,
        n_blocks=4,
        gap=1,
        n_test=4,
        n_calibration=6,
        steps=10,
    )
    monkeypatch.setattr(module, "SMALL", tiny)
    narrow = {"preset": "closed-form", "readout": {"width": 16, "copies": 1}}
    monkeypatch.setattr(module, "merge", partial(merge, recipe=narrow))
    return module


@pytest.mark.filterwarnings("ignore::ase_gffmerge.errors.MergeWarning")
def test_everything_is_measured(benchmark, data, monkeypatch, capsys, tmp_path) -> None:
    arguments = [data, "--out", tmp_path, "--small", "--methods", "mean", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["benchmark", *map(str, arguments), "--json"])
    benchmark.main()
    result = json.loads(capsys.readouterr().out)
    assert set(result["virials"]) == set(UNIT)
    errors = result["table"]["methods"]
    assert list(errors) == ["specialist", "beta-Li3PS4 alone", "gamma-Li3PS4 alone", "mean"]
    for name in benchmark.SYSTEMS:
        assert errors["specialist"][name] == errors[f"{name} alone"][name]
        assert errors["mean"][name]["stress_mae"] > 0
        specialist = ForceField.load(tmp_path / f"{name}.safetensors")
        assert specialist.provenance.lineage == (
            ForceField.load(tmp_path / "lips20-base.safetensors").fingerprint,
        )
        for model in ("specialist", "merged"):
            assert result["dynamics"][name]["600 K"][model]["mean_temperature"] > 0
    assert result["table"]["phases"]["readout"] > 0

    monkeypatch.setattr(sys, "argv", ["benchmark", *map(str, arguments), "--stage", "table"])
    benchmark.main()
    table = capsys.readouterr().out
    assert f"{1000 * errors['mean']['gamma-Li3PS4']['force_mae']:.4g}" in table


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore::ase_gffmerge.errors.MergeWarning")
def test_the_papers_table_has_a_row_for_every_start_and_method(script, data, monkeypatch, capsys, tmp_path):
    module = script("paper_table")
    hyper = {"channels": 4, "edge_channels": 4, "width": 4, "n_blocks": 1, "cutoff": 3.5}
    tiny = {
        "frames": 14,
        "base_epochs": 1,
        "epochs": 1,
        "n_blocks": 4,
        "gap": 1,
        "n_test": 2,
        "n_calibration": 4,
        "fine_steps": 4,
        "fine_tests": 1,
        "fine_rates": (1e-3, 1e-2),
    }
    size = replace(module.SMALL, hyper={**hyper, "three_body_cutoff": 3.0}, **tiny)
    monkeypatch.setattr(module, "SMALL", size)
    monkeypatch.setattr(module, "STARTS", ("mean", "base"))
    arguments = [data, "--out", tmp_path, "--methods", "mean", "paper", "--labels", "1", "3"]
    for _ in range(2):  # the second time from what is kept
        monkeypatch.setattr(sys, "argv", ["paper_table", *map(str, arguments), "--json"])
        module.main()
        result = json.loads(capsys.readouterr().out)
    starts = ["base", "paper, switched", "specialist", "beta-Li3PS4 alone", "gamma-Li3PS4 alone"]
    assert list(result["methods"]) == [*starts, "mean", "paper"]
    assert result["methods"]["paper"] != result["methods"]["paper, switched"]
    assert 0 < result["distances"]["gamma-Li3PS4"]["stages.1"] < 1
    assert [row["steps"] for row in result["fine-tuning"]["mean"]["3"]] == [0, 6]
    assert len({curve["3"][0]["force_mae"] for curve in result["fine-tuning"].values()}) == 2
    assert (tmp_path / "finetuning.png").stat().st_size > 10_000
    monkeypatch.setattr(sys, "argv", ["paper_table", *map(str, arguments)])
    module.main()
    error = 1000 * result["methods"]["mean"]["gamma-Li3PS4"]["force_mae"]
    assert f"{error:.4g}" in capsys.readouterr().out


def test_test_frames_are_far_from_training_frames_in_time(benchmark, data, tmp_path) -> None:
    benchmark.make_frames(data, tmp_path, benchmark.SMALL)
    everything = read_frames(data / "beta-Li3PS4.npz")

    def times(part: str) -> np.ndarray:
        frames = read_frames(benchmark.frame_file(tmp_path, "beta-Li3PS4", part))
        distances = [[np.abs(a.positions - b.positions).max() for b in everything] for a in frames]
        return np.argmin(distances, axis=1)

    gaps = np.abs(times("train")[:, None] - times("test")[None])
    assert gaps.min() > benchmark.SMALL.gap


def numerical_stress(potential, atoms: Atoms) -> np.ndarray:
    """Stress (6,) in eV/Å^3 by central differences of the energy."""
    stress = []
    for a, b in ((0, 0), (1, 1), (2, 2), (1, 2), (0, 2), (0, 1)):
        energies = []
        for size in (1e-4, -1e-4):
            strained, strain = atoms.copy(), np.eye(3)
            strain[a, b] += 0.5 * size
            strain[b, a] += 0.5 * size
            strained.set_cell(atoms.cell.array @ strain, scale_atoms=True)
            energies.append(predict_frames(potential, [strained]).energies[0])
        stress.append((energies[0] - energies[1]) / (2e-4 * atoms.get_volume()))
    return np.array(stress)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_virial_check_sees_the_sign(script, data, sign) -> None:
    """Labels by finite differences of the potential itself, as they are and with the sign turned."""
    accuracy = script("stress_accuracy")
    torch.manual_seed(0)
    potential = build_potential("painn", TINY, (3, 15, 16)).double().requires_grad_(False)
    frames = read_frames(data / "beta-Li3PS4.npz", index=":5")
    for atoms in frames:
        atoms.calc.results["stress"] = sign * numerical_stress(potential, atoms)
    for check in accuracy.virial_check(potential, frames).values():
        assert check["slope"] == pytest.approx(sign, rel=1e-4)
        assert check["correlation"] == pytest.approx(sign, rel=1e-4)
        assert (check["residual"] < 1e-3) == (sign > 0)
        assert check["mean_label"] == pytest.approx(sign * check["mean_model"], rel=1e-4)
    error = accuracy.stress_mae(potential, frames)
    size = np.mean([np.abs(atoms.get_stress(voigt=False)).mean() for atoms in frames])
    assert error == pytest.approx(0.0 if sign > 0 else 2 * size, rel=1e-4, abs=1e-4 * size)


@pytest.mark.parametrize("kinetic_part", [0.0, 1.0])
def test_kinetic_check_finds_the_momenta_in_the_labels(script, kinetic_part) -> None:
    """Free flight in a cell, thinned out at random; labels with and without the momenta's part."""
    accuracy = script("stress_accuracy")
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    potential = build_potential("painn", TINY, (3, 15, 16)).double().requires_grad_(False)
    atoms = Atoms("Li4P2S6", rng.random((12, 3)) * 30, cell=30 * np.eye(3), pbc=True)
    frames, timestep = [], 0.5
    for _ in range(60):
        thermalize_momenta(atoms, 1000, rng=rng)
        Stationary(atoms)
        velocities = atoms.get_velocities()
        kinetic = np.einsum("i,ia,ib->ab", atoms.get_masses(), velocities, velocities)
        frame = atoms.copy()
        derivative = accuracy.strain_derivatives(potential, [frame])[0] - kinetic_part * kinetic
        derivative += 0.05 * rng.standard_normal((3, 3))
        stress = derivative[[0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1]] / frame.get_volume()
        frame.calc = SinglePointCalculator(frame, stress=stress)
        frames.append(frame)
        atoms.positions += rng.choice([1, 2, 3], p=[0.4, 0.3, 0.3]) * timestep * units.fs * velocities
    check = accuracy.kinetic_check(potential, frames, timestep=timestep, n=60)
    assert check["temperature"]["mean"] == pytest.approx(1000, rel=0.2)
    for name in ("diagonal", "off_diagonal"):
        assert check[name]["slope"] == pytest.approx(-kinetic_part, abs=0.1)
