"""The benchmark of the mixed dimer on a handful of frames: it runs through, resumes, and measures what it says."""

import json
import sys

import numpy as np
import pytest
from ase.calculators.singlepoint import SinglePointCalculator

from ase_gffmerge.data.readers import read_frames
from ase_gffmerge.forcefield.force_field import ForceField, bundled_test_frames


@pytest.fixture
def benchmark(script, monkeypatch):
    module = script("benchmark_mixed_dimer")
    tiny = module.Size(
        base_frames=4,
        frames=8,
        test_frames=3,
        interval=4,
        dimer_interval=4,
        equilibration=4,
        orientations=2,
        dimer_frames=2,
        hyper={"channels": 4, "n_blocks": 2, "n_radial": 4, "cutoff": 3.0},
        base_epochs=1,
        epochs=1,
        validation=1,
    )
    monkeypatch.setattr(module, "FULL", tiny)
    return module


def run(module, monkeypatch, capsys, *arguments) -> str:
    monkeypatch.setattr(sys, "argv", ["benchmark", *map(str, arguments)])
    module.main()
    return capsys.readouterr().out


def test_table_of_the_mixed_dimer(benchmark, monkeypatch, capsys, tmp_path) -> None:
    """One pass makes everything; a second one takes what is there and says the same."""
    arguments = ("--out", tmp_path, "--methods", "mean", "ensemble", "--device", "cpu")
    first = json.loads(run(benchmark, monkeypatch, capsys, *arguments, "--json"))
    made = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*")}
    markdown = run(benchmark, monkeypatch, capsys, *arguments)
    assert made == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*")}

    base, *specialists = (
        ForceField.load(tmp_path / f"{name}.safetensors") for name in ("base", *benchmark.MOLECULES)
    )
    assert all(s.provenance.lineage == (base.fingerprint,) for s in specialists)
    assert all(s.level_of_theory == "GFN2-xTB" for s in (base, *specialists))
    methods = first["methods"]
    assert list(methods) == ["specialist", "ethanol alone", "malonaldehyde alone", "mean", "ensemble"]
    assert first["n_dimers"] == len(read_frames(benchmark.frame_file(tmp_path, "dimer", "test"))) > 0
    for name in ("ethanol", "malonaldehyde"):
        assert methods[f"{name} alone"]["own"][name] == methods["specialist"]["own"][name]
    for name in methods:
        dimer = methods[name]["dimer"]
        assert f"{1000 * dimer['force_mae']:.4g}" in markdown
        assert dimer["force_mae"] == pytest.approx((dimer["first_mae"] + dimer["second_mae"]) / 2)
    # without interaction, the error of what lies between the molecules is all of it
    apart, typical = methods["specialist"]["dimer"], first["typical"]
    for key in ("interaction_energy_mae", "interaction_force_mae"):
        assert apart[key] == pytest.approx(typical[key])


def test_test_frames_come_later_than_training_frames(benchmark, tmp_path) -> None:
    benchmark.make_frames(tmp_path, benchmark.FULL)
    train, test = (read_frames(benchmark.frame_file(tmp_path, "ethanol", part)) for part in ("train", "test"))
    assert (len(train), len(test)) == (benchmark.FULL.frames, benchmark.FULL.test_frames)
    for a in test:
        assert min(np.abs(a.positions - b.positions).max() for b in train) > 1e-3


def test_labels_are_those_of_the_theory(benchmark, script, tmp_path) -> None:
    """The thermostat fixes the centre of mass meanwhile, which must not enter the forces."""
    benchmark.make_frames(tmp_path, benchmark.FULL)
    for atoms in read_frames(benchmark.frame_file(tmp_path, "ethanol", "train"), index=":3"):
        again = script("xtb_frames").labelled(atoms)
        np.testing.assert_allclose(atoms.get_forces(), again.get_forces(), atol=1e-3)


def test_docked_molecules_touch_without_overlap(script) -> None:
    xtb = script("xtb_frames")
    ethanol, malonaldehyde = (bundled_test_frames(f"rmd17-{n}")[0] for n in ("ethanol", "malonaldehyde"))
    starts = [xtb.docked(ethanol, malonaldehyde, np.random.default_rng(seed)) for seed in range(5)]
    for atoms in starts:
        gaps = atoms.get_all_distances()[: len(ethanol), len(ethanol) :]
        assert xtb.SMALLEST_GAP < gaps.min() <= xtb.HYDROGEN_BOND + 1e-10
        inside = atoms[: len(ethanol)].get_all_distances()
        np.testing.assert_allclose(inside, ethanol.get_all_distances(), atol=1e-10)
    assert np.ptp([atoms.get_all_distances()[0, -1] for atoms in starts]) > 0.5


def test_errors_of_a_dimer_are_taken_apart(script) -> None:
    """A prediction with known errors: 0.1 eV/Å on the first molecule, 0.3 more eV of interaction."""
    accuracy = script("dimer_accuracy")
    ethanol, malonaldehyde = (bundled_test_frames(f"rmd17-{n}")[:2] for n in ("ethanol", "malonaldehyde"))

    def labelled(atoms, energy, forces):
        atoms = atoms.copy()
        atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=forces)
        return atoms

    dimers = [
        labelled(
            a + b,
            a.get_potential_energy() + b.get_potential_energy() - 0.2,
            np.concatenate([a.get_forces(), b.get_forces()]),
        )
        for a, b in zip(ethanol, malonaldehyde)
    ]
    frames = accuracy.DimerFrames(dimers, ethanol, malonaldehyde)
    reference = frames.labels()
    off = frames.labels()
    for forces in (*off.dimers.forces, *off.first.forces):
        forces[: len(ethanol[0])] += 0.1
    off.dimers.energies[:] += 0.3
    errors = accuracy.dimer_errors(off, reference)
    assert errors["force_mae"] == pytest.approx(0.05)
    assert (errors["first_mae"], errors["second_mae"]) == pytest.approx((0.1, 0.0))
    assert errors["molecular_mae"] == pytest.approx(0.05)
    assert errors["interaction_force_mae"] == pytest.approx(0.0, abs=1e-12)
    assert errors["net_force_mae"] == pytest.approx(0.1 * len(ethanol[0]))
    assert errors["interaction_energy_bias"] == pytest.approx(0.3)
    assert accuracy.typical_size(reference)["interaction_energy_mae"] == pytest.approx(0.2)
