"""The soak on a handful of steps: it runs through, resumes as if nothing had happened, and says what it missed."""

import json
import sys

import pytest
import torch

from ase_gffmerge import ForceField, GFFMergeCalculator
from ase_gffmerge.forcefield.force_field import bundled_test_frames
from ase_gffmerge.models import build_potential


@pytest.fixture
def soak(script):
    return script("benchmark_soak")


@pytest.fixture
def tiny(tmp_path) -> str:
    torch.manual_seed(0)
    potential = build_potential(
        "painn", {"cutoff": 3.0, "channels": 4, "n_blocks": 1, "n_radial": 4}, (1, 6, 8)
    )
    return str(ForceField(name="tiny", potential=potential).save(tmp_path / "tiny.safetensors"))


def run(soak, monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["soak", *map(str, arguments)])
    code = soak.main()
    return code, capsys.readouterr().out


def test_it_measures_and_resumes(soak, tiny, monkeypatch, capsys, tmp_path):
    options = ["--nve-steps", 30, "--force-field", tiny, "--json", "--out"]
    code, said = run(soak, monkeypatch, capsys, "--steps", 40, *options, tmp_path / "whole")
    found = json.loads(said)
    assert code == bool(found["missed"])
    assert set(found["missed"]) <= {"memory"}, "a process this young may still grow"
    assert found["bitwise_reproducible"]
    assert found["drift_with_skin_uev_per_atom_ps"] == found["drift_without_skin_uev_per_atom_ps"] != 0
    assert found["resident_mb"] > 50
    for steps in (20, 40, 40):
        found = json.loads(run(soak, monkeypatch, capsys, "--steps", steps, *options, tmp_path / "parts")[1])
        assert found["steps"] == steps
    assert found["sessions"] == 2
    whole, parts = (json.loads((tmp_path / name / "soak.json").read_text()) for name in ("whole", "parts"))
    for key in ("step", "positions", "momenta", "random"):
        assert whole[key] == parts[key]


def test_what_is_missed_is_named(soak):
    start = bundled_test_frames("rmd17-ethanol")[0]
    leaky = soak.Soak.begin(start)
    leaky.sessions = [
        [(100, 1000, 0.1), (200, 1000, 0.1)],
        [(300, 1000, 0.1), (400, 1020, 0.2), (500, 1011, 0.3)],
    ]
    assert leaky.growth() == pytest.approx(0.02)
    assert leaky.milliseconds() == pytest.approx((100, 300))
    result = {"memory_growth": 0.02, "largest_energy_difference_ev": 1e-6, "bitwise_reproducible": False}
    assert soak.missed(result) == ["memory", "conservation", "reproducibility"]
    assert soak.missed({**result, "memory_growth": 0.0}) == ["conservation", "reproducibility"]


def test_atoms_cross_the_cutoff(soak, tiny):
    calc = GFFMergeCalculator(tiny, device="cpu", dtype="float64")
    counts = []
    atoms = soak.crowd(bundled_test_frames("rmd17-ethanol")[0])
    for seed in range(3):
        atoms.rattle(0.1, seed=seed)
        calc.calculate(atoms)
        counts.append(calc.extras["n_edges"])
    assert len(set(counts)) > 1


def test_too_few_steps(soak, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["soak", "--steps", "5"])
    with pytest.raises(SystemExit, match="2"):
        soak.main()
    assert "at least 20" in capsys.readouterr().err
