"""MatterSim of the package mattersim: the vendor's results, the vendor's files, and merges."""

import pytest
import torch
from ase.build import bulk

from ase_gffmerge import ForceField, GFFMergeCalculator
from ase_gffmerge.errors import FileFormatError
from ase_gffmerge.integrations import ADAPTERS
from ase_gffmerge.integrations.load import export, from_vendor, load_force_field
from ase_gffmerge.models import build_potential
from ase_gffmerge.testing import check_calculator, check_integration
from helpers.vendor_models import (
    Trap,
    assert_copies_merge_into,
    assert_results_are_the_vendors,
    assert_same,
    assert_the_default_beats_the_mean,
    merged_files,
    moved,
    relatives,
    solves_that_beat_paper_and_mean,
    structures,
)

pytestmark = pytest.mark.filterwarnings("ignore")

SIZES = {"units": 8, "num_blocks": 2, "cutoff": 4.0, "threebody_cutoff": 3.5, "max_z": 8}
VARIANTS = {
    "usual": {},
    "few functions": {"max_n": 2, "max_l": 3, "num_blocks": 1},
    "of the package": {"cutoff": 5.0, "threebody_cutoff": 4.0, "max_z": 94, "units": 16},
}


def build(variant: str = "usual", seed: int = 0):
    """A potential of the package with random weights, and scales and shifts per element."""
    pytest.importorskip("mattersim", reason="needs the package mattersim: pip install mattersim")
    from mattersim.forcefield.m3gnet.m3gnet import M3Gnet
    from mattersim.forcefield.m3gnet.scaling import AtomScaling
    from mattersim.forcefield.potential import Potential

    arguments = {**SIZES, **VARIANTS[variant]}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = M3Gnet(device="cpu", **arguments)
        elements = torch.arange(arguments["max_z"] + 1.0)
        scaling = {"init_scale": 2.0 + 0.1 * elements, "init_shift": -elements, "verbose": False}
        network.set_normalizer(AtomScaling(max_z=arguments["max_z"], device="cpu", **scaling))
        for value in network.atom_embedding.parameters():
            value.data *= 20.0  # elements differ
    return Potential(network, device="cpu").eval()


def calculator(potential):
    from mattersim.forcefield.potential import MatterSimCalculator

    return MatterSimCalculator(potential=potential, device="cpu")


def served(path):
    """What the package makes of a file."""
    from mattersim.forcefield.potential import MatterSimCalculator

    return MatterSimCalculator.from_checkpoint(str(path), device="cpu")


def checkpoint(path, model):
    """What the package saves."""
    model.save(str(path))
    return f"mattersim:{path}"


@pytest.fixture
def double(monkeypatch):
    """The package writes float32 into its code; here that word means float64 while a model is built and used."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setattr(torch, "FloatTensor", torch.DoubleTensor)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def own() -> ForceField:
    """A force field of random weights that no other package made, of elements with gaps between them."""
    torch.manual_seed(0)
    potential = build_potential("mattersim", {"channels": 8, "n_blocks": 2, "cutoff": 4.0}, (1, 6, 8))
    potential.references.copy_(torch.tensor([-1.0, -2.0, -3.0]))
    return ForceField(name="own", potential=potential.eval().requires_grad_(False))


@pytest.mark.parametrize("variant", VARIANTS)
def test_results_are_the_vendors_in_double_precision(variant, double):
    model = build(variant).double()
    assert_results_are_the_vendors("mattersim", model, calculator, tolerance=1e-9, dtype="float64")


@pytest.mark.parametrize("variant", VARIANTS)
def test_results_are_the_vendors(variant):
    assert_results_are_the_vendors("mattersim", build(variant), calculator, tolerance=3e-6)


def test_the_adapter_does_what_its_users_rely_on():
    model = build()
    check_integration(
        ADAPTERS["mattersim"],
        model,
        structures(),
        calculator=calculator(model),
        served_by=served,
        suffix=".pth",
    ).raise_if_failed()


@pytest.mark.slow
@pytest.mark.nightly
def test_the_contract_holds(tmp_path):
    path = own().save(tmp_path / "s.safetensors")
    calc = GFFMergeCalculator(path, dtype="float64", device="cpu")
    check_calculator(calc, bulk("C", a=3.6)).raise_if_failed()


def test_what_is_written_is_read_without_the_package(tmp_path):
    force_field = own()
    again = load_force_field(f"mattersim:{export(force_field, tmp_path / 'written.pth')}")
    assert again.species == (1, 6, 8)
    assert again.potential.hyper == force_field.potential.hyper
    weights = force_field.potential.state_dict()
    for name, value in again.potential.state_dict().items():
        torch.testing.assert_close(value, weights[name], rtol=0, atol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_exports_are_the_vendors_checkpoints(variant, tmp_path):
    model = build(variant)
    path = export(from_vendor("mattersim", model), tmp_path / "again.pth")
    for atoms in structures():
        assert_same(calculator(model), served(path), atoms, tolerance=3e-6)


def test_what_misses_elements_is_the_vendors(tmp_path):
    """The package has a row for every element up to the last; here are those that were known alone."""
    pytest.importorskip("mattersim")
    force_field = own()
    path, ours = export(force_field, tmp_path / "own.pth"), GFFMergeCalculator(force_field, device="cpu")
    for atoms in structures():
        assert_same(ours, served(path), atoms, tolerance=3e-6)


def test_checkpoints_are_read_without_code(tmp_path, capsys):
    model = build()
    read = load_force_field(checkpoint(tmp_path / "a.pth", model))
    assert read.fingerprint == from_vendor("mattersim", model).fingerprint
    assert read.fingerprint == from_vendor("mattersim", calculator(model)).fingerprint
    assert (read.name, read.species) == ("a", tuple(range(1, 9)))
    assert read.potential.readout.scale[5] == pytest.approx(2.6)
    torch.save({"weights": 1}, tmp_path / "empty.pth")
    torch.save({"model": Trap()}, tmp_path / "trap.pth")
    sources = {"holds no M3GNet": "empty.pth", "trust=True": "trap.pth", "no file": "nowhere.pth"}
    for words, name in sources.items():
        with pytest.raises(FileFormatError, match=words):
            load_force_field(f"mattersim:{tmp_path / name}")
    assert "executed" not in capsys.readouterr().out


def test_other_models_are_refused(tmp_path):
    content = ADAPTERS["mattersim"].vendor_content(own().potential)
    state = content["model"]
    extra = {**state, "head.weight": torch.zeros(2)}
    lost = {name: value for name, value in state.items() if name != "edge_encoder.mlp.0.linear.weight"}
    for words, change in {
        "graphormer is not read": {"model_name": "graphormer"},
        "parts that are not known here: head.weight": {"model": extra},
        "edge_encoder": {"model": lost},
        "at most 4": {"model_args": {**content["model_args"], "max_n": 5}},
    }.items():
        torch.save(content | change, tmp_path / "other.pth")
        with pytest.raises(FileFormatError, match=words):
            load_force_field(f"mattersim:{tmp_path / 'other.pth'}")
    with pytest.raises(FileFormatError, match="no model of MatterSim"):
        from_vendor("mattersim", torch.nn.Linear(2, 2))


def test_vendor_checkpoints_are_merged_served_and_exported(tmp_path):
    sources = [checkpoint(tmp_path / f"{k}.pth", moved(build(), seed=k, size=0.1)) for k in range(2)]
    calc = merged_files(sources, tmp_path)
    path = export(calc.force_field, tmp_path / "merged.pth")
    for atoms in structures():
        assert_same(calc, served(path), atoms, tolerance=3e-6)


def build_double():
    return build().double()


def test_copies_merge_into_the_original():
    assert_copies_merge_into(relatives("mattersim", build_double, size=0.0)[0])


def test_the_solves_beat_paper_and_mean(tmp_path):
    pair = relatives("mattersim", build_double, size=0.1, n_frames=20)
    merged, _ = solves_that_beat_paper_and_mean(pair)
    with pytest.raises(FileFormatError, match="widened readout"):
        export(merged, tmp_path / "merged.pth")


def test_the_default_beats_the_mean():
    pair = relatives("mattersim", build_double, size=0.1)
    assert_the_default_beats_the_mean(pair)
