"""NequIP of the package nequip: the vendor's results, the vendor's files, and merges."""

from copy import deepcopy

import numpy as np
import pytest
import torch
from ase.build import bulk

from helpers.lammps_domains import assert_cut_into_domains
from helpers.vendor_models import (
    Trap,
    assert_copies_have_the_constants_of,
    assert_copies_merge_into,
    assert_same,
    moved,
    relatives,
    solves_that_beat_paper_and_mean,
    structures,
)

nequip = pytest.importorskip("nequip", reason="needs the package nequip: pip install nequip")
pytestmark = pytest.mark.filterwarnings("ignore")

from ase_gffmerge import GFFMergeCalculator, merge  # noqa: E402
from ase_gffmerge.errors import FileFormatError  # noqa: E402
from ase_gffmerge.integrations import ADAPTERS  # noqa: E402
from ase_gffmerge.integrations.load import export, from_vendor, load_force_field  # noqa: E402
from ase_gffmerge.testing import check_calculator, check_integration  # noqa: E402

TYPES = ["C", "H", "O"]
ZBL = {"_target_": "nequip.nn.pair_potential.ZBL", "units": "metal", "chemical_species": TYPES}
CONFIG = {
    "_target_": "nequip.model.NequIPGNNModel",
    "seed": 1,
    "model_dtype": "float32",
    "r_max": 4.0,
    "type_names": TYPES,
    "num_layers": 2,
    "l_max": 1,
    "parity": True,
    "num_features": 6,
    "type_embed_num_features": 4,
    "radial_mlp_width": 8,
    "avg_num_neighbors": 8.0,
    "per_type_energy_scales": 2.0,
    "per_type_energy_shifts": {"H": -1.0, "C": -2.0, "O": -3.0},
}
VARIANTS = {
    "plain": {},
    "repulsion": {"pair_potential": ZBL},
    "natural parity": {"parity": False, "l_max": 2, "num_layers": 3, "num_features": [8, 6, 4]},
    "residual": {"convnet_resnet": True, "learnable_shift": True, "readout_mlp_hidden_layers_depth": 1},
}


@pytest.fixture
def float64_default():
    """What nequip makes the default, for its own calculator alone."""
    from nequip.utils.global_state import set_global_state

    set_global_state()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def build(**changes):
    """A model by nequip's own builder, which wants the package's global state."""
    from nequip.model import NequIPGNNModel
    from nequip.utils.global_state import set_global_state

    set_global_state()
    torch.set_default_dtype(torch.float32)
    return NequIPGNNModel(**{k: v for k, v in {**CONFIG, **changes}.items() if k != "_target_"}).eval()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 3e-6), ("float64", 1e-11)])
def test_results_are_the_vendors(variant, dtype, tolerance, float64_default):
    from nequip.data.transforms import ChemicalSpeciesToAtomTypeMapper, NeighborListTransform
    from nequip.integrations.ase import NequIPCalculator

    model = build(model_dtype=dtype, **VARIANTS[variant])
    ours = GFFMergeCalculator(from_vendor("nequip", model), dtype=dtype, device="cpu")
    torch.set_default_dtype(torch.float64)
    transforms = [ChemicalSpeciesToAtomTypeMapper(TYPES), NeighborListTransform(r_max=4.0)]
    theirs = NequIPCalculator(model, "cpu", transforms=transforms)
    for atoms in structures():
        assert_same(ours, theirs, atoms, tolerance=tolerance)


def test_the_adapter_does_what_its_users_rely_on(float64_default):
    from nequip.data.transforms import ChemicalSpeciesToAtomTypeMapper, NeighborListTransform
    from nequip.integrations.ase import NequIPCalculator

    model = build(model_dtype="float64")
    torch.set_default_dtype(torch.float64)
    transforms = [ChemicalSpeciesToAtomTypeMapper(TYPES), NeighborListTransform(r_max=4.0)]
    check_integration(
        ADAPTERS["nequip"],
        model,
        structures(),
        calculator=NequIPCalculator(model, "cpu", transforms=transforms),
        served_by=NequIPCalculator._from_saved_model,
        suffix=".ckpt",
    ).raise_if_failed()


def test_the_contract_holds(tmp_path):
    specialist = from_vendor("nequip", build(model_dtype="float64"))
    calc = GFFMergeCalculator(specialist.save(tmp_path / "s.safetensors"), dtype="float64", device="cpu")
    check_calculator(calc, bulk("C", a=3.6)).raise_if_failed()


def test_reading_leaves_the_process_alone():
    model = build()
    torch.manual_seed(3)
    before = torch.get_default_dtype(), torch.get_rng_state()
    potential = from_vendor("nequip", model).potential
    assert torch.get_default_dtype() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    assert potential.dtype == torch.float32
    assert potential.species == (1, 6, 8)
    np.testing.assert_allclose(potential.references, [-1, -2, -3])


def test_casts_change_weights_alone():
    potential = from_vendor("nequip", build(model_dtype="float64", l_max=2, num_layers=3)).potential
    exact = {name: buffer.clone() for name, buffer in potential.named_buffers()}
    assert any("w3j" in name for name in exact)
    copy = deepcopy(potential).float().double()
    for name, buffer in copy.named_buffers():
        assert torch.equal(buffer, exact[name]), name
    assert not any("w3j" in name for name in copy.state_dict())


def checkpoint(path, model, *, averages: bool = False, **config):
    """What nequip-train saves, as far as weights and model go."""
    state = {f"model.sole_model.{name}": value for name, value in model.state_dict().items()}
    if averages:
        means = {f"ema.ema_weight_{i}": p.detach() + 0.1 for i, p in enumerate(model.parameters())}
        state |= means
    torch.save(
        {"state_dict": state, "hyper_parameters": {"model": {**CONFIG, **config}, "info_dict": {}}}, path
    )
    return f"nequip:{path}"


def test_checkpoints_are_read_without_code(tmp_path):
    model = build(pair_potential=ZBL)
    read = load_force_field(checkpoint(tmp_path / "a.ckpt", model, pair_potential=ZBL))
    assert read.fingerprint == from_vendor("nequip", model).fingerprint
    assert read.provenance.origin.startswith("nequip 0.")
    averaged = load_force_field(checkpoint(tmp_path / "b.ckpt", model, averages=True, pair_potential=ZBL))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    assert averaged.fingerprint == from_vendor("nequip", model).fingerprint
    again = load_force_field(read.save(tmp_path / "a.safetensors"))
    assert again.fingerprint == read.fingerprint


def test_what_is_not_read_is_refused(tmp_path, capsys):
    model = build()
    other = {"_target_": "nequip.model.ModelFromPackage"}
    evil = {**ZBL, "units": {"_target_": "builtins.print", "_args_": ["executed"]}}
    sources = {
        "other files": checkpoint(tmp_path / "package.ckpt", model, **other),
        "other parts": checkpoint(tmp_path / "evil.ckpt", model, pair_potential=evil),
        "no checkpoint": checkpoint(tmp_path / "none.ckpt", model, _target_=None).replace("none", "empty"),
        "does not fit": checkpoint(tmp_path / "wide.ckpt", model, num_features=7),
        "trust=True": f"nequip:{tmp_path / 'trap.ckpt'}",
        "holds code": f"nequip:{tmp_path / 'x.nequip.zip'}",
        "no file": f"nequip:{tmp_path / 'missing.ckpt'}",
    }
    torch.save({"weights": 1}, tmp_path / "empty.ckpt")
    torch.save({"state_dict": Trap()}, tmp_path / "trap.ckpt")
    (tmp_path / "x.nequip.zip").write_bytes(b"")
    capsys.readouterr()
    for words, source in sources.items():
        with pytest.raises(FileFormatError, match=words):
            load_force_field(source)
    assert "executed" not in capsys.readouterr().out
    with pytest.raises(FileFormatError, match="no NequIP model"):
        ADAPTERS["nequip"].read(torch.nn.Linear(2, 2))
    with pytest.raises(FileFormatError, match="trainable Bessel"):
        ADAPTERS["nequip"].read(build(bessel_trainable=True))
    with pytest.raises(FileFormatError, match="not known here"):
        ADAPTERS["nequip"].read(build(convnet_nonlinearity_scalars={"e": "ssp", "o": "tanh"}))


@pytest.mark.parametrize("variant", ["repulsion", "natural parity"])
def test_exports_are_the_vendors_checkpoints(variant, tmp_path, float64_default):
    from nequip.integrations.ase import NequIPCalculator

    specialist = from_vendor("nequip", build(model_dtype="float64", **VARIANTS[variant]))
    path = export(specialist, tmp_path / "again.ckpt")
    again = GFFMergeCalculator(f"nequip:{path}", dtype="float64", device="cpu")
    ours = GFFMergeCalculator(specialist, dtype="float64", device="cpu")
    torch.set_default_dtype(torch.float64)
    for atoms in structures():
        assert_same(again, ours, atoms.copy(), tolerance=1e-11)
        assert_same(ours, NequIPCalculator._from_saved_model(path), atoms, tolerance=1e-11)


def test_vendor_files_are_merged_served_and_exported(tmp_path, float64_default):
    from nequip.integrations.ase import NequIPCalculator

    changes = ({}, {"per_type_energy_scales": {"H": 1.0, "C": 1.5, "O": 2.0}})
    sources = [
        checkpoint(tmp_path / f"{k}.ckpt", moved(build(**change), seed=k, size=0.1), **change)
        for k, change in enumerate(changes)
    ]
    frames, recipe = (
        [[atoms] for atoms in structures()],
        {"preset": "closed-form", "readout": None, "messages": False, "directions": 0},
    )
    calc = GFFMergeCalculator(sources, calibration=frames, recipe=recipe, cache_dir=tmp_path, device="cpu")
    path = export(calc.force_field, tmp_path / "merged.ckpt")
    torch.set_default_dtype(torch.float64)
    for atoms in structures():
        assert_same(calc, NequIPCalculator._from_saved_model(path), atoms, tolerance=3e-6)


def build_narrow():
    return build(type_embed_num_features=2)


def test_self_connections_that_the_format_cannot_hold_are_refused(tmp_path):
    pair = relatives("nequip", build_narrow, size=0.1)
    assert export(pair[0], tmp_path / "narrow.ckpt").exists()
    merged, _ = merge(pair, "mean", device="cpu")
    with pytest.raises(FileFormatError, match="3 elements, which NequIP makes of the 2 features"):
        export(merged, tmp_path / "merged.ckpt")
    plain, adapter = {"wide_readout": False, "embeddings": False}, ADAPTERS["nequip"]
    with pytest.raises(FileFormatError, match="3 elements, which NequIP makes of the 2 features"):
        adapter.require_merge_exportable([specialist.potential for specialist in pair], **plain)
    adapter.require_merge_exportable([from_vendor("nequip", build()).potential] * 2, **plain)


def build_double():
    return build(model_dtype="float64")


def test_copies_have_the_constants_of_the_original():
    assert_copies_have_the_constants_of(from_vendor("nequip", build()).potential)


def test_copies_merge_into_the_original():
    assert_copies_merge_into(relatives("nequip", build_double, size=0.0)[0])


def test_the_solves_beat_paper_and_mean(tmp_path):
    merged, report = solves_that_beat_paper_and_mean(relatives("nequip", build_double, size=0.2))
    assert report.averaged == ("embedding", "readout.scale")
    assert any("sc[O, 0e]" in row.name for row in report.layers)
    assert load_force_field(merged.save(tmp_path / "m.safetensors")).fingerprint == merged.fingerprint
    with pytest.raises(FileFormatError, match="widened readout"):
        export(merged, tmp_path / "merged.ckpt")


@pytest.mark.parametrize("variant", VARIANTS)
def test_domains_of_lammps_give_what_the_structure_gives(variant, float64_default):
    assert_cut_into_domains(from_vendor("nequip", build(**VARIANTS[variant])).to(dtype=torch.float64))
