"""The benchmark of unrelated force fields in miniature: an order of channels changes what a merge makes of them."""

import numpy as np
import pytest
from ase import units
from ase.build import molecule
from ase.calculators.emt import EMT


@pytest.fixture
def data(tmp_path):
    """Files like those of rMD17, with other molecules and the energies of effective medium theory."""
    rng = np.random.default_rng(0)
    for name, formula in (("ethanol", "CH3OH"), ("malonaldehyde", "HCOOH")):
        for part, count in (("train", 24), ("test", 4)):
            frames = [molecule(formula) for _ in range(count)]
            for atoms in frames:
                atoms.rattle(0.05, rng=rng)
                atoms.calc = EMT()
            kcal = units.kcal / units.mol
            np.savez(
                tmp_path / f"rmd17_{name}_{part}_01.npz",
                nuclear_charges=frames[0].numbers,
                coords=np.stack([atoms.positions for atoms in frames]),
                energies=np.array([atoms.get_potential_energy() for atoms in frames]) / kcal,
                forces=np.stack([atoms.get_forces() for atoms in frames]) / kcal,
            )
    return tmp_path


@pytest.mark.slow
def test_every_row_is_measured_and_kept(script, data, monkeypatch):
    module = script("benchmark_unrelated")
    size = module.Size(channels=8, n_blocks=1, n_train=20, epochs=2)
    for name in ("N_VALIDATION", "N_TEST"):
        monkeypatch.setattr(module, name, 4)
    for name in ("PLAIN", "AFTER"):
        monkeypatch.setattr(module, name, ("mean", "paper"))
    rows = module.measured(0, size, data, data / "out", [])
    assert list(rows) == [
        "specialist",
        "mean",
        "paper",
        "mean, channels in one order",
        "paper, channels in one order",
    ]
    assert all(error > 0 for errors in rows.values() for error in errors)
    assert rows["mean"] != rows["mean, channels in one order"]
    assert module.measured(0, size, data, data / "out", []) == rows
    assert "| mean |" in module.table({name: [errors] for name, errors in rows.items()})
