"""PET of the package metatrain: the vendor's results, the vendor's files, and merges."""

import gzip
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from ase_gffmerge import ForceField, GFFMergeCalculator
from ase_gffmerge.errors import FileFormatError
from ase_gffmerge.integrations import ADAPTERS
from ase_gffmerge.integrations.load import export, from_vendor, load_force_field
from ase_gffmerge.integrations.metatrain import quiet_package
from ase_gffmerge.testing import check_integration
from helpers.vendor_models import (
    assert_copies_merge_into,
    assert_results_are_the_vendors,
    assert_same,
    assert_the_default_beats_the_mean,
    moved,
    relatives,
    solves_that_beat_paper_and_mean,
    structures,
)

INSTALLED = find_spec("metatrain") is not None
WHY = "needs the package metatrain: pip install metatrain"
pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(not INSTALLED, reason=WHY),
]

TYPES = (1, 6, 8)
SIZES = {
    "d_pet": 8,
    "d_node": 12,
    "d_head": 6,
    "d_feedforward": 10,
    "num_heads": 2,
    "cutoff": 4.0,
    "cutoff_width": 1.0,
}
OLD = {"normalization": "LayerNorm", "activation": "SiLU", "transformer_type": "PostLN"}
VARIANTS = {
    "usual": {},
    "of one width": {"d_node": 8, "num_gnn_layers": 1},
    "of the first PET-MAD": {**OLD, "featurizer_type": "residual", "cutoff_function": "Cosine", "d_node": 8},
    "adaptive": {"num_neighbors_adaptive": 4},
    "adaptive by a grid": {"num_neighbors_adaptive": 4, "adaptive_cutoff_method": "grid"},
    "residual": {"featurizer_type": "residual", "num_gnn_layers": 3, "attention_temperature": 1.5},
}

ROUND_OFF = 2e-5
"""Of single precision, in which the package adds energies of structures; its results are as far from those in double."""


def build(variant: str = "usual", seed: int = 0, targets: tuple[str, ...] = ("energy",), **changes):
    """A model of the package with random weights, a scale, and energies of elements."""
    if not INSTALLED:
        pytest.skip(WHY)
    with quiet_package():
        import metatensor.torch as mts
        from metatrain.pet import __model__ as kind
    from metatrain.utils.architectures import get_default_hypers
    from metatrain.utils.data import DatasetInfo
    from metatrain.utils.data.target_info import get_energy_target_info

    given = {"quantity": "energy", "unit": "eV"}
    infos = {name: get_energy_target_info(name, given, add_position_gradients=True) for name in targets}
    hypers = get_default_hypers("pet")["model"] | SIZES | VARIANTS[variant] | changes
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = kind(hypers, DatasetInfo(length_unit="angstrom", atomic_types=list(TYPES), targets=infos))
    for k, name in enumerate(targets):
        weights = model.additive_models[0].model.weights[name]
        weights.block().values[:] = torch.tensor([[-1.0], [-2.0], [-3.0]]) - k
        model.additive_models[0].register_buffer(f"{name}_composition_buffer", mts.save_buffer(weights))
        for suffix, scales in (
            ("", model.scaler.model.scales),
            ("_per_target", model.scaler.model.per_target_scales),
        ):
            scales[name].block().values[:] = 3.0 + k
            model.scaler.register_buffer(f"{name}{suffix}_scaler_buffer", mts.save_buffer(scales[name]))
    return model.eval()


def calculator(model, **options):
    with quiet_package():
        from metatomic_ase import MetatomicCalculator

    return MetatomicCalculator(model.export(), device="cpu", **options)


def served(path):
    """What the package makes of a file."""
    from metatrain.utils.io import load_model

    return calculator(load_model(path))


def checkpoint(path, model):
    """What the package saves."""
    content = model.get_checkpoint()
    content["best_model_state_dict"] = content["model_state_dict"]
    torch.save(content, path)
    return f"metatrain:{path}"


@pytest.mark.parametrize("variant", VARIANTS)
def test_results_are_the_vendors_in_double_precision(variant):
    model = build(variant).double()
    assert_results_are_the_vendors("metatrain", model, calculator, tolerance=1e-9, dtype="float64")


@pytest.mark.parametrize("variant", VARIANTS)
def test_results_are_the_vendors(variant):
    assert_results_are_the_vendors("metatrain", build(variant), calculator, tolerance=ROUND_OFF)


def test_the_adapter_does_what_its_users_rely_on():
    model = build().double()
    check_integration(
        ADAPTERS["metatrain"],
        model,
        structures(),
        calculator=calculator(model),
        served_by=served,
        suffix=".ckpt",
    ).raise_if_failed()


@pytest.mark.parametrize("variant", VARIANTS)
def test_exports_are_the_vendors_checkpoints(variant, tmp_path):
    model = build(variant).double()
    path = export(from_vendor("metatrain", model), tmp_path / "again.ckpt")
    for atoms in structures():
        assert_same(calculator(model), served(path), atoms, tolerance=1e-9)


def test_checkpoints_are_read_if_they_are_trusted(tmp_path):
    model = build()
    source = checkpoint(tmp_path / "a.ckpt", model)
    with pytest.raises(FileFormatError, match=r"ScriptObject.*trust=True"):
        load_force_field(source)
    read = load_force_field(source, trust=True)
    assert read.fingerprint == from_vendor("metatrain", model).fingerprint
    assert read.fingerprint == from_vendor("metatrain", model.export()).fingerprint
    assert (read.name, read.species) == ("a", TYPES)
    assert read.potential.references.tolist() == [-1.0, -2.0, -3.0]
    assert ForceField.load(read.save(tmp_path / "a.safetensors")).fingerprint == read.fingerprint
    torch.save({"weights": torch.ones(2)}, tmp_path / "other.ckpt")
    with pytest.raises(FileFormatError, match="no checkpoint that metatrain"):
        load_force_field(f"metatrain:{tmp_path / 'other.ckpt'}", trust=True)


SHIPPED = (
    Path(find_spec("metatrain").origin).parent / "pet" / "tests" / "checkpoints" if INSTALLED else Path()
)
"""Small checkpoints that the package's training wrote, of all versions of its format."""


@pytest.mark.parametrize("version", range(1, 17))
def test_shipped_checkpoints_of_all_versions_are_the_vendors(version, tmp_path):
    for packed in sorted(SHIPPED.glob(f"model-v{version}_*.ckpt.gz")):
        path = tmp_path / packed.stem
        path.write_bytes(gzip.decompress(packed.read_bytes()))
        read = load_force_field(f"metatrain:{path}", trust=True)
        ours, theirs = GFFMergeCalculator(read, device="cpu"), served(path)
        for atoms in structures():
            assert_same(ours, theirs, atoms, tolerance=ROUND_OFF)


def test_an_energy_is_chosen(tmp_path):
    """Of several targets one is read and written; it is never chosen silently."""
    model = build(targets=("energy/pbe", "energy/r2scan")).double()
    source = checkpoint(tmp_path / "both.ckpt", model)
    for words, wrong in {
        r"several energies; there are energy/pbe, energy/r2scan.*#target=energy/pbe": source,
        "no energy energy/scan": f"{source}#target=energy/scan",
        "have no head": f"{source}#head=energy/pbe",
    }.items():
        with pytest.raises(FileFormatError, match=words):
            load_force_field(wrong, trust=True)
    chosen = load_force_field(f"{source}#target=energy/r2scan", trust=True)
    theirs = calculator(model, variants={"energy": "r2scan"})
    ours = GFFMergeCalculator(chosen, dtype="float64", device="cpu")
    alone = served(export(chosen, tmp_path / "one.ckpt"))
    for atoms in structures():
        assert_same(ours, theirs, atoms, tolerance=1e-9)
        assert_same(alone, theirs, atoms, tolerance=1e-9)


def test_low_rank_changes_are_read_as_the_weights_that_they_amount_to(tmp_path):
    from metatrain.pet.modules.finetuning import apply_finetuning_strategy

    strategy = {"method": "lora", "config": {"rank": 2, "alpha": 4.0}, "inherit_heads": {}}
    model = moved(apply_finetuning_strategy(build(), strategy).double(), seed=1, size=0.3)
    read = load_force_field(checkpoint(tmp_path / "lora.ckpt", model), trust=True)
    ours = GFFMergeCalculator(read, dtype="float64", device="cpu")
    for atoms in structures():
        assert_same(ours, served(tmp_path / "lora.ckpt"), atoms, tolerance=1e-9)
    assert not any("lora" in name for name, _ in read.potential.named_parameters())


@pytest.mark.parametrize(
    ("words", "changes"),
    [("zbl", {"zbl": True}), ("charge and spin", {"system_conditioning": True})],
)
def test_other_models_are_refused(words, changes):
    with pytest.raises(FileFormatError, match=words):
        from_vendor("metatrain", build(**changes))
    with pytest.raises(FileFormatError, match="no PET of metatrain"):
        from_vendor("metatrain", torch.nn.Linear(2, 2))


def build_double():
    return build().double()


def test_copies_merge_into_the_original():
    assert_copies_merge_into(relatives("metatrain", build_double, size=0.0)[0])


def test_the_solves_beat_paper_and_mean(tmp_path):
    pair = relatives("metatrain", build_double, size=0.1, n_frames=20)
    merged, _ = solves_that_beat_paper_and_mean(pair)
    with pytest.raises(FileFormatError, match="widened readout"):
        export(merged, tmp_path / "merged.ckpt")


def test_the_default_beats_the_mean():
    pair = relatives("metatrain", build_double, size=0.1)
    assert_the_default_beats_the_mean(pair)
