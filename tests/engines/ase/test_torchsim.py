"""The force field as a model of TorchSim: what the calculator says, for any batch."""

import importlib
import sys
from functools import partial

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk

from ase_gffmerge import GFFMergeCalculator
from ase_gffmerge.errors import StructureError
from ase_gffmerge.models.painn import InferenceMessage
from helpers.structures import cluster, crystal, everything
from helpers.toys import random_force_field


def test_without_torchsim(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_sim", None)
    monkeypatch.setitem(sys.modules, "torch_sim.models.interface", None)
    monkeypatch.delitem(sys.modules, "ase_gffmerge.engines.torchsim", raising=False)
    with pytest.raises(ImportError, match="pip install torch-sim-atomistic"):
        importlib.import_module("ase_gffmerge.engines.torchsim")


@pytest.fixture
def torch_sim():
    """TorchSim, whose import warns of what else is not installed."""
    return pytest.importorskip("torch_sim", reason="torch-sim-atomistic is not installed")


@pytest.fixture
def make(torch_sim):
    from ase_gffmerge.engines.torchsim import TorchSimModel

    return TorchSimModel


def state(torch_sim, structures, dtype=torch.float64):
    return torch_sim.io.atoms_to_state(structures, torch.device("cpu"), dtype)


def crystals() -> list[Atoms]:
    small, large = crystal(), crystal() * (2, 1, 2)
    large.rattle(0.1, seed=9)
    large.positions += 40.0
    return [small, large, small.copy()]


@pytest.mark.parametrize("structures", [[cluster()], crystals()], ids=["molecule", "crystals"])
def test_as_the_calculator(torch_sim, make, calc, structures):
    found = make(calc.force_field)(state(torch_sim, structures))
    expected = [everything(atoms, calc) for atoms in structures]
    np.testing.assert_allclose(found["energy"], [r["energy"] for r in expected], rtol=1e-12)
    np.testing.assert_allclose(found["forces"], np.concatenate([r["forces"] for r in expected]), atol=1e-12)
    if "stress" in expected[0]:
        rows = found["stress"][:, [0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1]]
        np.testing.assert_allclose(rows, [r["stress"] for r in expected], atol=1e-14)
    else:
        assert found["stress"].isnan().all()


def test_the_served_network_evaluates(torch_sim, make, monkeypatch):
    monkeypatch.setattr(InferenceMessage, "forward", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make(random_force_field("painn"))(state(torch_sim, [cluster()]))


def test_torchsims_own_checks(torch_sim, make):
    from torch_sim.models.interface import validate_model_outputs

    toy = random_force_field("painn")
    numbers = {12: 13, 14: 13, 26: 29}  # TorchSim looks at magnesium, silicon and iron
    rows = toy.potential.species_row
    for theirs, ours in numbers.items():
        rows[theirs] = rows[ours]
    toy.potential.species += tuple(numbers)
    model = make(toy)
    validate_model_outputs(model, model.device, model.dtype)


def test_moving_systems_and_systems_that_leave(torch_sim, make, calc, rng):
    """Neighbour lists are reused, and nothing of it is seen."""
    model, structures = make(calc.force_field), crystals()
    for step in range(6):
        for atoms in structures:
            atoms.positions += 0.15 * rng.standard_normal(atoms.positions.shape)
            atoms.set_cell(atoms.cell.array * (1 + 0.01 * step), scale_atoms=True)
        if step == 3:
            structures.pop(0)
        found, fresh = (m(state(torch_sim, structures)) for m in (model, make(calc.force_field)))
        assert all(torch.equal(found[name], fresh[name]) for name in fresh)


def test_dynamics_conserves_energy(torch_sim, make, calc):
    energies = []
    structures, model = [atoms * (2, 1, 1) for atoms in crystals()[::2]], make(calc.force_field)
    kT, dt = (torch.tensor(value, dtype=torch.float64) for value in (0.025, 0.01))
    start, nve = state(torch_sim, structures), torch_sim.integrators.nve
    if callable(nve):  # TorchSim 0.3, the last one for Python 3.11
        init, step = nve(model=model, kT=kT, dt=dt)
        moving = init(start, seed=1)
    else:
        start.rng = 1
        moving, step = nve.nve_init(start, model, kT=kT), partial(nve.nve_step, model=model, dt=dt)
    for _ in range(40):
        moving = step(moving)
        kinetic = (moving.momenta.square().sum(dim=1) / (2 * moving.masses)).split([4, 4])
        energies.append(moving.energy + torch.stack([part.sum() for part in kinetic]))
    assert float(torch.stack(energies).std(dim=0).max()) < 1e-4
    assert float((moving.positions - state(torch_sim, structures).positions).abs().max()) > 0.02


def test_single_precision_states(torch_sim, make, calc):
    double = make(calc.force_field)(state(torch_sim, crystals()))
    single = make(calc.force_field)(state(torch_sim, crystals(), torch.float32))
    assert {values.dtype for values in single.values()} == {torch.float32}
    np.testing.assert_allclose(single["forces"], double["forces"], atol=1e-4)


def test_specialists(torch_sim, make, conditioned):
    calc = GFFMergeCalculator(conditioned, dtype="float64", device="cpu", specialist="methanol")
    found = make(calc.force_field, specialist="methanol")(state(torch_sim, [cluster()]))
    reference = everything(cluster(), calc)
    assert float(found["energy"]) == pytest.approx(reference["energy"], rel=1e-12)
    np.testing.assert_allclose(found["extrapolation"], calc.extras["extrapolation"], rtol=1e-6)
    with pytest.raises(StructureError, match="nothing says which"):
        make(conditioned)(state(torch_sim, [cluster()]))


def test_unknown_elements(torch_sim, make, calc):
    with pytest.raises(StructureError, match="contains Si, which 'toy' does not know"):
        make(calc.force_field)(state(torch_sim, [bulk("Si")]))
