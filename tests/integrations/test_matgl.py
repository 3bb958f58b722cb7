"""M3GNet and TensorNet of the package matgl: the vendor's results, the vendor's folders, and merges."""

import json
import warnings

import pytest
import torch
from ase import Atoms
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

TYPES = ("C", "H", "O")
SIZES = {"cutoff": 4.0, "units": 8, "nblocks": 2, "is_intensive": False}
M3GNET = {**SIZES, "dim_node_embedding": 8, "dim_edge_embedding": 6, "threebody_cutoff": 3.5}
BESSEL = {"rbf_type": "SphericalBessel", "use_smooth": False}
VARIANTS = {
    "m3gnet": {"kind": "M3GNet", **M3GNET},
    "m3gnet smooth": {"kind": "M3GNet", **M3GNET, "use_smooth": True, "max_l": 2, "max_n": 4},
    "tensornet": {"kind": "TensorNet", **SIZES, "num_rbf": 6, "width": 0.7},
    "tensornet bessel": {"kind": "TensorNet", **SIZES, **BESSEL, "equivariance_invariance_group": "SO(3)"},
    "tensornet smooth": {
        "kind": "TensorNet",
        **SIZES,
        **BESSEL,
        "use_smooth": True,
        "activation_type": "tanh",
    },
}
SMOOTH = ("m3gnet smooth", "tensornet smooth")
"""Of each architecture a network whose forces do not jump when neighbours come and go."""


def build(variant: str = "m3gnet smooth", seed: int = 0, **potential):
    """A potential of the package with random weights."""
    pytest.importorskip("matgl", reason="needs the package matgl: pip install matgl")
    import matgl.models
    from matgl.apps.pes import Potential

    arguments = dict(VARIANTS[variant])
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = getattr(matgl.models, arguments.pop("kind"))(element_types=TYPES, **arguments)
    given = {"data_std": 3.0, "element_refs": [-2.0, -1.0, -3.0], **potential}
    return Potential(network, **given).eval()


def calculator(potential):
    from matgl.ext.ase import PESCalculator

    return PESCalculator(potential, stress_unit="eV/A3", use_voigt=True)


def checkpoint(path, model):
    """What the package saves."""
    model.save(path)
    return f"matgl:{path}"


@pytest.fixture
def double():
    """The package works in float64, if it is told so before a model is built and as long as it is used."""
    matgl = pytest.importorskip("matgl", reason="needs the package matgl: pip install matgl")
    pytest.importorskip("matgl.models")  # whose default arguments are those of the time of its import
    matgl.set_default_dtype("float", 64)
    yield
    matgl.set_default_dtype("float", 32)


def own(architecture: str = "m3gnet") -> ForceField:
    """A force field of random weights that no other package made."""
    sizes = {"m3gnet": {"edge_channels": 6, "width": 7}, "tensornet": {"n_radial": 6}}[architecture]
    torch.manual_seed(0)
    hyper = {"channels": 8, "n_blocks": 2, "cutoff": 4.0, **sizes}
    potential = build_potential(architecture, hyper, (1, 6, 8)).double()
    potential.references.copy_(torch.tensor([-1.0, -2.0, -3.0]))
    return ForceField(name=architecture, potential=potential.eval().requires_grad_(False))


@pytest.mark.parametrize("variant", VARIANTS)
def test_results_are_the_vendors_in_double_precision(variant, double):
    model = build(variant).double()
    assert_results_are_the_vendors("matgl", model, calculator, tolerance=1e-9, dtype="float64")


@pytest.mark.parametrize("variant", VARIANTS)
def test_results_are_the_vendors(variant):
    assert_results_are_the_vendors("matgl", build(variant), calculator, tolerance=3e-6)


def test_atoms_in_line_are_the_vendors_to_its_clamp(double):
    """The package keeps cosines 1e-7 away from one; here they are what they are."""
    model = build("m3gnet").double()
    line = Atoms("COC", [[0, 0, -1.2], [0, 0, 0], [0, 0, 1.3]])
    ours = GFFMergeCalculator(from_vendor("matgl", model), dtype="float64", device="cpu")
    assert_same(ours, calculator(model), line, tolerance=1e-7)


@pytest.mark.parametrize("variant", SMOOTH)
def test_the_adapter_does_what_its_users_rely_on(variant):
    import_matgl = pytest.importorskip("matgl")
    model = build(variant)
    check_integration(
        ADAPTERS["matgl"],
        model,
        structures(),
        calculator=calculator(model),
        served_by=lambda path: calculator(import_matgl.load_model(path)),
        suffix="",
    ).raise_if_failed()


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.parametrize("architecture", ["m3gnet", "tensornet"])
def test_the_contract_holds(architecture, tmp_path):
    path = own(architecture).save(tmp_path / "s.safetensors")
    calc = GFFMergeCalculator(path, dtype="float64", device="cpu")
    check_calculator(calc, bulk("C", a=3.6)).raise_if_failed()


@pytest.mark.parametrize("architecture", ["m3gnet", "tensornet"])
def test_what_is_written_is_read_without_the_package(architecture, tmp_path):
    force_field = own(architecture)
    path = export(force_field, tmp_path / "written")
    assert sorted(file.name for file in path.iterdir()) == ["model.json", "model.pt", "state.pt"]
    again = load_force_field(f"matgl:{path}")
    assert again.potential.hyper == force_field.potential.hyper
    weights = force_field.potential.state_dict()
    for name, value in again.potential.state_dict().items():
        torch.testing.assert_close(value, weights[name], rtol=0, atol=0)


def test_a_folder_is_replaced_only_if_it_is_a_model(tmp_path):
    path = export(own("tensornet"), tmp_path / "written")
    assert load_force_field(f"matgl:{export(own('m3gnet'), path)}").potential.architecture == "m3gnet"
    assert [entry.name for entry in tmp_path.iterdir()] == ["written"]
    (path / "notes.txt").write_text("years of work")
    with pytest.raises(FileFormatError, match="no model of MatGL"):
        export(own("m3gnet"), path)


@pytest.mark.parametrize("variant", VARIANTS)
def test_exports_are_the_vendors_folders(variant, tmp_path):
    import_matgl = pytest.importorskip("matgl")
    specialist = from_vendor("matgl", build(variant))
    path = export(specialist, tmp_path / "again")
    theirs = import_matgl.load_model(path)
    ours = GFFMergeCalculator(specialist, device="cpu")
    for atoms in structures():
        assert_same(ours, calculator(theirs), atoms, tolerance=3e-6)


def test_folders_are_read_without_code(tmp_path, capsys):
    model = build()
    read = load_force_field(checkpoint(tmp_path / "a", model))
    assert read.fingerprint == from_vendor("matgl", model).fingerprint
    assert (read.name, read.species) == ("a", (1, 6, 8))
    alone = load_force_field(checkpoint(tmp_path / "network", model.model))
    assert not alone.potential.references.any()
    for name in ("trap", "other"):
        model.save(tmp_path / name)
    torch.save({"model": Trap()}, tmp_path / "trap" / "model.pt")
    (tmp_path / "other" / "model.json").write_text("[]")
    sources = {
        "trust=True": tmp_path / "trap",
        "does not say what": tmp_path / "other",
        "is a file": tmp_path / "a" / "model.pt",
        "no folder": tmp_path / "nowhere",
    }
    for words, path in sources.items():
        with pytest.raises(FileFormatError, match=words):
            load_force_field(f"matgl:{path}")
    assert "executed" not in capsys.readouterr().out


def test_other_models_are_refused():
    other = {
        "data_mean": build(data_mean=1.0),
        "nuclear repulsion": build(calc_repuls=True),
    }
    for change, words in (
        ({"is_intensive": True}, "is_intensive"),
        ({"use_phi": True}, "use_phi"),
        ({"include_state": True, "dim_state_embedding": 2}, "include_state"),
    ):
        changed = build()
        changed._init_args["model"]["init_args"] |= change
        other[words] = changed
    old = build()
    old._init_args["model"]["@model_version"] = 1
    for words, model in (other | {"version 1": old}).items():
        with pytest.raises(FileFormatError, match=words):
            from_vendor("matgl", model)
    with pytest.raises(FileFormatError, match="no model of MatGL"):
        from_vendor("matgl", torch.nn.Linear(2, 2))
    lost = build()
    lost._init_args["model"]["init_args"].pop("units")
    with pytest.raises(FileFormatError, match="units"):
        from_vendor("matgl", lost)


def test_vendor_folders_are_merged_served_and_exported(tmp_path):
    import_matgl = pytest.importorskip("matgl")
    sources = [
        checkpoint(tmp_path / f"{k}", moved(build("tensornet smooth"), seed=k, size=0.1)) for k in range(2)
    ]
    calc = merged_files(sources, tmp_path)
    path = export(calc.force_field, tmp_path / "merged")
    about = json.loads((path / "model.json").read_text())
    assert about["kwargs"]["model"]["init_args"]["element_types"] == ["H", "C", "O"]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # of a version that the package does not expect
        theirs = calculator(import_matgl.load_model(path))
    for atoms in structures():
        assert_same(calc, theirs, atoms, tolerance=3e-6)


@pytest.mark.parametrize("variant", SMOOTH)
def test_copies_merge_into_the_original(variant):
    assert_copies_merge_into(relatives("matgl", lambda: build(variant).double(), size=0.0)[0])


def test_the_solves_beat_paper_and_mean(tmp_path):
    pair = relatives("matgl", lambda: build("m3gnet smooth").double(), size=0.1, n_frames=20)
    merged, _ = solves_that_beat_paper_and_mean(pair)
    with pytest.raises(FileFormatError, match="widened readout"):
        export(merged, tmp_path / "merged")


def test_the_default_beats_the_mean_of_tensornets():
    pair = relatives("matgl", lambda: build("tensornet smooth").double(), size=0.1)
    assert assert_the_default_beats_the_mean(pair).averaged == ()
