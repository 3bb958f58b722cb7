"""The bundled specialists, their test frames and their cards belong together."""

import importlib
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from ase.build import molecule
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write

from ase_gffmerge import ForceField
from ase_gffmerge.errors import FramesError
from ase_gffmerge.forcefield.force_field import BUNDLED, bundled_path, bundled_test_frames
from ase_gffmerge.inference.errors import evaluate

ROOT = Path(__file__).parents[2]
RMD17 = [name for name in BUNDLED if name.startswith("rmd17")]
EMT_CRYSTALS = [name for name in BUNDLED if name.startswith("emt")]


@pytest.fixture
def rebuild(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "md_examples" / "benchmarks")
    return importlib.import_module("rebuild_bundled")


@pytest.mark.parametrize("name", RMD17)
def test_specialist_and_test_frames(name: str) -> None:
    specialist, frames = ForceField.load(name), bundled_test_frames(name)
    assert specialist.name == name
    assert specialist.level_of_theory == "PBE/def2-SVP"
    assert len(frames) == 50
    assert len(specialist.calibration) == 100
    assert evaluate(specialist.potential, frames).force_mae < 0.030
    assert specialist.provenance.errors["force_mae"] < 0.030
    for frame in frames:
        same = [c for c in specialist.calibration if c.numbers.tolist() == frame.numbers.tolist()]
        assert not any(np.allclose(c.positions, frame.positions, atol=1e-6) for c in same)


@pytest.mark.parametrize("name", EMT_CRYSTALS)
def test_crystals(name: str, monkeypatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "md_examples")
    build = importlib.import_module("build_emt_crystals")
    frames = bundled_test_frames(name)
    assert bundled_path(name).with_suffix(".md").read_text(encoding="utf-8") == build.card(
        bundled_path(name), frames
    )
    errors = evaluate(ForceField.load(name).potential, frames)
    assert errors.force_mae < 0.01
    for atoms in frames:  # labels are what EMT says today
        again = atoms.copy()
        again.calc = EMT()
        np.testing.assert_allclose(again.get_forces(), atoms.get_forces(), atol=1e-6)
        np.testing.assert_allclose(again.get_stress(), atoms.get_stress(), atol=1e-6)


def test_both_descend_from_the_base() -> None:
    base = ForceField.load("rmd17-base").fingerprint
    for name in ("rmd17-ethanol", "rmd17-malonaldehyde"):
        assert ForceField.load(name).provenance.lineage == (base,)


@pytest.mark.parametrize("name", RMD17)
def test_card_is_up_to_date(name: str, rebuild: ModuleType) -> None:
    card = bundled_path(name).with_suffix(".md").read_text(encoding="utf-8")
    specialist, plan = ForceField.load(name), rebuild.PLANS[name]
    errors = evaluate(specialist.potential, bundled_test_frames(name))
    file_hash = rebuild.sha256(bundled_path(name))
    expected = rebuild.model_card(
        specialist, plan, {"the 50 bundled test frames": errors}, file_hash=file_hash
    )
    assert [line for line in expected.splitlines() if line not in card.splitlines()] == []


def test_seen_frames_of_an_older_file_are_entered(rebuild: ModuleType, monkeypatch, tmp_path: Path) -> None:
    """The frames of a finished training and its ancestor's are found again; nothing else changes; others are refused."""
    rng = np.random.default_rng(0)
    files = {}
    for name in ("H2O", "CH3OH"):
        frames = []
        for _ in range(6):
            atoms = molecule(name)
            atoms.rattle(0.05, rng=rng)
            atoms.calc = SinglePointCalculator(atoms, energy=0.0, forces=0 * atoms.positions)
            frames.append(atoms)
        files[name] = tmp_path / f"{name}.xyz"
        write(files[name], frames, format="extxyz")
    plan = rebuild.Plan(molecules=("CH3OH",), epochs=1, learning_rate=1e-3, validation=2)
    plans = {"old": plan, "child": replace(plan, molecules=("H2O",), parent="old")}
    monkeypatch.setattr(rebuild, "PLANS", plans)
    monkeypatch.setattr(rebuild, "data_file", lambda data, molecule, part: files[molecule])
    complete = {}
    for name in plans:
        rebuild.train_model(name, tmp_path, tmp_path)
        complete[name] = ForceField.load(tmp_path / f"{name}.safetensors")
    assert [len(s.provenance.seen_frames) for s in complete.values()] == [6, 12]
    for name, specialist in complete.items():
        older = replace(specialist.provenance, seen_frames=())
        replace(specialist, provenance=older).save(tmp_path / f"{name}.safetensors")
    for name, specialist in complete.items():
        rebuild.enter_seen_frames(name, tmp_path, tmp_path)
        again = ForceField.load(tmp_path / f"{name}.safetensors")
        assert again.provenance == specialist.provenance
        assert again.fingerprint == specialist.fingerprint
    monkeypatch.setattr(rebuild, "PLANS", {"old": replace(plan, seed=1)})
    with pytest.raises(SystemExit, match="other frames"):
        rebuild.enter_seen_frames("old", tmp_path, tmp_path)


def test_unknown_name() -> None:
    with pytest.raises(FramesError, match="choose one of rmd17-base"):
        bundled_test_frames("rmd17-water")
