"""SevenNet of the package sevenn: the vendor's results, the vendor's files, and merges."""

from copy import deepcopy

import numpy as np
import pytest
import torch
from ase.build import bulk

from helpers.lammps_domains import assert_cut_into_domains
from helpers.vendor_models import (
    STRIPPED_AND_DEFAULT,
    Trap,
    assert_copies_have_the_constants_of,
    assert_copies_merge_into,
    assert_same,
    merged_files,
    merged_saved_cached_and_exported,
    moved,
    relatives,
    solves_that_beat_paper_and_mean,
    structures,
)

sevenn = pytest.importorskip("sevenn", reason="needs the package sevenn: pip install sevenn")
pytestmark = pytest.mark.filterwarnings("ignore")

from ase_gffmerge import ForceField, GFFMergeCalculator  # noqa: E402
from ase_gffmerge.errors import FileFormatError  # noqa: E402
from ase_gffmerge.integrations import ADAPTERS  # noqa: E402
from ase_gffmerge.integrations.load import (  # noqa: E402
    describe,
    export,
    file_of,
    from_vendor,
    load_force_field,
)
from ase_gffmerge.models.affine_maps import affine_maps  # noqa: E402
from ase_gffmerge.testing import check_calculator, check_integration  # noqa: E402

TYPES = (6, 1, 8)
CONFIG = {
    "cutoff": 4.0,
    "channel": 6,
    "irreps_manual": ["6x0e", "6x0e+4x1o", "6x0e"],
    "lmax": 1,
    "lmax_edge": -1,
    "lmax_node": -1,
    "is_parity": True,
    "num_convolution_layer": 2,
    "radial_basis": {"radial_basis_name": "bessel", "bessel_basis_num": 6},
    "cutoff_function": {"cutoff_function_name": "poly_cut", "poly_cut_p_value": 6},
    "act_radial": "silu",
    "act_scalar": {"e": "silu", "o": "tanh"},
    "act_gate": {"e": "silu", "o": "tanh"},
    "weight_nn_hidden_neurons": [8],
    "self_connection_type": "nequip",
    "interaction_type": "nequip",
    "conv_denominator": 3.0,
    "train_denominator": False,
    "train_shift_scale": False,
    "use_bias_in_linear": False,
    "_normalize_sph": True,
    "readout_as_fcn": False,
}
VARIANTS = {
    "plain": {},
    "linear": {
        "self_connection_type": "linear",
        "is_parity": False,
        "irreps_manual": ["6x0e", "6x0e+4x1e+2x2e", "6x0e"],
        "lmax": 2,
        "cutoff_function": {"cutoff_function_name": "XPLOR", "cutoff_on": 3.5},
    },
    "network": {"readout_as_fcn": True, "readout_fcn_hidden_neurons": [8], "readout_fcn_activation": "silu"},
}


TWO_MODALITIES = {
    "use_modality": True,
    "_number_of_modalities": 2,
    "_modal_map": {"R2SCAN": 0, "PBE": 1},
    "use_modal_node_embedding": False,
    "use_modal_self_inter_intro": True,
    "use_modal_self_inter_outro": True,
    "use_modal_output_block": True,
    "use_modal_wise_shift": True,
    "use_modal_wise_scale": True,
    "shift": [[-2.0, -1.0, -3.0], [-4.0, -2.0, -6.0]],
    "scale": [[2.0, 1.5, 1.0], [1.0, 1.2, 1.4]],
}
"""What a multi-fidelity model is configured with."""
EVERYWHERE = {
    "use_modal_node_embedding": True,
    "use_modal_wise_scale": False,
    "scale": [2.0, 1.5, 1.0],
    "self_connection_type": "linear",
}


def complete(config: dict) -> dict:
    elements = {"_number_of_species": len(TYPES), "_type_map": {z: i for i, z in enumerate(TYPES)}}
    return {**CONFIG, "shift": [-2.0, -1.0, -3.0], "scale": [2.0, 1.5, 1.0], **elements, **config}


def build(seed: int = 0, **changes):
    from sevenn.model_build import build_E3_equivariant_model

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build_E3_equivariant_model(complete(changes)).eval()


@pytest.mark.parametrize("variant", VARIANTS)
def test_results_are_the_vendors(variant):
    from sevenn.calculator import SevenNetCalculator

    model = build(**VARIANTS[variant])
    ours = GFFMergeCalculator(from_vendor("sevenn", model), device="cpu")
    for atoms in structures():
        theirs = SevenNetCalculator(model, file_type="model_instance", device="cpu")
        assert_same(ours, theirs, atoms, tolerance=3e-6)


def test_pretrained_weights_are_the_vendors():
    from sevenn.calculator import SevenNetCalculator

    salt = bulk("NaCl", "rocksalt", a=5.6)
    salt.rattle(0.1, seed=2)
    specialist = load_force_field("sevenn:7net-0")
    assert len(specialist.species) == 89
    assert specialist.level_of_theory.startswith("PBE")
    ours, theirs = GFFMergeCalculator(specialist, device="cpu"), SevenNetCalculator("7net-0", device="cpu")
    assert_same(ours, theirs, salt, tolerance=3e-6)


@pytest.mark.parametrize(("modality", "variant"), [("PBE", {}), ("R2SCAN", EVERYWHERE)])
def test_a_modality_is_chosen(modality, variant, tmp_path):
    """Its results are the vendor's, from a file, from a calculator, and of the checkpoint with it alone that is written."""
    from sevenn.calculator import SevenNetCalculator

    changes = TWO_MODALITIES | variant
    model = build(**changes)
    source = checkpoint(tmp_path / "both.pth", model, **changes)
    theirs = SevenNetCalculator(model, file_type="model_instance", modal=modality, device="cpu")
    chosen = load_force_field(f"{source}#modality={modality}")
    assert (chosen.name, chosen.level_of_theory) == (f"both-{modality}", modality)
    assert from_vendor("sevenn", theirs).fingerprint == chosen.fingerprint
    ours = GFFMergeCalculator(chosen, device="cpu")
    alone = SevenNetCalculator(export(chosen, tmp_path / "one.pth"), device="cpu")
    for atoms in structures():
        assert_same(ours, theirs, atoms, tolerance=3e-6)
        assert_same(alone, theirs, atoms, tolerance=3e-6)
    assert any(
        one.has_bias for name, one in affine_maps(chosen.potential).items() if "self_interaction" in name
    )


def test_no_modality_is_chosen_silently(tmp_path):
    source = checkpoint(tmp_path / "both.pth", build(**TWO_MODALITIES), **TWO_MODALITIES)
    one = checkpoint(tmp_path / "one.pth", build())
    for words, wrong in {
        r"R2SCAN, PBE; choose one.*#modality=R2SCAN": source,
        "and no SCAN; choose one": f"{source}#modality=SCAN",
        "have no head; write #modality=PBE": f"{source}#head=PBE",
        "no modalities to choose PBE from": f"{one}#modality=PBE",
    }.items():
        with pytest.raises(FileFormatError, match=words):
            load_force_field(wrong)
    chosen = describe(f"{source}#modality=PBE")
    assert chosen == f"{source}#modality=PBE"
    assert file_of(chosen) == tmp_path / "both.pth"


def test_published_modalities_are_the_vendors():
    from sevenn.calculator import SevenNetCalculator

    salt = bulk("NaCl", "rocksalt", a=5.6)
    salt.rattle(0.1, seed=2)
    specialist = load_force_field("sevenn:7net-mf-0#modality=R2SCAN")
    assert specialist.name == "sevenn-7net-mf-0-R2SCAN"
    ours = GFFMergeCalculator(specialist, device="cpu")
    assert_same(ours, SevenNetCalculator("7net-mf-0", modal="R2SCAN", device="cpu"), salt, tolerance=3e-6)


def test_copies_of_a_modality_merge_into_the_original():
    from sevenn.calculator import SevenNetCalculator

    model = build(**TWO_MODALITIES).double()
    both = SevenNetCalculator(model, file_type="model_instance", modal="PBE", device="cpu")
    frames = ForceField.load("rmd17-ethanol").calibration[:5]
    assert_copies_merge_into(from_vendor("sevenn", both, calibration=frames))


def test_the_adapter_does_what_its_users_rely_on():
    from sevenn.calculator import SevenNetCalculator

    model = build()
    check_integration(
        ADAPTERS["sevenn"],
        model,
        structures(),
        calculator=SevenNetCalculator(model, file_type="model_instance", device="cpu"),
        served_by=lambda path: SevenNetCalculator(path, device="cpu"),
        suffix=".pth",
    ).raise_if_failed()


def test_the_contract_holds(tmp_path):
    path = from_vendor("sevenn", build().double()).save(tmp_path / "s.safetensors")
    calc = GFFMergeCalculator(path, dtype="float64", device="cpu")
    check_calculator(calc, bulk("C", a=3.6)).raise_if_failed()


def test_casts_change_weights_alone():
    potential = from_vendor("sevenn", build(**VARIANTS["linear"])).potential.double()
    exact = {name: buffer.clone() for name, buffer in potential.named_buffers()}
    copy = deepcopy(potential).float().double()
    for name, buffer in copy.named_buffers():
        assert torch.equal(buffer, exact[name]), name


WITH_FUSED_PRODUCTS = {
    "channel": 32,
    "lmax": 2,
    "irreps_manual": ["32x0e", "32x0e+16x1e+8x2e", "32x0e+16x1e+8x2e", "32x0e"],
    "num_convolution_layer": 3,
    "is_parity": False,
}
"""Large enough for e3nn to multiply Clebsch-Gordan coefficients with factors before anything else."""


def test_copies_have_the_constants_of_the_original():
    assert_copies_have_the_constants_of(from_vendor("sevenn", build(**WITH_FUSED_PRODUCTS)).potential)


@pytest.mark.parametrize("recipe", STRIPPED_AND_DEFAULT)
def test_relatives_of_the_published_network_are_merged_saved_cached_and_exported(recipe, tmp_path):
    from sevenn.calculator import SevenNetCalculator

    published = SevenNetCalculator("7net-0", device="cpu").model
    relatives_of_it = [moved(deepcopy(published), seed=seed, size=0.01) for seed in (1, 2)]
    crystals = [bulk("NaCl", "rocksalt", a=5.6), bulk("MgO", "rocksalt", a=4.2)]
    for crystal in crystals:
        crystal.rattle(0.1, seed=2)
    calc, path = merged_saved_cached_and_exported("sevenn", relatives_of_it, crystals, recipe, tmp_path)
    for crystal in crystals:
        assert_same(calc, SevenNetCalculator(path, device="cpu"), crystal, tolerance=3e-6)


def checkpoint(path, model, **config):
    """What the vendor's training saves, as far as weights and model go."""
    content = {"version": sevenn.__version__, **complete(config)}
    state = model.state_dict()
    torch.save({"config": content, "model_state_dict": state, "epoch": 3, "hash": np.float64(1)}, path)
    return f"sevenn:{path}"


def test_checkpoints_are_read_without_code(tmp_path, capsys):
    model = build()
    read = load_force_field(checkpoint(tmp_path / "a.pth", model))
    assert read.fingerprint == from_vendor("sevenn", model).fingerprint
    assert load_force_field(read.save(tmp_path / "a.safetensors")).fingerprint == read.fingerprint
    torch.save({"weights": 1}, tmp_path / "empty.pth")
    torch.save({"config": Trap()}, tmp_path / "trap.pth")
    sources = {
        "no checkpoint": f"sevenn:{tmp_path / 'empty.pth'}",
        "can build": checkpoint(tmp_path / "wide.pth", model, weight_nn_hidden_neurons=[9]),
        "trust=True": f"sevenn:{tmp_path / 'trap.pth'}",
        "no file": "sevenn:7net-of-nobody",
    }
    for words, source in sources.items():
        with pytest.raises(FileFormatError, match=words):
            load_force_field(source)
    assert "executed" not in capsys.readouterr().out
    with pytest.raises(FileFormatError, match="no SevenNet model"):
        ADAPTERS["sevenn"].read(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("variant", ["linear", "network"])
def test_exports_are_the_vendors_checkpoints(variant, tmp_path):
    from sevenn.calculator import SevenNetCalculator

    specialist = from_vendor("sevenn", build(**VARIANTS[variant]))
    path = export(specialist, tmp_path / "again.pth")
    ours = GFFMergeCalculator(specialist, device="cpu")
    for atoms in structures():
        assert_same(ours, SevenNetCalculator(path, device="cpu"), atoms, tolerance=3e-6)
    weights = specialist.potential.state_dict()
    for name, again in load_force_field(f"sevenn:{path}").potential.state_dict().items():
        torch.testing.assert_close(again, weights[name], rtol=3e-7, atol=0)


def test_vendor_files_are_merged_served_and_exported(tmp_path):
    from sevenn.calculator import SevenNetCalculator

    changes = ({}, {"conv_denominator": 4.0, "scale": [2.0, 1.2, 0.8]})
    sources = [
        checkpoint(tmp_path / f"{k}.pth", moved(build(**change), seed=k, size=0.1), **change)
        for k, change in enumerate(changes)
    ]
    calc = merged_files(sources, tmp_path)
    path = export(calc.force_field, tmp_path / "merged.pth")
    for atoms in structures():
        assert_same(calc, SevenNetCalculator(path, device="cpu"), atoms, tolerance=3e-6)


def build_double():
    return build().double()


def test_copies_merge_into_the_original():
    assert_copies_merge_into(relatives("sevenn", build_double, size=0.0)[0])


def test_the_solves_beat_paper_and_mean(tmp_path):
    merged, report = solves_that_beat_paper_and_mean(relatives("sevenn", build_double, size=0.1))
    assert "stages.0.module.basis.coeffs" in report.averaged
    assert any("fc_tensor_product[O, 0e]" in row.name for row in report.layers)
    with pytest.raises(FileFormatError, match="widened readout"):
        export(merged, tmp_path / "merged.pth")


@pytest.mark.parametrize("variant", VARIANTS)
def test_domains_of_lammps_give_what_the_structure_gives(variant):
    assert_cut_into_domains(from_vendor("sevenn", build(**VARIANTS[variant])).to(dtype=torch.float64))
