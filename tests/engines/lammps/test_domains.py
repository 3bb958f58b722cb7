"""One structure cut into domains that exchange features in one process: the ML-IAP object without LAMMPS."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

from ase_gffmerge.engines.lammps.mliap import MLIAPModel, write_model
from ase_gffmerge.errors import ArgumentError, StructureError
from ase_gffmerge.forcefield.provenance import MergeRecord
from ase_gffmerge.graphs import build_graph
from ase_gffmerge.inference.predict import grades
from helpers.lammps_domains import (
    BOX,
    FOUR,
    FakeData,
    assert_cut_into_domains,
    assert_same,
    crowd,
    domains,
    evaluate,
    toy_with_everything,
)

OF_ONE_CUTOFF = ("painn", "nequip", "escaip", "m3gnet", "mattersim", "tensornet")
CASES = [
    ("painn", [0, 11]),
    ("painn", [0, 5, 11]),
    *((a, FOUR) for a in ("painn", "nequip", "escaip", "chgnet")),
]


@pytest.mark.parametrize(("architecture", "bounds"), CASES)
def test_domains_give_what_the_structure_gives(architecture, bounds):
    assert_cut_into_domains(toy_with_everything(architecture), bounds)


def test_grades_of_a_domain():
    model, atoms = MLIAPModel(toy_with_everything("painn")), crowd(BOX, 24)
    data = domains(model, atoms, [0, 11])[0]
    expected = grades(model.force_field, build_graph(atoms, model.force_field.cutoff))
    np.testing.assert_allclose(
        model.grades(data, model.predict(data)), expected[data.atoms[: data.nlocal]], rtol=1e-5
    )


@pytest.mark.parametrize("architecture", OF_ONE_CUTOFF)
def test_domains_without_atoms_or_edges_take_part(architecture):
    """All domains have to meet at every exchange, in both passes."""
    atoms = crowd((5.0, 5.0, 5.0), 8)
    atoms.set_cell([40.0, 5.0, 5.0])
    atoms.positions[0, 0] = 25.0  # without neighbours but its own images
    model = MLIAPModel(toy_with_everything(architecture))
    parts = domains(model, atoms, [0, 6, 12, 30, 30, 40])
    assert [data.nlocal for data in parts] == [7, 0, 1, 0, 0]
    evaluate(model, parts)
    assert_same(model, atoms, parts)
    assert len({tuple(data.calls) for data in parts}) == 1


def test_a_box_smaller_than_the_halo():
    model, atoms = MLIAPModel(toy_with_everything("painn")), crowd((3.0, 2.5, 2.5), 4, apart=1.0)
    parts = domains(model, atoms, [0, 1.5, 3.0])
    evaluate(model, parts)
    assert_same(model, atoms, parts)


def test_one_exchange_between_two_blocks_and_one_back():
    """PaiNN's first block needs none, its updates neither."""
    model, atoms = MLIAPModel(toy_with_everything("painn", n_blocks=3)), crowd(BOX, 24)
    parts = domains(model, atoms, [0, 11])
    evaluate(model, parts)
    assert parts[0].calls == ["forward"] * 2 + ["reverse"] * 2


def test_a_wide_readout_in_single_precision():
    wide = toy_with_everything("painn", readout_width=64, readout_blocks=2)
    atoms = crowd(BOX, 24, apart=1.1)
    model = MLIAPModel(wide.to(dtype=torch.float32))
    parts = domains(model, atoms, FOUR)
    evaluate(model, parts)
    assert_same(model, atoms, parts, tolerance=2e-5)


@pytest.mark.parametrize("name", ["model.pt", "model.pkl"])
def test_the_file_for_lammps_is_the_model(tmp_path, name):
    model, atoms = MLIAPModel(toy_with_everything("painn"), elements=["O", "H", "C"]), crowd(BOX, 24)
    path = write_model(model, tmp_path / name)
    again = torch.load(path, weights_only=False) if name == "model.pt" else pickle.loads(path.read_bytes())
    assert again.element_types == ["O", "H", "C"]
    assert (again.rcutfac, again.ndescriptors, again.nparams) == (2.0, 1, 1)  # half the cutoff
    parts = domains(again, atoms, [0, 11])
    evaluate(again, parts)
    assert_same(model, atoms, parts)


def test_one_embedding_per_specialist():
    record = MergeRecord(specialists=("one", "other"), fingerprints=("a", "b"), recipe={}, report={})
    conditioned = replace(toy_with_everything("painn", n_embeddings=2), merged=record)
    atoms = crowd(BOX, 24)
    with pytest.raises(StructureError, match="embedding per specialist"):
        MLIAPModel(conditioned)
    model = MLIAPModel(conditioned, specialist="other")
    parts = domains(model, atoms, [0, 11])
    evaluate(model, parts)
    atoms.arrays["specialist"] = np.ones(len(atoms), dtype=int)
    assert_same(model, atoms, parts)


class WriteOnly(FakeData):
    """The coupling without Kokkos takes energies per atom and does not give the array."""

    written = None
    eatoms = property(None, lambda self, values: setattr(self, "written", values))


def test_the_coupling_that_only_takes_energies():
    model, atoms = MLIAPModel(toy_with_everything("painn")), crowd(BOX, 24)
    data = domains(model, atoms, [0, 11])[0]
    plain = WriteOnly(**{name: getattr(data, name) for name in FakeData.__dataclass_fields__})
    evaluate(model, [data])
    evaluate(model, [plain])
    np.testing.assert_array_equal(plain.written, data.eatoms)


def test_what_cannot_be_cut_into_domains_is_refused(tmp_path, monkeypatch):
    painn = toy_with_everything("painn")
    with pytest.raises(ArgumentError, match="does not know Cu, Au"):
        MLIAPModel(painn, elements=["H", "Cu", "Au"])
    with pytest.raises(ArgumentError, match="needs atoms within 5 Å"):
        write_model(MLIAPModel(toy_with_everything("chgnet")), tmp_path / "model.pt")
    monkeypatch.setattr(type(painn.potential), "decomposition", "none")
    with pytest.raises(ArgumentError, match="not a sum over atoms"):
        MLIAPModel(painn)
